"""The figures by which engines are judged, on alphas whose differences are known."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pytest

from matteserve_client import AlphaTolerance, InvalidImageError, alpha_difference

LOOSE = AlphaTolerance(max_abs=1, p999_abs=1, mean_abs=1, min_iou=0)


def half(level: int = 255, size: int = 40) -> np.ndarray:
    alpha = np.zeros((1, size, size), np.uint8)
    alpha[:, :, size // 2 :] = level
    return alpha


def test_equal_alphas_differ_by_nothing():
    difference = alpha_difference(half(), half())
    assert (difference.max_abs, difference.p999_abs, difference.mean_abs, difference.flat) == (0, 0, 0, 0)
    assert difference.iou == 1
    assert difference.violations(AlphaTolerance(0, 0, 0, 1)) == []


def test_one_pixel_counts_for_the_maximum_and_not_for_the_percentile():
    ours = half()
    ours[0, 0, 0] = 200
    difference = alpha_difference(ours, half())
    assert difference.max_abs == pytest.approx(200 / 255)
    assert difference.p999_abs == 0  # one of 1,600 is less than one in a thousand
    assert difference.mean_abs == pytest.approx(200 / 255 / 1600)
    assert difference.iou == pytest.approx(800 / 801)


def test_three_pixels_in_a_thousand_show_in_the_percentile():
    ours = half()
    ours[0, 0, :5] = 9
    assert alpha_difference(ours, half()).p999_abs == pytest.approx(9 / 255)


def test_the_worst_picture_decides_the_iou():
    theirs = np.concatenate([half(), half()])
    ours = theirs.copy()
    ours[1, :, 30:] = 0
    difference = alpha_difference(ours, theirs)
    assert difference.iou == pytest.approx(0.5)
    assert difference.worst == 1
    assert difference.images == 2


def test_one_level_decides_no_mask():
    """127 and 128 lie on two sides of the threshold, and are one rounding apart."""
    assert alpha_difference(half(127), half(128)).iou == 1
    assert alpha_difference(half(127), half(129)).iou == 0


def test_empty_masks_agree():
    empty = np.zeros((1, 4, 4), np.uint8)
    assert alpha_difference(empty, empty).iou == 1


def test_a_black_answer_is_flat_whatever_the_tolerance():
    difference = alpha_difference(np.zeros_like(half()), half())
    assert difference.flat == 1
    assert difference.violations(LOOSE) == ["1 of 1 masks are flat where the reference's are not"]


def test_violations_name_figure_and_bound():
    ours = half(127)
    tolerance = AlphaTolerance(max_abs=4 / 255, p999_abs=2 / 255, mean_abs=0.3 / 255, min_iou=0.999)
    assert alpha_difference(ours, half()).violations(tolerance) == [
        "max_abs 128.00/255 is above 4.00/255",
        "p999_abs 128.00/255 is above 2.00/255",
        "mean_abs 64.00/255 is above 0.30/255",
        "IoU 0.0000 is below 0.9990",
    ]


def test_a_tolerance_survives_json():
    tolerance = AlphaTolerance(0.1, 0.2, 0.3, 0.4)
    assert AlphaTolerance.from_dict(asdict(tolerance)) == tolerance


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (np.zeros((1, 4, 4), np.uint8), np.zeros((1, 4, 5), np.uint8)),
        (np.zeros((4, 4), np.uint8), np.zeros((4, 4), np.uint8)),
        (np.zeros((0, 4, 4), np.uint8), np.zeros((0, 4, 4), np.uint8)),
        (np.zeros((1, 4, 4), np.float32), np.zeros((1, 4, 4), np.float32)),
    ],
)
def test_what_cannot_be_compared_is_refused(ours: np.ndarray, theirs: np.ndarray):
    with pytest.raises(InvalidImageError, match="two uint8 arrays of one shape"):
        alpha_difference(ours, theirs)
