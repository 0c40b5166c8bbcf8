"""U²-Net and U²-Net-P, the two-level nested U-structure.

Paper: Qin et al., "U²-Net: Going Deeper with Nested U-Structure for Salient Object Detection",
Pattern Recognition 2020, https://arxiv.org/abs/2005.09007.
Original repository: https://github.com/xuebinqin/U-2-Net (code Apache-2.0; it links the released weights).

Names, shapes and order of the state dict are those of the released checkpoints. What differs from the original code:

- one residual U-block class, ``RSU``, covers RSU-7 to RSU-4 and the dilated RSU-4F;
- ``forward`` returns the fused probability alone; ``side_logits`` all seven maps, before the sigmoid, for training;
- sizes are read as plain numbers, so that an exported graph has a fixed height and width, a symbolic batch and no shape
  arithmetic. Any height and width work, odd ones too.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from matteserve_export.models._ops import resize, static_size

__all__ = ["RSU", "Stage", "U2Net", "UStructure", "u2net", "u2netp"]


def _upsample_to(x: Tensor, partner: Tensor) -> Tensor:
    """Resize ``x`` bilinearly (corners not aligned) to the height and width of ``partner``."""
    return resize(x, static_size(partner), align_corners=False)


class ConvBNReLU(nn.Module):
    """3x3 convolution with bias, batch norm, ReLU; the size stays."""

    def __init__(self, in_channels: int, out_channels: int, dilation: int = 1) -> None:
        super().__init__()
        self.conv_s1 = nn.Conv2d(in_channels, out_channels, 3, padding=dilation, dilation=dilation)
        self.bn_s1 = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.bn_s1(self.conv_s1(x))
        return F.relu(h, inplace=True)


class RSU(nn.Module):
    """Residual U-block (RSU-L): a small U-Net of ``depth`` levels inside one stage, added to its own input features.

    Args:
        depth: Number of encoder convolutions, L in the paper.
        in_channels: Channels of the input.
        mid_channels: Channels inside the block.
        out_channels: Channels of the output.
        dilated: RSU-4F: the block keeps its size and doubles the dilation from level to level instead of pooling.
    """

    def __init__(
        self, depth: int, in_channels: int, mid_channels: int, out_channels: int, dilated: bool = False
    ) -> None:
        super().__init__()
        self.depth = depth
        self.dilated = dilated
        self.rebnconvin = ConvBNReLU(in_channels, out_channels)
        for level in range(1, depth + 1):
            # With pooling only the lowest convolution is dilated.
            dilation = 2 ** (level - 1) if dilated else (2 if level == depth else 1)
            channels = out_channels if level == 1 else mid_channels
            self.add_module(f"rebnconv{level}", ConvBNReLU(channels, mid_channels, dilation))
        for level in range(depth - 1, 0, -1):
            dilation = 2 ** (level - 1) if dilated else 1
            channels = out_channels if level == 1 else mid_channels
            self.add_module(f"rebnconv{level}d", ConvBNReLU(2 * mid_channels, channels, dilation))

    def forward(self, x: Tensor) -> Tensor:
        residual: Tensor = self.rebnconvin(x)
        skips: list[Tensor] = []
        h = residual
        for level in range(1, self.depth):
            # No pooling before the first convolution, and none before the lowest one.
            if level > 1 and not self.dilated:
                h = F.max_pool2d(h, 2, stride=2, ceil_mode=True)
            h = self.get_submodule(f"rebnconv{level}")(h)
            skips.append(h)
        h = self.get_submodule(f"rebnconv{self.depth}")(h)
        for level in range(self.depth - 1, 0, -1):
            skip = skips.pop()
            h = self.get_submodule(f"rebnconv{level}d")(torch.cat((_upsample_to(h, skip), skip), 1))
        return torch.add(h, residual)


class Stage(NamedTuple):
    """Arguments of one residual U-block."""

    depth: int
    in_channels: int
    mid_channels: int
    out_channels: int
    dilated: bool = False


class UStructure(nn.Module):
    """The outer U of U²-Net and IS-Net: eleven residual U-blocks with six side outputs.

    Subclasses call `add_stages` once; released checkpoints have no level above the stages, and neither has this.
    """

    def add_stages(self, encoder: tuple[Stage, ...], decoder: tuple[Stage, ...]) -> None:
        """Make the blocks ``stage1`` to ``stage6``, ``stage5d`` down to ``stage1d``, and ``side1`` to ``side6``."""
        for number, stage in enumerate(encoder, start=1):
            self.add_module(f"stage{number}", RSU(*stage))
        for number, stage in zip(range(5, 0, -1), decoder, strict=True):
            self.add_module(f"stage{number}d", RSU(*stage))
        # Side outputs sit on stage1d to stage5d and on stage6.
        side_channels = [stage.out_channels for stage in reversed(decoder)] + [encoder[-1].out_channels]
        for number, channels in enumerate(side_channels, start=1):
            self.add_module(f"side{number}", nn.Conv2d(channels, 1, 3, padding=1))

    def stage_features(self, x: Tensor) -> list[Tensor]:
        """Features that the side outputs read, finest first: of ``stage1d`` to ``stage5d`` and of ``stage6``."""
        skips: list[Tensor] = []
        h = x
        for number in range(1, 7):
            if number > 1:
                h = F.max_pool2d(h, 2, stride=2, ceil_mode=True)
            h = self.get_submodule(f"stage{number}")(h)
            skips.append(h)

        features = [skips.pop()]
        for number in range(5, 0, -1):
            skip = skips.pop()
            h = self.get_submodule(f"stage{number}d")(torch.cat((_upsample_to(h, skip), skip), 1))
            features.append(h)
        return features[::-1]

    def side_map(self, number: int, features: Tensor) -> Tensor:
        """Side output `number`, logits at the size of `features`."""
        side: Tensor = self.get_submodule(f"side{number}")(features)
        return side


class U2Net(UStructure):
    """U²-Net: a U-structure of eleven residual U-blocks with six side outputs and one fused output.

    Args:
        encoder: Blocks ``stage1`` to ``stage6``.
        decoder: Blocks ``stage5d`` down to ``stage1d``.
    """

    def __init__(self, encoder: tuple[Stage, ...], decoder: tuple[Stage, ...]) -> None:
        super().__init__()
        self.add_stages(encoder, decoder)
        self.outconv = nn.Conv2d(6, 1, 1)

    def side_logits(self, x: Tensor) -> tuple[Tensor, ...]:
        """All seven saliency maps before the sigmoid, for training with deep supervision.

        Args:
            x: Pixel values, shape (B, 3, H, W), float, RGB, normalised with the ImageNet mean and standard deviation.

        Returns:
            The fused map d0 and the side maps d1 to d6, each of shape (B, 1, H, W), logits.
        """
        sides = [self.side_map(number, features) for number, features in enumerate(self.stage_features(x), start=1)]
        maps = tuple(_upsample_to(side, x) for side in sides)
        return (self.outconv(torch.cat(maps, 1)), *maps)

    def forward(self, x: Tensor) -> Tensor:
        """Fused foreground probability.

        Args:
            x: Pixel values, shape (B, 3, H, W), float, RGB, normalised with the ImageNet mean and standard deviation.

        Returns:
            Probability d0, shape (B, 1, H, W), in [0, 1].
        """
        return torch.sigmoid(self.side_logits(x)[0])


def u2net() -> U2Net:
    """U²-Net, 44.0 M parameters (176 MB)."""
    return U2Net(
        encoder=(
            Stage(7, 3, 32, 64),
            Stage(6, 64, 32, 128),
            Stage(5, 128, 64, 256),
            Stage(4, 256, 128, 512),
            Stage(4, 512, 256, 512, dilated=True),
            Stage(4, 512, 256, 512, dilated=True),
        ),
        decoder=(
            Stage(4, 1024, 256, 512, dilated=True),
            Stage(4, 1024, 128, 256),
            Stage(5, 512, 64, 128),
            Stage(6, 256, 32, 64),
            Stage(7, 128, 16, 64),
        ),
    )


def u2netp() -> U2Net:
    """U²-Net-P, the small variant, 1.13 M parameters (4.7 MB)."""
    return U2Net(
        encoder=(
            Stage(7, 3, 16, 64),
            Stage(6, 64, 16, 64),
            Stage(5, 64, 16, 64),
            Stage(4, 64, 16, 64),
            Stage(4, 64, 16, 64, dilated=True),
            Stage(4, 64, 16, 64, dilated=True),
        ),
        decoder=(
            Stage(4, 128, 16, 64, dilated=True),
            Stage(4, 128, 16, 64),
            Stage(5, 128, 16, 64),
            Stage(6, 128, 16, 64),
            Stage(7, 128, 16, 64),
        ),
    )
