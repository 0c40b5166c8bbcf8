"""BiRefNet, the bilateral reference network, with the backbones of its released weights.

Paper: Zheng et al., "Bilateral Reference for High-Resolution Dichotomous Image Segmentation", CAAI Artificial
Intelligence Research 2024, https://arxiv.org/abs/2401.03407. Original repository:
https://github.com/ZhengPeng7/BiRefNet (code and weights MIT).

Names, shapes and order of the state dict are those of the released checkpoints without the entries that only training
needs (`TRAINING_ONLY`). What differs from the original code:

- one configuration, that of the released weights, written down instead of assembled from a global one;
- ``forward`` returns the finest logits alone;
- a convolution over concatenated maps is a sum of convolutions over the maps where that saves a large copy; the head
  stands before the last resize instead of after it: the result is the same, and those were the largest maps of all;
- the batch is never asked for its size, so that it stays symbolic in an exported graph.

Patches. The decoder also reads the image itself, cut into a grid of patches as large as the current map, the patches
stacked as channels. In November 2024 the original code changed the order of these channels; names and shapes stayed.
"legacy" weights in a "current" network load without complaint and give worse masks: see `convert_patch_order`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from matteserve_export.models._ops import resize, static_dims, static_size
from matteserve_export.models.deform_conv import DeformableConv2d
from matteserve_export.models.pvt_v2 import PyramidVisionTransformer, pvt_v2_b2
from matteserve_export.models.swin import SwinTransformer, swin_b, swin_l, swin_s, swin_t

__all__ = [
    "TRAINING_ONLY",
    "BiRefNet",
    "PatchOrder",
    "birefnet",
    "birefnet_lite",
    "birefnet_pvt_v2_b2",
    "birefnet_swin_b",
    "birefnet_swin_s",
    "convert_patch_order",
]

PatchOrder = Literal["current", "legacy"]
"""Order of the stacked patches: of the code since November 2024, or of the code before."""

TRAINING_ONLY = ("decoder.conv_ms_spvn_", "decoder.gdt_convs_pred_")
"""Prefixes of the entries of released checkpoints that belong to heads for training."""

# Patches along each axis, by number of the `ipt_blk`. Block 1 takes the image as it is.
_GRIDS = {5: 32, 4: 16, 3: 8, 2: 4}


class BiRefNet(nn.Module):
    """BiRefNet: a backbone on two scales of the image and a decoder that is shown the image again at every level.

    Args:
        backbone: Returns four maps, finest first; `channels` are theirs.
        patch_order: Order of the channels of the stacked patches that the weights expect.
    """

    def __init__(
        self, backbone: SwinTransformer | PyramidVisionTransformer, patch_order: PatchOrder = "current"
    ) -> None:
        super().__init__()
        if patch_order not in get_args(PatchOrder):
            raise ValueError(f"patch_order is {patch_order!r}; allowed are {', '.join(get_args(PatchOrder))}")
        channels = tuple(2 * width for width in backbone.channels)  # two scales
        self.bb = backbone
        self.squeeze_module = nn.Sequential(DecoderBlock(sum(channels), channels[3]))
        self.decoder = Decoder(channels, patch_order)

    def forward(self, x: Tensor) -> Tensor:
        """Foreground logits.

        Args:
            x: Pixel values, shape (B, 3, H, W), float, RGB, normalised with the ImageNet mean and standard deviation. H
            and W
                are multiples of 32.

        Returns:
            Logits, shape (B, 1, H, W).

        Raises:
            ValueError: H or W is no multiple of 32.
        """
        height, width = static_size(x)
        if height % 32 or width % 32:
            raise ValueError(f"the image is {height}x{width}; BiRefNet needs multiples of 32")
        x1, x2, x3, x4 = self.encode(x)
        logits: Tensor = self.decoder(x, x1, x2, x3, self.squeeze_module(x4))
        return logits

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Features of both scales; the coarsest map carries the finer ones too."""
        height, width = static_size(x)
        full = self.bb(x)
        half = self.bb(resize(x, (height // 2, width // 2), align_corners=True))
        x1, x2, x3, x4 = (
            torch.cat((fine, resize(coarse, static_size(fine), align_corners=True)), 1)
            for fine, coarse in zip(full, half, strict=True)
        )
        context = [resize(map_, static_size(x4), align_corners=True) for map_ in (x1, x2, x3)]
        return x1, x2, x3, torch.cat((*context, x4), 1)


class Decoder(nn.Module):
    """Reconstruction with inward reference (patches of the image) and outward reference (gates).

    Args:
        channels: Channels of the four maps of the encoder, finest first.
        patch_order: See `BiRefNet`.
    """

    def __init__(self, channels: tuple[int, ...], patch_order: PatchOrder) -> None:
        super().__init__()
        self.patch_order = patch_order
        c1, c2, c3, c4 = channels
        image_channels = {5: c4 // 8, 4: c4 // 8, 3: c3 // 8, 2: c2 // 8, 1: c1 // 8}
        for number, width in image_channels.items():
            self.add_module(f"ipt_blk{number}", ImageConvs(3 * _GRIDS.get(number, 1) ** 2, width))
        self.decoder_block4 = DecoderBlock(c4 + image_channels[5], c3)
        self.decoder_block3 = DecoderBlock(c3 + image_channels[4], c2)
        self.decoder_block2 = DecoderBlock(c2 + image_channels[3], c1)
        self.decoder_block1 = DecoderBlock(c1 + image_channels[2], c1 // 2)
        self.conv_out1 = nn.Sequential(nn.Conv2d(c1 // 2 + image_channels[1], 1, 1))
        for number, width in ((4, c3), (3, c2), (2, c1)):
            self.add_module(f"lateral_block{number}", LateralConv(width, width))
        for number, width in ((4, c3), (3, c2), (2, c1)):
            layers = (nn.Conv2d(width, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(inplace=True))
            self.add_module(f"gdt_convs_{number}", nn.Sequential(*layers))
        for number in (4, 3, 2):
            self.add_module(f"gdt_convs_attn_{number}", nn.Sequential(nn.Conv2d(16, 1, 1)))

    def forward(self, image: Tensor, x1: Tensor, x2: Tensor, x3: Tensor, x4: Tensor) -> Tensor:
        """Logits at the size of the image, from the image and the encoder's maps."""
        p4 = self._gated(4, self.decoder_block4(self._with_patches(5, x4, image)))
        p3 = self._gated(3, self.decoder_block3(self._with_patches(4, self._skip(4, p4, x3), image)))
        p2 = self._gated(2, self.decoder_block2(self._with_patches(3, self._skip(3, p3, x2), image)))
        p1 = self.decoder_block1(self._with_patches(2, self._skip(2, p2, x1), image))

        # The head reads p1, resized, and the image's features: a 1x1 convolution may as well stand before the resize.
        head = self.conv_out1.get_submodule("0")
        assert isinstance(head, nn.Conv2d)
        channels, *_ = static_dims(p1)
        of_map, of_image = torch.split(head.weight, [channels, head.in_channels - channels], 1)
        coarse = resize(F.conv2d(p1, of_map), static_size(image), align_corners=True)
        fine = F.conv2d(self.get_submodule("ipt_blk1")(image), of_image, head.bias)
        return coarse + fine

    def _with_patches(self, number: int, x: Tensor, image: Tensor) -> Tensor:
        """The map, and features of the image's patches after it."""
        patches = stack_patches(image, _GRIDS[number], self.patch_order)
        return torch.cat((x, self.get_submodule(f"ipt_blk{number}")(patches)), 1)

    def _gated(self, number: int, p: Tensor) -> Tensor:
        gate = self.get_submodule(f"gdt_convs_attn_{number}")(self.get_submodule(f"gdt_convs_{number}")(p))
        return p * torch.sigmoid(gate)

    def _skip(self, number: int, p: Tensor, x: Tensor) -> Tensor:
        lateral: Tensor = self.get_submodule(f"lateral_block{number}")(x)
        return resize(p, static_size(x), align_corners=True) + lateral


class DecoderBlock(nn.Module):
    """3x3 convolution, attention, 3x3 convolution; no activation at the end."""

    def __init__(self, in_channels: int, out_channels: int, inner_channels: int = 64) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, inner_channels, 3, padding=1)
        self.dec_att = ASPPDeformable(inner_channels)
        self.conv_out = nn.Conv2d(inner_channels, out_channels, 3, padding=1)
        self.bn_in = nn.BatchNorm2d(inner_channels)
        self.bn_out = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn_in(self.conv_in(x)), inplace=True)
        out: Tensor = self.bn_out(self.conv_out(self.dec_att(h)))
        return out


class ASPPDeformable(nn.Module):
    """Atrous spatial pyramid pooling with deformable convolutions, and a branch that sees the whole map."""

    def __init__(self, channels: int, branch_channels: int = 256) -> None:
        super().__init__()
        self.branch_channels = branch_channels
        self.aspp1 = DeformableBranch(channels, branch_channels, 1)
        self.aspp_deforms = nn.ModuleList(DeformableBranch(channels, branch_channels, kernel) for kernel in (1, 3, 7))
        self.global_avg_pool = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, branch_channels, 1, bias=False),
            nn.BatchNorm2d(branch_channels),
            nn.ReLU(inplace=True),
        )
        self.conv1 = nn.Conv2d(5 * branch_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        # `conv1` over the five branches one after the other: no copy with 5 * 256 channels, and a branch is done with
        # before the next one is computed. The last branch has one value per channel, which the sum spreads over the
        # map.
        filters = torch.split(self.conv1.weight, self.branch_channels, 1)
        branches = (self.aspp1, *self.aspp_deforms, self.global_avg_pool)
        h = F.conv2d(branches[0](x), filters[0])
        for branch, weight in zip(branches[1:], filters[1:], strict=True):
            h = h + F.conv2d(branch(x), weight)
        return F.relu(self.bn1(h), inplace=True)


class DeformableBranch(nn.Module):
    """Deformable convolution, batch norm, ReLU."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__()
        self.atrous_conv = DeformableConv2d(in_channels, out_channels, kernel_size)
        self.bn = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.atrous_conv(x)), inplace=True)


class ImageConvs(nn.Module):
    """Two 3x3 convolutions with nothing between them."""

    def __init__(self, in_channels: int, out_channels: int, inner_channels: int = 64) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, inner_channels, 3, padding=1)
        self.conv_out = nn.Conv2d(inner_channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv_out(self.conv1(x))
        return out


class LateralConv(nn.Module):
    """1x1 convolution on a skip path."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        return out


def stack_patches(image: Tensor, grid: int, order: PatchOrder) -> Tensor:
    """Cut an image into `grid` times `grid` patches and stack them as channels.

    Args:
        image: Shape (B, C, H, W).
        grid: Number of patches along each axis.
        order: "current" stacks by channel, row, column of the grid, the last running fastest; "legacy" by column, row,
            channel.

    Returns:
        Shape (B, C*grid*grid, H/grid, W/grid).
    """
    channels, height, width = static_dims(image)
    patches = image.reshape(-1, channels, grid, height // grid, grid, width // grid)
    axes = (0, 1, 2, 4, 3, 5) if order == "current" else (0, 4, 2, 1, 3, 5)
    return patches.permute(*axes).reshape(-1, channels * grid**2, height // grid, width // grid)


def convert_patch_order(
    state: Mapping[str, Tensor], *, source: PatchOrder, target: PatchOrder = "current"
) -> dict[str, Tensor]:
    """Permute weights so that they compute in a network of one patch order what they were trained for in the other.

    Args:
        state: State dict of a BiRefNet, names without prefixes. It is left as it is.
        source: Order that the weights expect.
        target: Order of the network that will load them.

    Returns:
        A new mapping; tensors that need no change are shared.

    Raises:
        ValueError: `state` is not that of a BiRefNet.
    """
    converted = dict(state)
    for number, grid in _GRIDS.items():
        name = f"decoder.ipt_blk{number}.conv1.weight"
        if name not in state or state[name].shape[1:2] != (3 * grid**2,):
            raise ValueError(
                f"only a BiRefNet has a patch order; these weights have no {name} of {3 * grid**2} channels"
            )
        if source != target:
            # Where each channel of the target's order lies in the source's: the two orders are each other's mirror
            # image.
            places = torch.arange(3 * grid**2)
            axes = (grid, grid, 3) if source == "legacy" else (3, grid, grid)
            converted[name] = state[name][:, places.reshape(axes).permute(2, 1, 0).flatten()]
    return converted


def birefnet(patch_order: PatchOrder = "current") -> BiRefNet:
    """BiRefNet with Swin-L, 220 M parameters (881 MB)."""
    return BiRefNet(swin_l(), patch_order)


def birefnet_lite(patch_order: PatchOrder = "current") -> BiRefNet:
    """BiRefNet with Swin-T, 44.3 M parameters (177 MB)."""
    return BiRefNet(swin_t(), patch_order)


def birefnet_swin_s(patch_order: PatchOrder = "current") -> BiRefNet:
    """BiRefNet with Swin-S, 65.6 M parameters (263 MB)."""
    return BiRefNet(swin_s(), patch_order)


def birefnet_swin_b(patch_order: PatchOrder = "current") -> BiRefNet:
    """BiRefNet with Swin-B, 106 M parameters (425 MB)."""
    return BiRefNet(swin_b(), patch_order)


def birefnet_pvt_v2_b2(patch_order: PatchOrder = "current") -> BiRefNet:
    """BiRefNet with PVT v2 B2, 39.7 M parameters (159 MB)."""
    return BiRefNet(pvt_v2_b2(), patch_order)
