"""Measures of `matteserve eval` against hand-made answers and against their definitions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from matteserve_bench import EvaluationError
from matteserve_bench.evaluation import (
    MEASURES,
    score,
)
from matteserve_bench.evaluation.matting import matting_errors

SIZE = 32


def square(first: int = 8, last: int = 24, size: int = SIZE) -> NDArray[np.uint8]:
    """A white square, uint8."""
    mask = np.zeros((size, size), np.uint8)
    mask[first:last, first:last] = 255
    return mask


def unit(levels: NDArray[Any]) -> NDArray[np.float32]:
    return (levels / 255).astype(np.float32)


def random_alphas(seed: int, shape: tuple[int, int] = (14, 11)) -> NDArray[np.float32]:
    """Two related alphas with flat and soft parts, as (2, H, W)."""
    rng = np.random.default_rng(seed)
    true = np.clip(rng.normal(0.5, 0.6, shape), 0, 1)
    return np.stack([np.clip(true + rng.normal(0, 0.3, shape), 0, 1), true]).astype(np.float32)


def test_a_perfect_alpha() -> None:
    figures = score(square(), unit(square()), hce=True).figures
    assert list(figures) == [m.key for m in MEASURES]
    for key in ("mae", "hce", "sad", "mse", "mad", "grad", "conn"):
        assert figures[key] == 0, key
    for key in ("s_measure", "weighted_f", "f_max", "iou", "biou"):
        assert figures[key] == pytest.approx(1), key
    pixels = SIZE * SIZE
    assert figures["e_max"] == pytest.approx(pixels / (pixels - 1))  # its authors divide by one less


def test_an_inverted_alpha() -> None:
    figures = score(255 - square(), unit(square())).figures
    assert figures["mae"] == 1
    assert figures["iou"] == figures["weighted_f"] == 0
    assert figures["biou"] == 0
    assert figures["sad"] == pytest.approx(SIZE * SIZE / 1000)
    assert figures["mse"] == figures["mad"] == pytest.approx(1000)
    assert figures["s_measure"] < 0.2


def test_half_right_by_hand() -> None:
    """The upper half of a 16x16 square is found, and as much beside it: precision 1/2, recall 1/2."""
    found = np.zeros((SIZE, SIZE), np.uint8)
    found[8:16, 8:24] = 255
    found[0:8, 8:24] = 255
    figures = score(found, unit(square())).figures
    assert figures["mae"] == pytest.approx(256 / 1024)
    assert figures["sad"] == pytest.approx(0.256)
    assert figures["mse"] == pytest.approx(250)
    assert figures["iou"] == pytest.approx(128 / 384)
    # At threshold 0 everything is foreground: precision 1/4, recall 1. F at 1/2, 1/2 is larger.
    assert figures["f_max"] == pytest.approx(max(0.5, 1.3 * 0.25 * 1 / (0.3 * 0.25 + 1)))


def test_an_empty_mask() -> None:
    nothing = np.zeros((SIZE, SIZE), np.uint8)
    scores = score(nothing, unit(nothing))
    assert scores.empty
    assert not score(nothing, unit(square())).empty
    assert scores.figures["mae"] == 0
    assert scores.figures["s_measure"] == 1
    assert [scores.figures[key] for key in ("weighted_f", "f_max", "iou", "biou")] == [0, 0, 0, 0]
    full = score(np.full((SIZE, SIZE), 255, np.uint8), unit(nothing)).figures
    assert full["mae"] == 1
    assert full["s_measure"] == 0


def test_all_foreground() -> None:
    everything = np.full((SIZE, SIZE), 255, np.uint8)
    figures = score(everything, unit(everything)).figures
    assert [figures[key] for key in ("mae", "sad", "conn", "grad")] == [0, 0, 0, 0]
    assert [figures[key] for key in ("s_measure", "f_max", "iou", "biou")] == pytest.approx([1, 1, 1, 1])


def test_alpha_is_not_stretched() -> None:
    """The field's scripts stretch a prediction to its own minimum and maximum; an alpha of a half is a half here."""
    figures = score(square() // 5 * 2, unit(square())).figures  # 102 of 255
    assert figures["mae"] == pytest.approx(0.6 * 256 / 1024)
    assert figures["mse"] == pytest.approx(360 * 256 / 1024)
    assert figures["iou"] == 0  # below a half
    assert figures["f_max"] == pytest.approx(1)  # but some threshold fits


@pytest.mark.parametrize("place", [np.s_[-1:, :], np.s_[:, -1:], np.s_[-1, -1], np.s_[0, 0]])
def test_a_mask_at_the_border_has_finite_scores(place: Any) -> None:
    mask = np.zeros((SIZE, SIZE), np.uint8)
    mask[place] = 255
    assert all(map(math.isfinite, score(square(), unit(mask)).figures.values()))
    assert score(mask, unit(mask)).figures["s_measure"] == pytest.approx(1)


@pytest.mark.parametrize(("level", "is_foreground"), [(128, False), (129, True)])
def test_foreground_begins_above_128(level: int, is_foreground: bool) -> None:
    mask = np.full((SIZE, SIZE), level, np.uint8)
    assert score(square(), unit(mask)).empty is not is_foreground


def test_every_level_survives_the_way_through_floats() -> None:
    """A mask of one pixel under a ramp: its curve steps where its level is, and nowhere beside."""
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    for level in (0, 1, 77, 128, 254, 255):
        curve = score(ramp, (ramp == level).astype(np.float32)).curves["f"]
        assert np.flatnonzero(curve)[0] == 255 - level


def test_mattes_are_compared_in_the_unknown_region_only() -> None:
    unknown = np.zeros((SIZE, SIZE), np.bool_)
    unknown[:4] = True
    wrong = square()
    wrong[0, :16] = 51  # 16 pixels of 0.2 inside, and much outside
    wrong[20:] = 255
    figures = score(wrong, unit(square()), unknown=unknown).figures
    assert figures["sad"] == pytest.approx(16 * 0.2 / 1000)
    assert figures["mse"] == pytest.approx(16 * 0.04 / 128 * 1000)
    assert figures["mad"] == pytest.approx(16 * 0.2 / 128 * 1000)
    assert figures["mae"] > 0.2  # the others do not know trimaps


@pytest.mark.parametrize("what", ["mask", "trimap"])
def test_shapes_must_fit(what: str) -> None:
    mask, unknown = (unit(square(size=16)), None) if what == "mask" else (unit(square()), square(size=16) > 0)
    with pytest.raises(EvaluationError, match=f"alpha is 32 x 32 and the {what} 16 x 16"):
        score(square(), mask, unknown=unknown)


def test_boundary_iou_against_its_definition() -> None:
    """Boundary: pixels of a mask no farther than 2 % of the diagonal from a pixel outside, or outside the picture."""
    rng = np.random.default_rng(5)
    shape = (70, 90)
    coarse = rng.random((2, 7, 9)) > 0.5
    ours, true = (np.kron(mask, np.ones((10, 10), np.bool_)) for mask in coarse)
    reach = round(0.02 * math.hypot(*shape))

    def boundary(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
        near = np.zeros(shape, np.bool_)
        for y, x in np.argwhere(mask):
            top, left = y - reach, x - reach
            window = mask[max(0, top) : y + reach + 1, max(0, left) : x + reach + 1]
            near[y, x] = window.size < (2 * reach + 1) ** 2 or not window.all()
        return near

    a, b = boundary(ours), boundary(true)
    expected = (a & b).sum() / (a | b).sum()
    found = score(ours.astype(np.uint8) * 255, true.astype(np.float32)).figures["biou"]
    assert reach == 2
    assert found == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(3))
def test_gradient_error_against_its_definition(seed: int) -> None:
    """Sums over a full 2-D kernel, pixel by pixel."""
    alpha, true = random_alphas(seed).astype(np.float64)
    sigma, half = 1.4, 4  # where the Gaussian falls below 0.01

    def gauss(x: float) -> float:
        return math.exp(-(x**2) / (2 * sigma**2)) / (sigma * math.sqrt(2 * math.pi))

    assert gauss(half) < 0.01 < gauss(half - 1)
    offsets = range(-half, half + 1)
    kernel = {(i, j): gauss(i) * -j * gauss(j) / sigma**2 for i in offsets for j in offsets}
    energy = math.sqrt(sum(value**2 for value in kernel.values()))

    def magnitude(matte: NDArray[np.float64], y: int, x: int) -> float:
        along_x = along_y = 0.0
        for (i, j), value in kernel.items():
            height, width = matte.shape
            along_x += value * matte[min(max(y - i, 0), height - 1), min(max(x - j, 0), width - 1)]
            along_y += value * matte[min(max(y - j, 0), height - 1), min(max(x - i, 0), width - 1)]
        return math.hypot(along_x, along_y) / energy

    expected = sum((magnitude(alpha, y, x) - magnitude(true, y, x)) ** 2 for y, x in np.ndindex(true.shape)) / 1000
    assert matting_errors(*random_alphas(seed))["grad"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("seed", range(4))
def test_connectivity_error_against_its_definition(seed: int) -> None:
    """For each pixel the highest level up to which it stays in the largest region that both mattes hold."""
    alpha, true = random_alphas(seed)

    def largest(level: float) -> set[tuple[int, ...]]:
        left = set(map(tuple, np.argwhere((alpha >= np.float32(level)) & (true >= np.float32(level))).tolist()))
        regions: list[set[tuple[int, ...]]] = []
        while left:
            region, edge = set(), [min(left)]
            while edge:
                pixel = edge.pop()
                if pixel in left:
                    left.remove(pixel)
                    region.add(pixel)
                    edge += [(pixel[0] + dy, pixel[1] + dx) for dy, dx in ((0, 1), (1, 0), (0, -1), (-1, 0))]
            regions.append(region)
        return max(regions, key=len, default=set())

    regions = [largest(step / 10) for step in range(11)]
    expected = 0.0
    for pixel in np.ndindex(true.shape):
        left_at = next((step for step in range(1, 11) if pixel not in regions[step]), 11)
        level = (left_at - 1) / 10
        degrees = []
        for matte in (alpha, true):
            distance = float(matte[pixel]) - level
            degrees.append(1 - (distance if distance >= 0.15 else 0))
        expected += abs(degrees[0] - degrees[1])
    assert matting_errors(alpha, true)["conn"] == pytest.approx(expected / 1000, rel=1e-4)


def test_an_island_costs_its_area_in_connectivity() -> None:
    island = square()
    island[1:3, 1:6] = 255
    figures = matting_errors(unit(island), unit(square()))
    assert figures["conn"] == pytest.approx(10 / 1000)
    assert figures["conn"] == figures["sad"]
