"""The gates have teeth: every mistake that is easily made in a wrap must fail, and correct graphs must pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from matteserve_export import ParityError
from matteserve_export._session import Runner, make_runner
from matteserve_export.compare import (
    Comparison,
    Gate,
    compare_batches,
    compare_core,
    compare_serving,
    make_scenes,
    normalise,
    require,
    run_maps,
)
from matteserve_export.serving import Core, ServingConfig, build_serving, load_core, prepare_core

Images = NDArray[np.uint8]


@pytest.fixture(scope="module")
def core(public_onnx: Callable[..., Path]) -> Core:
    return prepare_core(load_core(public_onnx()))


@pytest.fixture(scope="module")
def reference(core: Core) -> Runner:
    return make_runner(core.model)


@pytest.fixture
def config(imagenet: ServingConfig) -> ServingConfig:
    return dataclasses.replace(imagenet, min_max=True)


def _serve(core: Core, config: ServingConfig) -> Runner:
    return make_runner(build_serving(core, config))


def test_a_correct_graph_passes(core: Core, reference: Runner, config: ServingConfig, scenes: Images) -> None:
    for comparison in (
        compare_core(run_maps(make_runner(core.model), scenes, config), run_maps(reference, scenes, config), config),
        compare_serving(_serve(core, config), run_maps(reference, scenes, config), scenes, config),
        compare_batches(_serve(core, config), scenes, range(1, 9)),
    ):
        assert require(comparison) is comparison
        assert comparison.line().startswith("PASSED ")


@pytest.mark.parametrize(
    ("error", "sigmoid", "passed"), [(2e-4, False, False), (2e-4, True, True), (2e-3, True, False)]
)
def test_logits_may_differ_by_more_than_probabilities(
    config: ServingConfig, error: float, sigmoid: bool, passed: bool
) -> None:
    maps = np.linspace(-9, 9, 64 * 64, dtype=np.float32).reshape(1, 1, 64, 64)
    other = maps.copy()
    other[0, 0, 5, 5] += error
    assert compare_core(other, maps, dataclasses.replace(config, sigmoid=sigmoid, min_max=False)).passed == passed


@pytest.mark.parametrize(
    "mistake",
    [
        {"mean": (0.5, 0.456, 0.406)},
        {"mean": (0.406, 0.456, 0.485), "std": (0.225, 0.224, 0.229)},
        {"std": (1.0, 1.0, 1.0)},
        {"min_max": False},
        {"sigmoid": True},
    ],
    ids=["mean", "bgr constants", "std", "no min-max", "second sigmoid"],
)
def test_a_wrong_wrap_fails(
    core: Core, reference: Runner, config: ServingConfig, scenes: Images, mistake: dict[str, Any]
) -> None:
    comparison = compare_serving(
        _serve(core, dataclasses.replace(config, **mistake)), run_maps(reference, scenes, config), scenes, config
    )
    assert not comparison.passed
    with pytest.raises(ParityError, match=r"^FAILED serving ONNX vs reference: .*; nothing was published$"):
        require(comparison)


def test_swapped_channels_fail(core: Core, reference: Runner, config: ServingConfig, scenes: Images) -> None:
    serving = _serve(core, config)
    assert not compare_serving(
        lambda images: serving(images[..., ::-1].copy()), run_maps(reference, scenes, config), scenes, config
    ).passed


def test_truncation_instead_of_rounding_fails(
    core: Core, reference: Runner, config: ServingConfig, scenes: Images
) -> None:
    """Truncation is within one level everywhere; the mean gives it away."""

    def truncates(images: NDArray[Any]) -> NDArray[Any]:
        x = reference(normalise(images, config))[:, 0]
        low, high = x.min(), x.max()
        return ((x - low) / (high - low) * 255).astype(np.uint8)

    comparison = compare_serving(truncates, run_maps(reference, scenes, config), scenes, config)
    assert comparison.max_abs <= comparison.gate.max_abs
    assert not comparison.passed


def test_one_pixel_off_by_two_levels_fails(
    core: Core, reference: Runner, config: ServingConfig, scenes: Images
) -> None:
    serving = _serve(core, config)

    def off(images: NDArray[Any]) -> NDArray[Any]:
        alpha = serving(images).copy()
        alpha[0, 5, 5] ^= 2
        return alpha

    assert not compare_serving(off, run_maps(reference, scenes, config), scenes, config).passed


def test_other_weights_fail(core: Core, reference: Runner, config: ServingConfig, scenes: Images) -> None:
    def other(pixel_values: NDArray[Any]) -> NDArray[Any]:
        return reference(pixel_values * np.float32(1.01))

    assert not compare_core(
        run_maps(make_runner(core.model), scenes, config), run_maps(other, scenes, config), config
    ).passed
    assert not compare_serving(_serve(core, config), run_maps(other, scenes, config), scenes, config).passed


def test_min_max_over_the_whole_batch_fails(core: Core, config: ServingConfig, scenes: Images) -> None:
    """What the references do is right for single pictures only; in a batch the rows would depend on each other."""
    raw = _serve(core, dataclasses.replace(config, min_max=False))

    def over_the_batch(images: NDArray[Any]) -> NDArray[Any]:
        x = raw(images).astype(np.float64)
        return np.rint((x - x.min()) / (x.max() - x.min()) * 255).astype(np.uint8)

    assert not compare_batches(over_the_batch, scenes, range(1, 9)).passed


def test_nan_fails(reference: Runner, config: ServingConfig, scenes: Images) -> None:
    def broken(pixel_values: NDArray[Any]) -> NDArray[Any]:
        maps = reference(pixel_values).copy()
        maps[0, 0, 0, 0] = np.nan
        return maps

    comparison = compare_core(run_maps(broken, scenes, config), run_maps(reference, scenes, config), config)
    assert comparison.nan_share == pytest.approx(1 / 64**2)
    assert not comparison.passed
    with pytest.raises(ParityError, match="the reference itself is not finite"):
        compare_serving(lambda images: images[..., 0], run_maps(broken, scenes, config), scenes, config)


def test_other_shapes_fail(reference: Runner, config: ServingConfig, scenes: Images) -> None:
    maps = run_maps(reference, scenes, config)
    with pytest.raises(ParityError, match="shapes differ"):
        compare_core(maps[..., :32], maps, config)


def test_the_figures_are_exact() -> None:
    config = ServingConfig((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    ours = np.array([0.9, 0.9, 0.2, 0.0], np.float64).reshape(1, 1, 2, 2)
    theirs = np.array([0.9, 0.4, 0.2, 0.0], np.float64).reshape(1, 1, 2, 2)
    comparison = compare_core(ours, theirs, config)
    assert comparison.max_abs == pytest.approx(0.5)
    assert comparison.mean_abs == pytest.approx(0.125)
    assert comparison.iou == pytest.approx(0.5)
    assert comparison.nan_share == 0


@pytest.mark.parametrize(
    ("change", "passed"),
    [
        ({}, True),
        ({"max_abs": 0.11}, False),
        ({"mean_abs": 0.03}, False),
        ({"iou": 0.98}, False),
        ({"nan_share": 1e-9}, False),
    ],
)
def test_each_bound_counts(change: dict[str, float], passed: bool) -> None:
    good = Comparison("a vs b", 0.1, 0.01, 1.0, 0.0, Gate(max_abs=0.1, max_mean_abs=0.02))
    assert dataclasses.replace(good, **change).passed is passed


def test_scenes_are_reproducible_and_varied() -> None:
    scenes = make_scenes(3, 48, 64, seed=7)
    assert scenes.shape == (3, 48, 64, 3)
    assert scenes.dtype == np.uint8
    assert np.array_equal(scenes, make_scenes(3, 48, 64, seed=7))
    assert not np.array_equal(scenes, make_scenes(3, 48, 64, seed=8))
    assert all(scene.std() > 15 for scene in scenes)
