"""The gates have teeth: every mistake that is easily made in a wrap must fail, and correct graphs must pass."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from matteserve_client import AlphaDifference, AlphaTolerance
from matteserve_export import ParityError
from matteserve_export._session import Runner, make_runner
from matteserve_export.compare import (
    SERVING_TOLERANCE,
    EngineParity,
    compare_batches,
    compare_core,
    compare_serving,
    gate_engine,
    make_scenes,
    normalise,
    run_maps,
    watched_runner,
)
from matteserve_export.serving import Core, ServingConfig, build_serving, load_core, prepare_core

Images = NDArray[np.uint8]
SIZE = 64


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
        assert comparison.require() is comparison
        assert comparison.line().startswith("PASSED ")


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
    with pytest.raises(ParityError, match=r"^FAILED serving ONNX vs reference \(ort-cpu\): .*; nothing was published$"):
        comparison.require()


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
    assert comparison.difference.max_abs <= comparison.tolerance.max_abs
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
    assert comparison.not_finite == pytest.approx(1 / 64**2)
    assert not comparison.passed
    with pytest.raises(ParityError, match="the reference itself is not finite"):
        compare_serving(lambda images: images[..., 0], run_maps(broken, scenes, config), scenes, config)


def test_other_shapes_fail(reference: Runner, config: ServingConfig, scenes: Images) -> None:
    maps = run_maps(reference, scenes, config)
    with pytest.raises(ParityError, match="shapes differ"):
        compare_core(maps[..., :32], maps, config)


def test_the_figures_of_maps_are_exact() -> None:
    config = ServingConfig((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    ours = np.array([0.9, 0.9, 0.2, 0.0], np.float64).reshape(1, 1, 2, 2)
    theirs = np.array([0.9, 0.4, 0.2, 0.0], np.float64).reshape(1, 1, 2, 2)
    comparison = compare_core(ours, theirs, config)
    assert comparison.difference.max_abs == pytest.approx(0.5)
    assert comparison.difference.mean_abs == pytest.approx(0.125)
    assert comparison.difference.iou == pytest.approx(0.5)
    assert comparison.per_image == pytest.approx((0.125,))
    assert comparison.not_finite == 0
    flat = compare_core(np.full_like(theirs, 0.3), theirs, config)
    assert flat.difference.flat == 1
    assert "1 of 1 masks are flat where the reference's are not" in flat.violations


@pytest.mark.parametrize(
    ("change", "violation"),
    [
        ({}, None),
        ({"max_abs": 0.11}, "max_abs 28.05/255 is above 25.50/255"),
        ({"p999_abs": 0.06}, "p999_abs 15.30/255 is above 12.75/255"),
        ({"mean_abs": 0.03}, "mean_abs 7.65/255 is above 5.10/255"),
        ({"iou": 0.98}, "IoU 0.9800 is below 0.9900"),
        ({"flat": 1}, "1 of 2 masks are flat where the reference's are not"),
        ({"not_finite": 1e-3}, "0.10% of the network's output is not finite"),
        ({"not_finite": None}, None),
    ],
)
def test_each_bound_counts(change: dict[str, Any], violation: str | None) -> None:
    tolerance = AlphaTolerance(max_abs=0.1, p999_abs=0.05, mean_abs=0.02, min_iou=0.99)
    figures: dict[str, Any] = {"max_abs": 0.1, "p999_abs": 0.05, "mean_abs": 0.01, "iou": 0.99, "flat": 0}
    not_finite = change.get("not_finite", 0.0)
    figures |= {key: value for key, value in change.items() if key != "not_finite"}
    difference = AlphaDifference(images=2, worst=1, **figures)
    parity = EngineParity("a vs b", "server", 2, (1,), difference, tolerance, not_finite, (0.0, 0.02))
    assert parity.violations == ([violation] if violation else [])
    assert parity.passed is (violation is None)
    assert parity.line().startswith("FAILED a vs b (server): max" if violation else "PASSED a vs b (server): max")
    assert json.loads(json.dumps(parity.to_dict()))["figures"]["worst"] == 1


def test_an_engine_is_given_singles_and_batches() -> None:
    """Right at batch 1, wrong in the second place of every batch: what compilers have been seen to do."""
    images = make_scenes(3, 16, 16)
    seen = []

    def reference(batch: Images) -> Images:
        return batch[..., 0]

    def engine(batch: Images) -> Images:
        seen.append(len(batch))
        alpha = batch[..., 0].copy()
        alpha[1:2] ^= 64
        return alpha

    tolerance = AlphaTolerance(0.01, 0.01, 0.01, 0.99)
    assert gate_engine(engine, reference, images, tolerance, "tensorrt").passed
    assert seen == [1, 1, 1]
    seen.clear()
    parity = gate_engine(engine, reference, images, tolerance, "tensorrt", batch_sizes=(1, 2))
    assert seen == [1, 1, 1, 2, 2]
    assert (parity.passed, parity.images, parity.batch_sizes, parity.difference.images) == (False, 3, (1, 2), 7)
    assert parity.difference.max_abs == 64 / 255
    # Second places were pictures 1 and 0; the last one is always given in the first.
    assert parity.per_image == (64 / 255, 64 / 255, 0.0)
    assert parity.difference.worst in (0, 1)
    with pytest.raises(
        ParityError, match=r"^FAILED engine vs fp32 \(tensorrt\): max \|Δ\| 64/255 .*; nothing was publ"
    ):
        parity.require()


def test_an_engine_of_another_size_fails() -> None:
    images = make_scenes(1, 16, 16)
    with pytest.raises(ParityError, match="shapes differ"):
        gate_engine(lambda x: x[:, :8, :, 0], lambda x: x[..., 0], images, SERVING_TOLERANCE, "server")


def test_the_map_shows_what_uint8_hides(core: Core, config: ServingConfig, scenes: Images) -> None:
    """Not-a-number becomes a black pixel; only the map before it tells."""
    serving = build_serving(core, dataclasses.replace(config, min_max=False))
    run = watched_runner(serving)
    alpha, maps = run(scenes[:2])
    assert np.array_equal(alpha, make_runner(serving)(scenes[:2]))
    assert maps.shape == (2, 1, SIZE, SIZE)
    assert maps.min() < 0  # logits: taken before the network's own sigmoid

    def broken(images: Images) -> tuple[Images, NDArray[Any]]:
        alpha, maps = run(images)
        maps[:, 0, 0, 0] = np.inf
        return alpha, maps

    parity = gate_engine(broken, run, scenes, SERVING_TOLERANCE, "ort-cpu")
    assert parity.not_finite == pytest.approx(1 / SIZE**2)
    assert parity.difference.max_abs == 0
    assert not parity.passed


def test_only_wrapped_graphs_can_be_watched(op_model: Callable[..., onnx.ModelProto]) -> None:
    with pytest.raises(ParityError, match="not wrapped by `matteserve export`"):
        watched_runner(op_model())


def test_scenes_are_reproducible_and_varied() -> None:
    scenes = make_scenes(3, 48, 64, seed=7)
    assert scenes.shape == (3, 48, 64, 3)
    assert scenes.dtype == np.uint8
    assert np.array_equal(scenes, make_scenes(3, 48, 64, seed=7))
    assert not np.array_equal(scenes, make_scenes(3, 48, 64, seed=8))
    assert all(scene.std() > 15 for scene in scenes)
