"""Gates between the stages: each result is compared with the stage before it, and a failed gate publishes nothing.

The reference chain here is written in numpy, independently of the graph that it judges: a mistake in the wrap (mean,
order of the channels, a missing min-max) shows as a difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from matteserve_export._errors import ParityError
from matteserve_export._session import Runner
from matteserve_export.serving import FLAT_RANGE, ServingConfig

__all__ = [
    "Comparison",
    "Gate",
    "compare_batches",
    "compare_core",
    "compare_serving",
    "make_scenes",
    "normalise",
    "reference_alpha",
    "require",
    "run_maps",
]

LEVEL = 1 / 255
"""One step of the uint8 wire."""


@dataclass(frozen=True)
class Gate:
    """What a comparison must fulfil.

    Attributes:
        max_abs: Largest absolute difference allowed, anywhere.
        max_mean_abs: Largest mean absolute difference allowed. It sees what stays below `max_abs` but is everywhere:
            truncation instead of rounding, slightly other weights.
        min_iou: Smallest intersection over union allowed, of the masks at 0.5, over all pictures together.
    """

    max_abs: float
    max_mean_abs: float
    min_iou: float = 0.99


CORE_GATE = Gate(max_abs=1e-4, max_mean_abs=1e-5)
"""Float32 sums in another order; conformance of the networks here is within 3e-5."""
LOGITS_GATE = Gate(max_abs=1e-3, max_mean_abs=1e-4)
"""The same before the sigmoid, where values are tens instead of ones; it is a quarter of a thousandth after it."""
SERVING_GATE = Gate(max_abs=LEVEL + 1e-9, max_mean_abs=0.05 * LEVEL)
"""A value at .5 may round either way, so one level, in one pixel of twenty at most; never two."""


@dataclass(frozen=True)
class Comparison:
    """Outcome of one gate.

    Attributes:
        name: What was compared with what.
        max_abs: Largest absolute difference.
        mean_abs: Mean absolute difference.
        iou: Intersection over union of the masks at 0.5; 1 if both are empty.
        nan_share: Share of values that are not finite.
        gate: What had to be fulfilled.
    """

    name: str
    max_abs: float
    mean_abs: float
    iou: float
    nan_share: float
    gate: Gate

    @property
    def passed(self) -> bool:
        """Whether all bounds hold; a single NaN fails."""
        gate = self.gate
        return (
            self.nan_share == 0
            and self.max_abs <= gate.max_abs
            and self.mean_abs <= gate.max_mean_abs
            and self.iou >= gate.min_iou
        )

    def line(self) -> str:
        """One line that starts with PASSED or FAILED, with the figures and the bounds."""
        verdict, gate = "PASSED" if self.passed else "FAILED", self.gate
        return (
            f"{verdict} {self.name}: max |Δ| {self.max_abs:.2e} (≤ {gate.max_abs:.2e}), "
            f"mean |Δ| {self.mean_abs:.2e} (≤ {gate.max_mean_abs:.2e}), "
            f"IoU {self.iou:.4f} (≥ {gate.min_iou:.2f}), not finite {self.nan_share:.2%}"
        )

    def to_dict(self) -> dict[str, Any]:
        """For the manifest."""
        return {**asdict(self), "passed": self.passed}


def require(comparison: Comparison) -> Comparison:
    """Return a comparison that passed.

    Raises:
        ParityError: It did not pass.
    """
    if not comparison.passed:
        raise ParityError(f"{comparison.line()}; nothing was published")
    return comparison


def run_maps(model: Runner, images: NDArray[np.uint8], config: ServingConfig) -> NDArray[Any]:
    """Run a core or a reference picture by picture.

    Args:
        model: Pixel values [1, 3, H, W] float32 → map [1, 1, H, W] or [1, H, W].
        images: RGB, [N, H, W, 3] uint8.
        config: Normalisation.

    Returns:
        Maps, [N, 1, H, W] or [N, H, W].
    """
    return np.concatenate([model(normalise(image[None], config)) for image in images])


def compare_core(maps: NDArray[Any], reference_maps: NDArray[Any], config: ServingConfig) -> Comparison:
    """Compare the maps of a core with those of its reference, both as `run_maps` gives them."""
    gate, threshold = (LOGITS_GATE, 0.0) if config.sigmoid else (CORE_GATE, 0.5)
    return _compare("core ONNX vs reference", maps, reference_maps, gate, threshold)


def compare_serving(
    serving: Runner, reference_maps: NDArray[Any], images: NDArray[np.uint8], config: ServingConfig
) -> Comparison:
    """Compare the serving graph with the reference and numpy around it, from the same uint8 pictures.

    Args:
        serving: Pictures [1, H, W, 3] uint8 → alpha [1, H, W] uint8.
        reference_maps: What `run_maps` gives for the reference and these pictures.
        images: RGB, [N, H, W, 3] uint8.
        config: What the serving graph was built with.
    """
    ours = np.concatenate([serving(image[None]) for image in images])
    theirs = reference_alpha(reference_maps, config)
    return _compare("serving ONNX vs reference", _unit(ours), _unit(theirs), SERVING_GATE, 0.5)


def compare_batches(serving: Runner, images: NDArray[np.uint8], batch_sizes: Sequence[int]) -> Comparison:
    """Compare the rows of batches with single runs.

    Args:
        serving: Pictures [B, H, W, 3] uint8 → alpha [B, H, W] uint8.
        images: RGB, [N, H, W, 3] uint8; the largest batch needs no more than N.
        batch_sizes: Batches to try; the rows are the first pictures, rotated so that each place sees several.
    """
    singles = np.concatenate([serving(image[None]) for image in images])
    ours, theirs = [], []
    for size in batch_sizes:
        rows = [(size + place) % len(images) for place in range(size)]
        ours.append(serving(images[rows]))
        theirs.append(singles[rows])
    name = f"rows of batches {', '.join(str(size) for size in batch_sizes)} vs single pictures"
    return _compare(name, _unit(np.concatenate(ours)), _unit(np.concatenate(theirs)), SERVING_GATE, 0.5)


def normalise(images: NDArray[np.uint8], config: ServingConfig) -> NDArray[np.float32]:
    """Reference pre-processing: [N, H, W, 3] uint8 RGB → [N, 3, H, W] float32, computed in float64."""
    scaled = (images.astype(np.float64) / 255 - np.asarray(config.mean)) / np.asarray(config.std)
    return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2).astype(np.float32))


def reference_alpha(maps: NDArray[Any], config: ServingConfig) -> NDArray[np.uint8]:
    """Reference post-processing of maps [N, 1, H, W] or [N, H, W] → alpha [N, H, W] uint8, computed in float64."""
    alphas = []
    for single in maps.astype(np.float64).reshape(len(maps), *maps.shape[-2:]):
        x = 1 / (1 + np.exp(-single)) if config.sigmoid else single
        extent = x.max() - x.min()
        if config.min_max and extent > FLAT_RANGE:
            x = (x - x.min()) / extent
        if not np.isfinite(x).all():
            raise ParityError("the reference itself is not finite: the weights are broken; nothing was published")
        alphas.append(np.rint(x.clip(0, 1) * 255).astype(np.uint8))
    return np.stack(alphas)


def make_scenes(count: int, height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    """Pictures to compare on, made up: a shaded object with a soft edge before a textured gradient.

    Args:
        count: Number of pictures.
        height: Height in pixels.
        width: Width in pixels.
        seed: Same seed, same pictures.

    Returns:
        RGB, [count, height, width, 3] uint8.
    """
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    scenes = []
    for _ in range(count):
        colours = rng.uniform(0, 255, (3, 3))
        slope = (x * rng.uniform(-1, 1) + y * rng.uniform(-1, 1))[..., None]
        grain = rng.normal(0, 12, (height, width, 3))
        background = colours[0] + slope * colours[1] + grain
        centre_y, centre_x = rng.uniform(0.3, 0.7, 2)
        radius_y, radius_x = rng.uniform(0.15, 0.35, 2)
        distance = np.hypot((y - centre_y) / radius_y, (x - centre_x) / radius_x)
        waves = 0.1 * np.sin(rng.integers(3, 9) * np.arctan2(y - centre_y, x - centre_x))
        cover = np.clip((1 + waves - distance) * 12, 0, 1)[..., None]
        shading = (1.2 - 0.7 * distance)[..., None]
        scenes.append(cover * colours[2] * shading + (1 - cover) * background)
    return np.stack(scenes).clip(0, 255).astype(np.uint8)


def _unit(alpha: NDArray[np.uint8]) -> NDArray[np.float64]:
    return alpha.astype(np.float64) / 255


def _compare(name: str, ours: NDArray[Any], theirs: NDArray[Any], gate: Gate, threshold: float) -> Comparison:
    if ours.shape != theirs.shape:
        raise ParityError(f"FAILED {name}: shapes differ, {ours.shape} and {theirs.shape}; nothing was published")
    finite = np.isfinite(ours) & np.isfinite(theirs)
    difference = np.abs(ours.astype(np.float64) - theirs.astype(np.float64))[finite]
    mask, other = ours > threshold, theirs > threshold
    union = np.count_nonzero(mask | other)
    return Comparison(
        name=name,
        max_abs=float(difference.max(initial=0.0)),
        mean_abs=float(difference.mean()) if difference.size else float("inf"),
        iou=float(np.count_nonzero(mask & other) / union) if union else 1.0,
        nan_share=float(1 - finite.mean()),
        gate=gate,
    )
