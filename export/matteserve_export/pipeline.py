"""The whole way from weights to a model repository, top to bottom.

What a stage no longer needs is let go before the next one begins: the torch network before ONNX Runtime starts, each
session before the next. A network of a gigabyte is then in memory once or twice, not five times.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from matteserve_client import ModelContract
from matteserve_client._contract import Numerics
from matteserve_export._errors import ExportError, RepositoryError
from matteserve_export._files import digest
from matteserve_export._session import make_runner
from matteserve_export.checkpoints import load_into, read_state_dict
from matteserve_export.compare import (
    EngineParity,
    EngineRun,
    compare_batches,
    compare_core,
    compare_serving,
    make_scenes,
    run_maps,
    watched_runner,
)
from matteserve_export.manifest import export_manifest, onnx_record
from matteserve_export.model_card import model_card
from matteserve_export.models import MODEL_BUILDERS, TRAINING_ONLY, build_model
from matteserve_export.models.birefnet import convert_patch_order
from matteserve_export.precision import tolerance_for
from matteserve_export.repository import DynamicBatching, Engine, InstanceGroup, check_model_name, write_model
from matteserve_export.serving import Core, ServingConfig, build_serving, load_core, prepare_core
from matteserve_export.sizing import (
    SESSION_OPTIONS,
    GatePlan,
    default_batch_size,
    default_batching,
    gate_plan,
    giga_macs,
)
from matteserve_export.to_onnx import ToOnnxConfig, count_nodes, export_core
from matteserve_export.weights import PatchOrder, Weights

__all__ = ["ExportConfig", "ExportResult", "InputKind", "export_model"]

_LOG = logging.getLogger(__name__)
_CONFORMANCE_SEED = 0

InputKind = Literal["checkpoint", "onnx", "conformance"]


@dataclass(frozen=True)
class ExportConfig:
    """One export.

    Attributes:
        weights: Entry of the registry: normalisation, post-processing, licence.
        kind: What `path` is: "checkpoint" or "onnx"; "conformance" takes no file but weights that follow from the
            entries' names, to try a model out without a checkpoint.
        path: File with the weights; None for "conformance".
        model_repository: Where to write.
        model: Name that clients will call.
        size: (height, width); None takes the weights' own.
        max_batch_size: Largest batch of the engine; None chooses by the cost of a picture.
        opset: ONNX operator set of an exported network; None takes the exporter's.
        patch_order: BiRefNet checkpoints: overrides what the registry records.
        numerics: Whose pre- and post-processing: "reference", of the weights' authors, or "rembg".
        accept_non_commercial: Weights whose licence forbids commercial use are refused without it.
        max_queue_size: Requests that may wait; 0 sets no bound. See `DynamicBatching` for what a bound costs.
        batching: Dynamic batcher; None chooses by the cost of a picture.
        instances: Instance group; None takes one.
    """

    weights: Weights
    kind: InputKind
    path: Path | None
    model_repository: Path
    model: str
    size: tuple[int, int] | None = None
    max_batch_size: int | None = None
    opset: int | None = None
    patch_order: PatchOrder | None = None
    numerics: Numerics = "reference"
    accept_non_commercial: bool = False
    max_queue_size: int = 0
    batching: DynamicBatching | None = None
    instances: InstanceGroup | None = None

    def __post_init__(self) -> None:
        check_model_name(self.model)
        if (self.path is None) != (self.kind == "conformance"):
            raise ExportError(f"kind {self.kind!r} and path {self.path} do not go together")
        if self.max_batch_size is not None and not 1 <= self.max_batch_size <= 256:
            raise ExportError(f"max_batch_size is {self.max_batch_size}; allowed are 1 to 256")
        multiple = self.weights.size_multiple
        for side in self.size or ():
            if side < multiple or side > 4096 or side % multiple:
                height, width = self.size or (0, 0)
                raise ExportError(
                    f"size {height}x{width} is not usable for {self.weights.name}: height and width must be multiples "
                    f"of {multiple}, from {multiple} to 4096"
                )
        self.weights.require_acceptance(self.accept_non_commercial)
        if self.patch_order is not None and (self.kind == "onnx" or not self.weights.has_patch_order):
            why = "an ONNX has it built in" if self.kind == "onnx" else "only BiRefNet has one"
            raise ExportError(f"{self.weights.name}: no patch order can be chosen here: {why}")

    @property
    def wanted_size(self) -> tuple[int, int]:
        """(height, width) of the export."""
        return self.size or self.weights.input_size


@dataclass(frozen=True)
class ExportResult:
    """What an export left behind.

    Attributes:
        model: Name that clients call.
        engine: Name of the engine behind it.
        engine_path: Folder of the engine.
        alias_path: Folder of the alias.
        onnx_sha256: Hex digest of the serving graph.
        onnx_bytes: Size of the serving graph.
        nodes: Number of nodes of the serving graph by operator, the most frequent first.
        giga_macs: Multiply-accumulate operations of one picture, in units of 1e9.
        contract: What the repository promises to clients.
        parity: The gates that it passed.
        seconds: Duration of the export.
    """

    model: str
    engine: str
    engine_path: Path
    alias_path: Path
    onnx_sha256: str
    onnx_bytes: int
    nodes: Mapping[str, int]
    giga_macs: float
    contract: ModelContract
    parity: tuple[EngineParity, ...]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """As `--json` prints it."""
        plain = ("model", "engine", "onnx_sha256", "onnx_bytes", "giga_macs", "seconds")
        return {
            **{key: getattr(self, key) for key in plain},
            "nodes": dict(self.nodes),
            "engine_path": str(self.engine_path),
            "alias_path": str(self.alias_path),
            "contract": asdict(self.contract),
            "parity": [comparison.to_dict() for comparison in self.parity],
        }


@dataclass(frozen=True)
class _Graph:
    """A core ONNX and what it must reproduce."""

    core: Core
    max_batch_size: int
    plan: GatePlan
    scenes: NDArray[np.uint8]
    reference_maps: NDArray[Any]


def export_model(config: ExportConfig) -> ExportResult:
    """Make a servable model from weights; publish it only if every gate passed.

    Raises:
        CheckpointError: The checkpoint cannot be read or does not fit.
        OnnxError: The ONNX cannot be read, made or wrapped.
        ParityError: A stage differs from the stage before it; nothing was published.
        RepositoryError: The repository cannot be written.
    """
    started = time.monotonic()
    config = replace(config, weights=config.weights.with_numerics(config.numerics))
    weights = config.weights
    _LOG.info("exporting %s from %s", config.model, config.path or "random weights")
    wrap = ServingConfig(
        weights.mean, weights.std, sigmoid=weights.sigmoid, min_max=weights.min_max, numerics=config.numerics
    )

    if config.kind == "onnx" and config.path is not None:
        graph = _from_onnx(config, config.path, wrap)
    else:
        graph = _from_torch(config, wrap)
    gc.collect()
    core, max_batch_size = graph.core, graph.max_batch_size
    contract = _contract(config, core, max_batch_size)
    plan, scenes, reference_maps = graph.plan, graph.scenes, graph.reference_maps
    images = scenes[: plan.scenes]
    _LOG.info("comparing with the reference on %d pictures", plan.scenes)
    parity = [compare_core(run_maps(make_runner(core.model), images, wrap), reference_maps, wrap).require()]
    serving = build_serving(core, wrap)
    del graph, core
    nodes = dict(count_nodes(serving).most_common())
    serialized = serving.SerializeToString(deterministic=True)
    onnx_sha256 = sha256(serialized).hexdigest()
    record = {**onnx_record(serving, onnx_sha256, len(serialized)), "nodes_by_type": nodes}
    run_serving = _remembering(watched_runner(serving))
    del serving
    parity.append(compare_serving(run_serving, reference_maps, images, wrap).require())
    if plan.batch_sizes:
        _LOG.info("comparing batches of %s with single pictures", ", ".join(map(str, plan.batch_sizes)))
        parity.append(compare_batches(run_serving, scenes, plan.batch_sizes).require())
    del run_serving

    cost = giga_macs(weights.architecture, contract.height, contract.width)
    manifest = _manifest(config, contract, record, cost, parity)
    engine = Engine(
        model=config.model,
        contract=contract,
        file=serialized,
        manifest=manifest,
        card=model_card(manifest, weights),
        batching=config.batching or default_batching(cost, max_batch_size, config.max_queue_size),
        instances=config.instances,
        session_options=SESSION_OPTIONS,
    )
    engine_path, alias_path = write_model(config.model_repository, engine)
    return ExportResult(
        model=engine.model,
        engine=engine.name,
        engine_path=engine_path,
        alias_path=alias_path,
        onnx_sha256=onnx_sha256,
        onnx_bytes=len(serialized),
        nodes=nodes,
        giga_macs=round(cost, 1),
        contract=contract,
        parity=tuple(parity),
        seconds=round(time.monotonic() - started, 1),
    )


def _from_torch(config: ExportConfig, wrap: ServingConfig) -> _Graph:
    """Checkpoint → torch → core ONNX; the reference is the torch network."""
    weights, (height, width) = config.weights, config.wanted_size
    model = _load(config)
    _check_room(config.model_repository, sum(tensor.nbytes for tensor in model.state_dict().values()))
    if config.kind == "checkpoint":
        _warn_about_size(weights, height, width)
    max_batch_size, plan = _plan(config, height, width)
    scenes = make_scenes(plan.pictures, height, width)

    def reference(pixel_values: NDArray[Any]) -> NDArray[Any]:
        with torch.inference_mode():
            return np.asarray(model(torch.from_numpy(pixel_values)))

    _LOG.info("running the torch network on %d pictures", plan.scenes)
    reference_maps = run_maps(reference, scenes[: plan.scenes], wrap)
    options: dict[str, Any] = {"output_name": "logits" if weights.sigmoid else "probability"}
    if config.opset is not None:
        options["opset"] = config.opset
    core = export_core(model, ToOnnxConfig(height, width, **options))
    return _Graph(Core(core, height, width, batched=True), max_batch_size, plan, scenes, reference_maps)


def _load(config: ExportConfig) -> torch.nn.Module:
    """Build the architecture and fill it, image patches in the current order."""
    weights = config.weights
    if weights.architecture not in MODEL_BUILDERS:
        raise ExportError(
            f"{weights.name}: there is no torch code for the architecture {weights.architecture!r} here; export its "
            "ONNX with --onnx"
        )
    model = build_model(weights.architecture, **weights.options)
    if config.path is None:
        from matteserve_export.conformance import fill_module

        fill_module(model, _CONFORMANCE_SEED)
        return model
    order = _patch_order(config)
    state = read_state_dict(config.path)
    if order is not None:
        _LOG.info("patch order of the checkpoint: %s (%s)", order, _basis(config))
        with contextlib.suppress(ValueError):  # not a BiRefNet at all: load_into will say what it is
            state = convert_patch_order(state, source=order, target="current")
    load_into(model, state, TRAINING_ONLY.get(weights.architecture, ()))
    return model


def _patch_order(config: ExportConfig) -> PatchOrder | None:
    """The order in which the checkpoint expects image patches; None for an architecture without them."""
    weights = config.weights
    if not weights.has_patch_order or config.kind != "checkpoint":
        return None
    order = config.patch_order or weights.patch_order
    if order is None:
        raise ExportError(
            f"{weights.name}: in which order these weights expect their image patches is not known "
            f"({weights.patch_order_basis}); choose with --patch-order current or --patch-order legacy, and compare "
            "both on a picture: the wrong one fails nowhere but makes the mask worse"
        )
    return order


def _basis(config: ExportConfig) -> str:
    return "as chosen" if config.patch_order is not None else config.weights.patch_order_basis


def _from_onnx(config: ExportConfig, path: Path, wrap: ServingConfig) -> _Graph:
    """Public float ONNX → core ONNX; the reference is the file as it came, picture by picture."""
    original = load_core(path)
    _check_room(config.model_repository, path.stat().st_size)
    wanted = config.max_batch_size or default_batch_size(giga_macs(config.weights.architecture, *config.wanted_size))
    core = prepare_core(original, config.size, try_batch=wanted > 1)
    max_batch_size, plan = _plan(config, core.height, core.width) if core.batched else (1, GatePlan(2, ()))
    scenes = make_scenes(plan.pictures, core.height, core.width)
    reference_maps = run_maps(make_runner(original), scenes[: plan.scenes], wrap)
    return _Graph(core, max_batch_size, plan, scenes, reference_maps)


def _plan(config: ExportConfig, height: int, width: int) -> tuple[int, GatePlan]:
    """Largest batch, and what is compared."""
    cost = giga_macs(config.weights.architecture, height, width)
    max_batch_size = config.max_batch_size or default_batch_size(cost)
    return max_batch_size, gate_plan(cost, max_batch_size)


def _warn_about_size(weights: Weights, height: int, width: int) -> None:
    """Say what to expect if the size is far from what the weights were trained at."""
    if weights.size_range is not None:
        low, high = weights.size_range
        if low <= min(height, width) and max(height, width) <= high:
            return
        trained = f"at sizes from {low} to {high}"
    else:
        trained_height, trained_width = weights.input_size
        if abs(height / trained_height - 1) <= 1 / 8 and abs(width / trained_width - 1) <= 1 / 8:
            return
        trained = f"at {trained_height}x{trained_width}"
    effect = f" ({weights.size_effect})" if weights.size_effect else ""
    _LOG.warning(
        "%s was trained %s; at %dx%d it sees objects at another scale than it learned%s: look at the result",
        *(weights.name, trained, height, width, effect),
    )


def _check_room(repository: Path, graph_bytes: int) -> None:
    """Refuse before the work starts, not after minutes, if the graph will not fit on the disk."""
    existing = next(path for path in (repository, *repository.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < graph_bytes * 1.1:
        raise RepositoryError(
            f"{repository}: no room for the model: it needs about {graph_bytes * 1.1 / 2**20:.0f} MiB, free are "
            f"{free / 2**20:.0f} MiB; make room, or choose another place with --model-repository"
        )


def _remembering(run: EngineRun) -> EngineRun:
    """The same, but a single picture is run once, however many comparisons ask for it."""
    known: dict[bytes, Any] = {}

    def remembered(pictures: NDArray[np.uint8]) -> Any:
        if len(pictures) != 1:
            return run(pictures)
        key = sha256(pictures.tobytes()).digest()
        if key not in known:
            known[key] = run(pictures)
        return known[key]

    return remembered


def _contract(config: ExportConfig, core: Core, max_batch_size: int) -> ModelContract:
    weights = config.weights
    return ModelContract(
        height=core.height,
        width=core.width,
        max_batch_size=max_batch_size,
        resample=weights.resample,
        alpha_resample=weights.alpha_resample,
        architecture=weights.architecture,
        weights=weights.name if config.path is not None else "random",
        weights_sha256=digest(config.path, "sha256") if config.path is not None else "",
        weights_licence=_licence(config),
        numerics=config.numerics,
    )


def _licence(config: ExportConfig) -> str:
    """The weights' licence; "unknown" if the file is shown to be another one than those of the registry."""
    weights, path = config.weights, config.path
    if path is None:
        return "none"
    candidates = [source for source in weights.sources if Path(source.file_name).suffix == path.suffix]
    for source in candidates:
        expected = source.sha256 or source.md5
        if expected is None or digest(path, "sha256" if source.sha256 else "md5") == expected:
            return weights.weights_licence
    _LOG.warning("%s is not the released %s: its licence is recorded as unknown", path, weights.name)
    return "unknown"


def _manifest(
    config: ExportConfig,
    contract: ModelContract,
    record: Mapping[str, Any],
    cost: float,
    parity: list[EngineParity],
) -> dict[str, Any]:
    weights, order = config.weights, _patch_order(config)
    manifest = export_manifest(
        model=config.model,
        contract=contract,
        weights=weights,
        kind=config.kind,
        weights_file=config.path.name if config.path is not None else None,
        record=record,
        parity=[comparison.to_dict() for comparison in parity],
        tolerance=tolerance_for("fp32", weights.architecture),
    )
    if order is not None:
        # The graph always has the current order; this is what the checkpoint was read as.
        manifest["weights"] |= {"patch_order": order, "patch_order_basis": _basis(config)}
    manifest["giga_macs"] = round(cost, 1)
    return manifest
