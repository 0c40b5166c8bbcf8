"""The measures of one alpha against one mask.

Those of salient object and dichotomous segmentation compare with the mask as yes or no, and are computed by
`pysodmetrics`, whose figures papers quote; those of matting (:mod:`~matteserve_bench.evaluation.matting`) compare with
the mask as it is. Alpha is taken as it comes: no stretch to its own minimum and maximum.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import py_sod_metrics as sod
from numpy.typing import NDArray
from scipy import ndimage

from matteserve_bench._errors import EvaluationError
from matteserve_bench.evaluation.matting import matting_errors

_FOREGROUND = 128.5 / 255  # the field's "level > 128", for masks of any number of bits
_BOUNDARY = 0.02  # of the diagonal, from Boundary IoU's paper


@dataclass(frozen=True)
class Measure:
    """What is measured.

    Attributes:
        key: Name in CSV and JSON.
        symbol: Name in tables, as papers have it.
        higher_is_better: Which way is better.
        digits: Decimals in tables.
        curve: Over a set of pictures the measure is the maximum of this mean curve, not the mean of the pictures'
            maxima; None for a plain mean.
        optional: Computed on demand only.
    """

    key: str
    symbol: str
    higher_is_better: bool
    digits: int = 4
    curve: str | None = None
    optional: bool = False


MEASURES = (
    Measure("mae", "MAE", False),
    Measure("s_measure", "S_α", True),  # noqa: RUF001
    Measure("e_max", "E_φ^max", True, curve="e"),
    Measure("e_mean", "E_φ^mean", True),
    Measure("weighted_f", "F_β^w", True),
    Measure("f_max", "F_β^max", True, curve="f"),
    Measure("iou", "IoU", True),
    Measure("biou", "BIoU", True),
    Measure("hce", "HCE", False, 1, optional=True),
    Measure("sad", "SAD", False, 3),
    Measure("mse", "MSE x1000", False, 3),
    Measure("mad", "MAD x1000", False, 3),
    Measure("grad", "Grad", False, 3),
    Measure("conn", "Conn", False, 3),
)
"""All of them, in the order of tables."""


@dataclass(frozen=True)
class Scores:
    """What one alpha scored.

    Attributes:
        figures: Value by `Measure.key`.
        curves: Values over 256 thresholds, from 255 down to 0, by `Measure.curve`; float64.
        empty: The mask has no foreground.
    """

    figures: Mapping[str, float]
    curves: Mapping[str, NDArray[np.float64]]
    empty: bool = False


def score(
    levels: NDArray[np.uint8],
    mask: NDArray[np.float32],
    *,
    unknown: NDArray[np.bool_] | None = None,
    hce: bool = False,
) -> Scores:
    """Compute every measure.

    An empty mask scores 0 in F, weighted F, IoU and BIoU, whatever alpha is: so `pysodmetrics` has it.

    Args:
        levels: Alpha, shape (H, W), uint8.
        mask: Ground truth, shape (H, W), float32 in [0, 1].
        unknown: Where mattes are compared, shape (H, W); None compares them everywhere.
        hce: Compute the human correction effort too; it takes longer than all the others.

    Raises:
        EvaluationError: The shapes differ.
    """
    for what, other in (("mask", mask), ("trimap", unknown)):
        if other is not None and other.shape != levels.shape:
            raise EvaluationError(f"the alpha is {_size(levels.shape)} and the {what} {_size(other.shape)}")
    alpha = levels / 255  # float64: times 255 it is the level again, as pysodmetrics' thresholds need it
    true = mask > _FOREGROUND
    mae, structure, alignment, weighted = sod.MAE(), _Smeasure(), sod.Emeasure(), sod.WeightedFmeasure()
    handlers = {"f": sod.FmeasureHandler(True, False), "iou": sod.IOUHandler(False, False, with_binary=True)}
    counts = sod.FmeasureV2(handlers)
    boundary = sod.FmeasureV2({"biou": sod.IOUHandler(False, False, with_binary=True)})
    for each in (mae, structure, alignment, weighted, counts):
        each.step(alpha, true, normalize=False)
    boundary.step(_boundary(alpha > 0.5).astype(np.float64), _boundary(true), normalize=False)
    e_curve = np.asarray(alignment.get_results()["em"]["curve"], np.float64)
    counted = counts.get_results()
    f_curve = np.asarray(counted["f"]["dynamic"], np.float64)
    figures = {
        "mae": mae.get_results()["mae"],
        "s_measure": structure.get_results()["sm"],
        "e_max": e_curve.max(),
        "e_mean": e_curve.mean(),
        "weighted_f": weighted.get_results()["wfm"],
        "f_max": f_curve.max(),
        "iou": counted["iou"]["binary"],
        "biou": boundary.get_results()["biou"]["binary"],
    }
    if hce:
        effort = sod.HumanCorrectionEffortMeasure()
        effort.step(alpha, true, normalize=False)
        figures["hce"] = effort.get_results()["hce"]
    figures |= matting_errors(alpha.astype(np.float32), mask, unknown)
    plain = {key: float(value) for key, value in figures.items()}
    return Scores(plain, {"e": e_curve, "f": f_curve}, empty=not true.any())


class _Smeasure(sod.Smeasure):  # type: ignore[misc]
    """With an answer for a mask whose centroid is in the last row or column, where the library has not-a-number.

    One of the four quarters has no pixel then, and so no weight.
    """

    def ssim(self, pred: NDArray[np.float64], gt: NDArray[np.bool_]) -> float:
        return float(super().ssim(pred, gt)) if pred.size else 0.0


def _boundary(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Pixels of the mask that are near its outline, as in Boundary IoU (Cheng et al., CVPR 2021, arXiv 2103.16562).

    Near is 2 % of the diagonal, in rows and columns; the picture's border is an outline too.
    """
    reach = max(1, round(_BOUNDARY * math.hypot(*mask.shape)))
    inner = ndimage.minimum_filter(mask.view(np.uint8), size=2 * reach + 1, mode="constant", cval=0)
    boundary: NDArray[np.bool_] = mask & (inner == 0)
    return boundary


def _size(shape: tuple[int, ...]) -> str:
    height, width = shape
    return f"{height} x {width}"
