"""IS-Net, the intermediate-supervision network of dichotomous image segmentation.

Paper: Qin et al., "Highly Accurate Dichotomous Image Segmentation", ECCV 2022, https://arxiv.org/abs/2203.03041.
Original repository: https://github.com/xuebinqin/DIS (code Apache-2.0; it links the released weights, and the terms of
use of the DIS5K data set).

Names, shapes and order of the state dict are those of the released checkpoints. The network is U²-Net's outer U at half
the size of the image, without a fused output. What differs from the original code: ``forward`` returns the finest map
alone, and the five coarser ones, which are there for training, are not computed.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from matteserve_export.models._ops import resize, static_size
from matteserve_export.models.u2net import Stage, UStructure

__all__ = ["ISNet", "isnet"]

_ENCODER = (
    Stage(7, 64, 32, 64),
    Stage(6, 64, 32, 128),
    Stage(5, 128, 64, 256),
    Stage(4, 256, 128, 512),
    Stage(4, 512, 256, 512, dilated=True),
    Stage(4, 512, 256, 512, dilated=True),
)
_DECODER = (
    Stage(4, 1024, 256, 512, dilated=True),
    Stage(4, 1024, 128, 256),
    Stage(5, 512, 64, 128),
    Stage(6, 256, 32, 64),
    Stage(7, 128, 16, 64),
)


class ISNet(UStructure):
    """IS-Net: a strided convolution, then a U-structure of eleven residual U-blocks with six side outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, 64, 3, stride=2, padding=1)  # no norm and no activation after it
        self.add_stages(_ENCODER, _DECODER)

    def side_logits(self, x: Tensor) -> tuple[Tensor, ...]:
        """The six maps before the sigmoid.

        Args:
            x: Pixel values, shape (B, 3, H, W), float, RGB.

        Returns:
            The maps d1 to d6, each of shape (B, 1, H, W), logits.
        """
        size = static_size(x)
        features = self.stage_features(self.conv_in(x))
        sides = [self.side_map(number, h) for number, h in enumerate(features, start=1)]
        return tuple(resize(side, size, align_corners=False) for side in sides)

    def forward(self, x: Tensor) -> Tensor:
        """Foreground probability.

        Args:
            x: Pixel values, shape (B, 3, H, W), float, RGB.

        Returns:
            Probability d1, shape (B, 1, H, W), in [0, 1].
        """
        finest = self.stage_features(self.conv_in(x))[0]
        return torch.sigmoid(resize(self.side_map(1, finest), static_size(x), align_corners=False))


def isnet() -> ISNet:
    """IS-Net, 44.0 M parameters (176 MB)."""
    return ISNet()
