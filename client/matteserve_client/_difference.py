"""How far two answers lie apart: the figures by which engines, precisions and servers are judged.

Only numpy, and in the client's package, because both sides need it: the exporter before it publishes an engine, and the
operator's side before and after a swap, where neither torch nor onnx is installed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from matteserve_client._errors import InvalidImageError

_FLAT_LEVELS = 1
"""A mask whose largest and smallest level differ by no more than this says nothing."""


@dataclass(frozen=True)
class AlphaTolerance:
    """What an :class:`AlphaDifference` must fulfil.

    Attributes:
        max_abs: Largest absolute difference allowed anywhere, in [0, 1].
        p999_abs: Largest 99.9th percentile of the absolute difference allowed, in [0, 1].
        mean_abs: Largest mean absolute difference allowed, in [0, 1].
        min_iou: Smallest intersection over union allowed, of the masks at 0.5, for the worst picture.
    """

    max_abs: float
    p999_abs: float
    mean_abs: float
    min_iou: float

    @classmethod
    def from_dict(cls, values: Mapping[str, float]) -> AlphaTolerance:
        """Read what `dataclasses.asdict` wrote."""
        return cls(**{name: float(values[name]) for name in cls.__dataclass_fields__})


TOLERANCES: Mapping[str, AlphaTolerance] = MappingProxyType(
    {
        # The same arithmetic elsewhere: sums in another order may move a value over a rounding edge.
        "fp32": AlphaTolerance(max_abs=2 / 255, p999_abs=1 / 255, mean_abs=0.05 / 255, min_iou=0.999),
        # 11 bits, rounded after every node of a hundred or a thousand: the aim, and all models here are within it.
        "fp16": AlphaTolerance(max_abs=4 / 255, p999_abs=3 / 255, mean_abs=0.3 / 255, min_iou=0.999),
        # 8 bits: about 8 times as far. Edges move by a level or two, objects must not.
        "bf16": AlphaTolerance(max_abs=24 / 255, p999_abs=12 / 255, mean_abs=2 / 255, min_iou=0.99),
        # 8 bits and one scale for a whole tensor: single pixels of soft edges are far off, objects must not be.
        "int8": AlphaTolerance(max_abs=96 / 255, p999_abs=40 / 255, mean_abs=4 / 255, min_iou=0.97),
    }
)
"""How far the alpha of an engine may lie from that of its FP32 graph, by precision."""


@dataclass(frozen=True)
class AlphaDifference:
    """How one set of alphas differs from another.

    Attributes:
        images: Number of pictures.
        max_abs: Largest absolute difference, in [0, 1].
        p999_abs: 99.9th percentile of the absolute difference over all pixels, in [0, 1].
        mean_abs: Mean absolute difference, in [0, 1].
        iou: Intersection over union of the masks at 0.5 of the worst picture; 1 where both are empty. Levels 127 and
            128 lie on two sides of the threshold and are one rounding apart, so a pixel whose two alphas differ by no
            more than one level belongs to both masks or to neither.
        flat: Pictures for which ours is one flat level and theirs is not. Not-a-number becomes 0 on a uint8 wire, so
            this is how a network that overflowed looks from outside.
        worst: Index of the picture with the largest mean difference.
    """

    images: int
    max_abs: float
    p999_abs: float
    mean_abs: float
    iou: float
    flat: int
    worst: int

    def violations(self, tolerance: AlphaTolerance) -> list[str]:
        """What exceeds the tolerance, one text each with figure and bound; empty if all holds."""
        found = []
        for name in ("max_abs", "p999_abs", "mean_abs"):
            value, bound = getattr(self, name), getattr(tolerance, name)
            if not value <= bound:
                found.append(f"{name} {value * 255:.2f}/255 is above {bound * 255:.2f}/255")
        if not self.iou >= tolerance.min_iou:
            found.append(f"IoU {self.iou:.4f} is below {tolerance.min_iou:.4f}")
        if self.flat:
            found.append(f"{self.flat} of {self.images} masks are flat where the reference's are not")
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for a manifest or `--json`."""
        return asdict(self)


def alpha_difference(ours: NDArray[np.uint8], theirs: NDArray[np.uint8]) -> AlphaDifference:
    """Compare alphas as they come over the wire.

    Args:
        ours: Alphas in question, shape (N, H, W), uint8.
        theirs: Reference, same shape and dtype.

    Raises:
        InvalidImageError: The shapes differ, are not (N, H, W) with N ≥ 1, or the dtype is not uint8.
    """
    if ours.shape != theirs.shape or ours.ndim != 3 or not ours.size or {ours.dtype, theirs.dtype} != {np.dtype("u1")}:
        raise InvalidImageError(
            f"alphas to compare must be two uint8 arrays of one shape (N, H, W); found {ours.dtype} {ours.shape} and "
            f"{theirs.dtype} {theirs.shape}"
        )
    histogram = np.zeros(256, np.int64)  # of the absolute difference: exact percentiles without sorting every pixel
    means, ious, flat = [], [], 0
    for mine, other in zip(ours, theirs, strict=True):
        difference = np.maximum(mine, other) - np.minimum(mine, other)
        histogram += np.bincount(difference.ravel(), minlength=256)
        means.append(float(difference.mean()))
        mask, reference = mine > 127, other > 127
        union = mask | reference
        disagree = np.count_nonzero((mask ^ reference) & (difference > 1))
        ious.append(1.0 - disagree / np.count_nonzero(union) if union.any() else 1.0)
        flat += int(np.ptp(mine) <= _FLAT_LEVELS < np.ptp(other))
    cumulated = np.cumsum(histogram)
    return AlphaDifference(
        images=len(ours),
        max_abs=float(np.flatnonzero(histogram)[-1]) / 255,
        p999_abs=float(np.searchsorted(cumulated, 0.999 * cumulated[-1])) / 255,
        mean_abs=float(np.mean(means)) / 255,
        iou=float(min(ious)),
        flat=flat,
        worst=int(np.argmax(means)),
    )
