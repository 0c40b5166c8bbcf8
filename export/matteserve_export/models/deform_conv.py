"""Modulated deformable convolution in plain torch, exported as ONNX `DeformConv`.

Paper: Zhu et al., "Deformable ConvNets v2: More Deformable, Better Results", CVPR 2019,
https://arxiv.org/abs/1811.11168.

Every tap of the kernel reads at its own place plus an offset that the network predicts, bilinearly, and weighs what it
read with a predicted factor. Offsets are not clamped; a bilinear corner outside the map counts as zero.
For compilers without `DeformConv`, `matteserve_export.lowering` writes it with other operators, in the ONNX.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from matteserve_export.models._ops import static_size

__all__ = ["DeformableConv2d", "deform_conv2d"]

# ONNX Runtime gathers all taps of all channels before it multiplies, 49 maps for each channel of a 7x7 kernel: by far
# the most memory of a BiRefNet. Above so many values a convolution is exported as a sum over groups of its channels.
_MOST_GATHERED = 32 * 2**20


def deform_conv2d(x: Tensor, offset: Tensor, mask: Tensor, weight: Tensor) -> Tensor:
    """Deformable convolution with stride 1, dilation 1 and a padding that keeps the size, tap by tap.

    Besides input and output it needs the memory of two maps of the input's size, whatever the kernel.

    Args:
        x: Shape (B, C, H, W).
        offset: Shape (B, 2*K*K, H, W) in pixels: dy and dx of tap t = i*K + j are channels 2*t and 2*t + 1.
        mask: Shape (B, K*K, H, W), factor of each tap.
        weight: Shape (O, C, K, K), K odd.

    Returns:
        Shape (B, O, H, W).
    """
    height, width = x.shape[-2:]
    kernel = weight.shape[-1]
    size = x.new_tensor((width, height))
    columns, rows = torch.arange(width, device=x.device), torch.arange(height, device=x.device)
    pixels = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), -1)  # [H, W, 2], x before y
    out = x.new_zeros(x.shape[0], weight.shape[0], height * width)
    for tap in range(kernel * kernel):
        row, column = divmod(tap, kernel)
        place = pixels + pixels.new_tensor((column - kernel // 2, row - kernel // 2))
        place = offset[:, 2 * tap : 2 * tap + 2].flip(1).permute(0, 2, 3, 1) + place
        # Where corners are not aligned, pixel p of a row of W lies at (2p + 1)/W - 1.
        grid = (2 * place + 1) / size - 1
        sampled = F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        sampled = sampled * mask[:, tap : tap + 1]
        filters = weight[:, :, row, column]
        out.baddbmm_(filters.expand(x.shape[0], -1, -1), sampled.flatten(2))
    return out.reshape(-1, weight.shape[0], height, width)


class _ExportedDeformConv(torch.autograd.Function):
    """One ONNX `DeformConv` (operator set 19), in place of the dozens of nodes a tap that tracing would give."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, offset: Tensor, mask: Tensor, weight: Tensor, _: tuple[int, int]) -> Tensor:
        # The exporter asks for a tensor of the right shape only.
        return x.new_zeros(()).expand(x.shape[0], weight.shape[0], *x.shape[2:])

    @staticmethod
    def symbolic(g: Any, x: Any, offset: Any, mask: Any, weight: Any, sizes: tuple[int, int]) -> Any:
        out_channels, kernel = sizes
        return g.op(
            "DeformConv",
            *(x, weight, offset, g.op("Constant", value_t=torch.zeros(out_channels)), mask),
            kernel_shape_i=[kernel, kernel],
            pads_i=[kernel // 2] * 4,
        )


class DeformableConv2d(nn.Module):
    """Deformable convolution that predicts its own offsets and factors from its input."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__()
        padding, taps = kernel_size // 2, kernel_size**2
        self.offset_conv = nn.Conv2d(in_channels, 2 * taps, kernel_size, padding=padding)
        self.modulator_conv = nn.Conv2d(in_channels, taps, kernel_size, padding=padding)
        self.regular_conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=padding, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.sigmoid(self.modulator_conv(x))
        weight = 2 * self.regular_conv.weight  # the factors are 2 * sigmoid
        offset = self.offset_conv(x)
        if not torch.onnx.is_in_onnx_export():
            return deform_conv2d(x, offset, mask, weight)
        sizes = (self.regular_conv.out_channels, self.regular_conv.kernel_size[0])
        groups = self._channel_groups(static_size(x))
        parts = (
            zip(torch.split(x, groups, 1), torch.split(weight, groups, 1), strict=True)
            if len(groups) > 1
            else [(x, weight)]
        )
        outs: list[Tensor] = [
            _ExportedDeformConv.apply(part, offset, mask, filters, sizes)  # type: ignore[no-untyped-call]
            for part, filters in parts
        ]
        return functools.reduce(torch.add, outs)

    def _channel_groups(self, size: tuple[int, int]) -> list[int]:
        """Sizes of equal groups of channels, as few as keep what is gathered at once within bounds."""
        channels, taps = self.regular_conv.in_channels, self.regular_conv.kernel_size[0] ** 2
        most = max(1, _MOST_GATHERED // (taps * size[0] * size[1]))
        group = max(n for n in range(1, channels + 1) if channels % n == 0 and n <= most)
        return [group] * (channels // group)
