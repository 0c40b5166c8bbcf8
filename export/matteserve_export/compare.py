"""Gates: a result is compared with what it was made from, and a failed gate publishes nothing.

One outcome, `EngineParity`, serves all of them: core and serving graph against the network they were exported from, the
rows of batches against single pictures, and every further engine (another precision, another runtime, a server)
against the FP32 serving graph. The reference chain of the first two is written in numpy, independently of the graph
that it judges: a mistake in the wrap (mean, order of the channels, a missing min-max) shows as a difference.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from hashlib import sha256
from typing import Any, Literal, TypeAlias

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto

from matteserve_client import AlphaDifference, AlphaTolerance, alpha_difference
from matteserve_export._errors import ParityError
from matteserve_export._inference import without_weights
from matteserve_export._names import WRAP_PREFIX
from matteserve_export._session import Runner, make_runner, open_session
from matteserve_export.emulate import emulate
from matteserve_export.serving import FLAT_RANGE, ServingConfig

__all__ = [
    "CORE_TOLERANCE",
    "SERVING_TOLERANCE",
    "EngineParity",
    "EngineRun",
    "Method",
    "alpha_of",
    "compare_batches",
    "compare_core",
    "compare_serving",
    "gate_engine",
    "gate_graph",
    "graph_runs",
    "make_scenes",
    "normalise",
    "reference_alpha",
    "run_maps",
    "watched_runner",
]

Method = Literal["ort-cpu", "emulated", "ort-cuda", "tensorrt", "server"]
"""Who computed: ONNX Runtime on the CPU (it casts where it has no kernel for a reduced type, so it checks the graph and
the rounding of the weights), the same with every node's result rounded (checks the arithmetic), the real thing on a
GPU, or a server."""

EngineRun: TypeAlias = Callable[[NDArray[np.uint8]], "NDArray[np.uint8] | tuple[NDArray[np.uint8], NDArray[Any]]"]
"""Pictures [B, H, W, 3] uint8 → alphas [B, H, W] uint8, alone or with the map that they were made from: not-a-number
becomes 0 in uint8, only the map shows it."""

CORE_TOLERANCE = AlphaTolerance(max_abs=1e-4, p999_abs=1e-4, mean_abs=1e-5, min_iou=0.99)
"""Float32 sums in another order; conformance of the networks here is within 3e-5."""
LOGITS_TOLERANCE = AlphaTolerance(max_abs=1e-3, p999_abs=1e-3, mean_abs=1e-4, min_iou=0.99)
"""The same before the sigmoid, where values are tens instead of ones; it is a quarter of a thousandth after it."""
SERVING_TOLERANCE = AlphaTolerance(max_abs=1 / 255, p999_abs=1 / 255, mean_abs=0.05 / 255, min_iou=0.99)
"""A value at .5 may round either way, so one level, in one pixel of twenty at most; never two. The mean sees what stays
below that but is everywhere: truncation instead of rounding, slightly other weights."""


@dataclass(frozen=True)
class EngineParity:
    """Outcome of one gate.

    Attributes:
        name: What was compared with what.
        method: Who computed the result in question.
        images: Number of pictures.
        batch_sizes: Batches in which they were run.
        difference: The figures, over all rows of all batches; `worst` is the index of the worst picture.
        tolerance: What they must fulfil.
        not_finite: Share of the network's output that is infinite or not a number; None where only uint8 was seen.
        per_image: Mean absolute difference of each picture, in [0, 1], the worst of its batches.
    """

    name: str
    method: Method
    images: int
    batch_sizes: tuple[int, ...]
    difference: AlphaDifference
    tolerance: AlphaTolerance
    not_finite: float | None
    per_image: tuple[float, ...]

    @property
    def violations(self) -> list[str]:
        """What is wrong, one text each; empty if the gate was passed."""
        found = self.difference.violations(self.tolerance)
        if self.not_finite:
            found.insert(0, f"{self.not_finite:.2%} of the network's output is not finite")
        return found

    @property
    def passed(self) -> bool:
        """Whether all bounds hold; a single NaN fails."""
        return not self.violations

    def line(self) -> str:
        """One line that starts with PASSED or FAILED, with the figures and the bounds."""
        figures, bounds = self.difference, self.tolerance
        parts = [
            f"{label} {getattr(figures, name) * 255:.3g}/255 (≤ {getattr(bounds, name) * 255:.3g})"
            for label, name in (("max |Δ|", "max_abs"), ("99.9 %", "p999_abs"), ("mean", "mean_abs"))
        ]
        parts.append(f"IoU {figures.iou:.4f} (≥ {bounds.min_iou:.4g})")
        if figures.flat:
            parts.append(f"{figures.flat} flat")
        if self.not_finite is not None:
            parts.append(f"not finite {self.not_finite:.2%}")
        return f"{'PASSED' if self.passed else 'FAILED'} {self.name} ({self.method}): {', '.join(parts)}"

    def to_dict(self) -> dict[str, Any]:
        """For the manifest and `--json`."""
        return {
            "name": self.name,
            "method": self.method,
            "images": self.images,
            "batch_sizes": list(self.batch_sizes),
            "figures": {**self.difference.to_dict(), "not_finite": self.not_finite},
            "tolerance": asdict(self.tolerance),
            "passed": self.passed,
        }

    def require(self) -> EngineParity:
        """Return a gate that was passed.

        Raises:
            ParityError: It was not.
        """
        if not self.passed:
            raise ParityError(f"{self.line()}; nothing was published")
        return self


def gate_engine(
    run: EngineRun,
    reference_run: EngineRun,
    images: NDArray[np.uint8],
    tolerance: AlphaTolerance,
    method: Method,
    *,
    batch_sizes: Sequence[int] = (1,),
    name: str = "engine vs fp32",
) -> EngineParity:
    """Compare an engine with its FP32 graph on the same pictures.

    Args:
        run: The engine.
        reference_run: The FP32 graph; it is given one picture at a time.
        images: RGB, [N, H, W, 3] uint8.
        tolerance: What the differences must fulfil.
        method: Who computes in `run`.
        batch_sizes: Batches in which the engine is given the pictures. More than 1 belongs to it: known compiler
            faults show at larger batches only. A batch larger than N repeats pictures.
        name: What is compared with what.

    Raises:
        ParityError: The shapes differ.
    """
    references = np.concatenate([alpha_of(reference_run, image[None]) for image in images])
    answers, rows, maps_not_finite, watched = [], [], [], False
    for size in batch_sizes:
        for start in range(0, len(images), size):
            places = [(start + place) % len(images) for place in range(size)]
            alpha, maps = _alpha_and_map(run, images[places])
            answers.append(alpha)
            rows += places
            if maps is not None:
                watched = True
                maps_not_finite.append(1 - np.isfinite(maps).mean())
    ours, theirs = np.concatenate(answers), references[rows]
    if ours.shape != theirs.shape:
        raise ParityError(f"FAILED {name}: shapes differ, {ours.shape} and {theirs.shape}; nothing was published")
    return _parity(
        name,
        method,
        alpha_difference(ours, theirs),
        tolerance,
        rows=rows,
        per_row=[float(np.abs(a.astype(np.int16) - b).mean()) / 255 for a, b in zip(ours, theirs, strict=True)],
        batch_sizes=batch_sizes,
        not_finite=float(np.mean(maps_not_finite)) if watched else None,
    )


def gate_graph(
    graph: onnx.ModelProto,
    reference: onnx.ModelProto,
    images: NDArray[np.uint8],
    tolerance: AlphaTolerance,
    *,
    batch_sizes: Sequence[int] = (1,),
    name: str = "engine vs fp32",
) -> tuple[EngineParity, ...]:
    """Compare a graph of any precision with its FP32 graph, in every way of `graph_runs`.

    Args:
        graph: Serving graph in question.
        reference: FP32 serving graph.
        images: RGB, [N, H, W, 3] uint8.
        tolerance: What the differences must fulfil.
        batch_sizes: As in `gate_engine`.
        name: What is compared with what.
    """
    singles = _remembered(make_runner(reference), images)
    return tuple(
        gate_engine(open_run(), singles, images, tolerance, method, batch_sizes=batch_sizes, name=name)
        for method, open_run in graph_runs(graph)
    )


def graph_runs(graph: onnx.ModelProto) -> tuple[tuple[Method, Callable[[], EngineRun]], ...]:
    """Every way to run a serving graph that needs no GPU; each is opened by a call, so that one at a time is in memory.

    Returns:
        "ort-cpu" where ONNX Runtime has kernels (it has none for bf16), and "emulated" for fp16 and bf16.
    """
    stored = {int(tensor.data_type) for tensor in graph.graph.initializer}
    runs: list[tuple[Method, Callable[[], EngineRun]]] = []
    if TensorProto.BFLOAT16 not in stored:
        runs.append(("ort-cpu", partial(watched_runner, graph)))
    if stored & {TensorProto.FLOAT16, TensorProto.BFLOAT16}:
        runs.append(("emulated", lambda: watched_runner(emulate(graph))))
    return tuple(runs)


def _remembered(run: EngineRun, images: NDArray[np.uint8]) -> EngineRun:
    """The answers of a run to single pictures; the run itself is let go."""
    answers = {sha256(image.tobytes()).digest(): alpha_of(run, image[None]) for image in images}
    return lambda pictures: answers[sha256(pictures.tobytes()).digest()]


def watched_runner(serving: onnx.ModelProto) -> EngineRun:
    """A run of a serving graph on the CPU that also returns the network's map, before anything clips or rounds it."""
    watched = without_weights(serving)
    watched.graph.output.append(onnx.ValueInfoProto(name=_network_output(serving)))
    watched.graph.initializer.extend(serving.graph.initializer)
    serialized = watched.SerializeToString()
    del watched  # gigabytes, which ONNX Runtime is about to copy
    session = open_session(serialized)
    entry = session.get_inputs()[0].name

    def run(images: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[Any]]:
        alpha, maps = session.run(None, {entry: images})
        return np.asarray(alpha), np.asarray(maps)

    return run


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


def compare_core(maps: NDArray[Any], reference_maps: NDArray[Any], config: ServingConfig) -> EngineParity:
    """Compare the maps of a core with those of its reference, both as `run_maps` gives them."""
    tolerance, threshold = (LOGITS_TOLERANCE, 0.0) if config.sigmoid else (CORE_TOLERANCE, 0.5)
    name = "core ONNX vs reference"
    if maps.shape != reference_maps.shape:
        raise ParityError(
            f"FAILED {name}: shapes differ, {maps.shape} and {reference_maps.shape}; nothing was published"
        )
    finite = np.isfinite(maps) & np.isfinite(reference_maps)
    difference, per_row = _map_difference(maps, reference_maps, finite, threshold)
    return _parity(name, "ort-cpu", difference, tolerance, per_row=per_row, not_finite=float(1 - finite.mean()))


def compare_serving(
    serving: EngineRun, reference_maps: NDArray[Any], images: NDArray[np.uint8], config: ServingConfig
) -> EngineParity:
    """Compare the serving graph with the reference and numpy around it, from the same uint8 pictures.

    Args:
        serving: The serving graph.
        reference_maps: What `run_maps` gives for the reference and these pictures.
        images: RGB, [N, H, W, 3] uint8.
        config: What the serving graph was built with.
    """
    theirs = iter(reference_alpha(reference_maps, config))
    return gate_engine(
        serving, lambda _: next(theirs)[None], images, SERVING_TOLERANCE, "ort-cpu", name="serving ONNX vs reference"
    )


def compare_batches(serving: EngineRun, images: NDArray[np.uint8], batch_sizes: Sequence[int]) -> EngineParity:
    """Compare the rows of batches with single runs.

    Args:
        serving: The serving graph.
        images: RGB, [N, H, W, 3] uint8.
        batch_sizes: Batches to try.
    """
    name = f"rows of batches {', '.join(str(size) for size in batch_sizes)} vs single pictures"
    return gate_engine(serving, serving, images, SERVING_TOLERANCE, "ort-cpu", batch_sizes=batch_sizes, name=name)


def normalise(images: NDArray[np.uint8], config: ServingConfig) -> NDArray[np.float32]:
    """Reference pre-processing: [N, H, W, 3] uint8 RGB → [N, 3, H, W] float32, computed in float64."""
    pictures = images.astype(np.float64)
    divisor = np.maximum(pictures.max((1, 2, 3), keepdims=True), 1) if config.numerics == "rembg" else 255.0
    scaled = (pictures / divisor - np.asarray(config.mean)) / np.asarray(config.std)
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
        level = x.clip(0, 1) * 255
        alphas.append((np.floor(level) if config.numerics == "rembg" else np.rint(level)).astype(np.uint8))
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


def alpha_of(run: EngineRun, images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The alphas of a run, [B, H, W] uint8, without the map."""
    return _alpha_and_map(run, images)[0]


def _alpha_and_map(run: EngineRun, images: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[Any] | None]:
    answer = run(images)
    return answer if isinstance(answer, tuple) else (answer, None)


def _network_output(serving: onnx.ModelProto) -> str:
    """Name of the value that the wrap takes from the network; before a sigmoid, which would hide infinity."""
    producers = {name: node for node in serving.graph.node for name in node.output}
    own = [node for node in serving.graph.node if node.name.startswith(WRAP_PREFIX)]
    taken = {name for node in own for name in node.input if name in producers}
    for name in sorted(taken - {name for node in own for name in node.output}):
        while producers[name].op_type in ("Sigmoid", "Cast"):
            name = producers[name].input[0]
        return name
    raise ParityError("this graph was not wrapped by `matteserve export`: its network's output cannot be told")


def _map_difference(
    ours: NDArray[Any], theirs: NDArray[Any], finite: NDArray[np.bool_], threshold: float
) -> tuple[AlphaDifference, list[float]]:
    """`alpha_difference` for maps; what is not finite is left out, its share is a figure of its own."""
    with np.errstate(invalid="ignore"):  # ∞ − ∞
        difference = np.abs(ours.astype(np.float64) - theirs)
    rows = np.where(finite, difference, 0).reshape(len(ours), -1)
    ious, flat = [], 0
    for mine, other in zip(ours, theirs, strict=True):
        mask, reference = mine > threshold, other > threshold
        union = np.count_nonzero(mask | reference)
        ious.append(np.count_nonzero(mask & reference) / union if union else 1.0)
        flat += bool(np.ptp(mine) <= FLAT_RANGE < np.ptp(other))
    means = rows.mean(axis=1)
    figures = AlphaDifference(
        images=len(ours),
        max_abs=float(rows.max()),
        p999_abs=float(np.quantile(rows, 0.999)),
        mean_abs=float(means.mean()) if finite.any() else float("inf"),
        iou=float(min(ious)),
        flat=flat,
        worst=int(np.argmax(means)),
    )
    return figures, means.tolist()


def _parity(
    name: str,
    method: Method,
    difference: AlphaDifference,
    tolerance: AlphaTolerance,
    *,
    per_row: Sequence[float],
    rows: Sequence[int] | None = None,
    batch_sizes: Sequence[int] = (1,),
    not_finite: float | None = None,
) -> EngineParity:
    """Attribute the rows of the batches to their pictures."""
    rows = range(len(per_row)) if rows is None else rows
    per_image = [0.0] * (max(rows) + 1)
    for row, value in zip(rows, per_row, strict=True):
        per_image[row] = max(per_image[row], value)
    return EngineParity(
        name=name,
        method=method,
        images=len(per_image),
        batch_sizes=tuple(batch_sizes),
        difference=dataclasses.replace(difference, worst=rows[difference.worst]),
        tolerance=tolerance,
        not_finite=not_finite,
        per_image=tuple(per_image),
    )
