"""What the architectures share: sizes as plain numbers, and a resize whose exported form has no shape arithmetic."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["constant", "resize", "static_dims", "static_size"]


def constant(array: NDArray[Any]) -> Tensor:
    """A tensor of numbers that follow from sizes; an exported graph has it as a constant.

    What torch itself computes during an export would become part of the graph; what numpy computes does not.
    """
    with _silent_tracer():
        return torch.from_numpy(array)


def static_dims(x: Tensor) -> tuple[int, ...]:
    """All dimensions but the batch as plain numbers; an exported graph has them as constants."""
    with _silent_tracer():
        return tuple(int(length) for length in x.shape[1:])


def static_size(x: Tensor) -> tuple[int, int]:
    """Height and width of an NCHW tensor as plain numbers."""
    _, height, width = static_dims(x)
    return height, width


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


@contextmanager
def _silent_tracer() -> Iterator[None]:
    """The tracer warns that numbers become constants, which is what is wanted: sizes are fixed per exported model."""
    if not torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]
        yield


def _factor(target: int, length: int) -> float:
    """The smallest float32 at or above target / length.

    ONNX stores factors in float32 and takes the floor of factor * length as the new length: a factor rounded down would
    lose a row.
    """
    factor = np.float32(target / length)
    if float(factor) * length < target:
        factor = np.nextafter(factor, np.float32(np.inf))
    return float(factor)
