"""What the architectures share: sizes as plain numbers, and a resize whose exported form has no shape arithmetic."""

from __future__ import annotations

import warnings

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["resize", "static_size"]


def static_size(x: Tensor) -> tuple[int, int]:
    """Height and width of an NCHW tensor as plain numbers; an exported graph has them as constants."""
    if not torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return x.shape[-2], x.shape[-1]
    # The tracer warns that the numbers become constants. That is what is wanted: the size is fixed per exported model.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]
        return int(x.shape[-2]), int(x.shape[-1])


def resize(x: Tensor, size: tuple[int, int], *, align_corners: bool) -> Tensor:
    """Resize bilinearly to `size`, (height, width).

    The factor, not the size, is what the exporter can write down without asking the graph for its batch size.
    """
    own = static_size(x)
    if own == size:
        return x
    factors = [_factor(target, length) for target, length in zip(size, own, strict=True)]
    return F.interpolate(
        x, scale_factor=factors, mode="bilinear", align_corners=align_corners, recompute_scale_factor=False
    )


def _factor(target: int, length: int) -> float:
    """The smallest float32 at or above target / length.

    ONNX stores factors in float32 and takes the floor of factor * length as the new length: a factor rounded down would
    lose a row.
    """
    factor = np.float32(target / length)
    if float(factor) * length < target:
        factor = np.nextafter(factor, np.float32(np.inf))
    return float(factor)
