"""The whole way from weights to a model repository, top to bottom."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from matteserve_client import ModelContract
from matteserve_export._errors import ExportError
from matteserve_export._files import digest
from matteserve_export._session import Runner, make_runner
from matteserve_export.checkpoints import load_into, read_state_dict
from matteserve_export.compare import (
    EngineParity,
    compare_batches,
    compare_core,
    compare_serving,
    make_scenes,
    run_maps,
    watched_runner,
)
from matteserve_export.manifest import export_manifest
from matteserve_export.models import MODEL_BUILDERS, build_model
from matteserve_export.precision import tolerance_for
from matteserve_export.repository import DynamicBatching, Engine, InstanceGroup, check_model_name, write_model
from matteserve_export.serving import Core, ServingConfig, build_serving, load_core, prepare_core
from matteserve_export.to_onnx import ToOnnxConfig, export_core
from matteserve_export.weights import SourceKind, Weights

__all__ = ["ExportConfig", "ExportResult", "export_model"]

_LOG = logging.getLogger(__name__)
_SCENES = 4


@dataclass(frozen=True)
class ExportConfig:
    """One export.

    Attributes:
        weights: Entry of the registry: normalisation, post-processing, licence.
        kind: What `path` is: "checkpoint" or "onnx".
        path: File with the weights.
        model_repository: Where to write.
        model: Name that clients will call.
        size: (height, width); None takes the weights' own.
        max_batch_size: Largest batch of the engine.
        opset: ONNX operator set of an exported network.
        batching: Dynamic batcher.
        instances: Instance group.
    """

    weights: Weights
    kind: SourceKind
    path: Path
    model_repository: Path
    model: str
    size: tuple[int, int] | None = None
    max_batch_size: int = 8
    opset: int = 17
    batching: DynamicBatching = field(default_factory=DynamicBatching)
    instances: InstanceGroup = field(default_factory=InstanceGroup)

    def __post_init__(self) -> None:
        check_model_name(self.model)
        if not 1 <= self.max_batch_size <= 256:
            raise ExportError(f"max_batch_size is {self.max_batch_size}; allowed are 1 to 256")
        multiple = self.weights.size_multiple
        for side in self.size or ():
            if side < multiple or side > 4096 or side % multiple:
                height, width = self.size or (0, 0)
                raise ExportError(
                    f"size {height}x{width} is not usable for {self.weights.name}: height and width must be multiples "
                    f"of {multiple}, from {multiple} to 4096"
                )


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
    contract: ModelContract
    parity: tuple[EngineParity, ...]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """As `--json` prints it."""
        return {
            **{key: getattr(self, key) for key in ("model", "engine", "onnx_sha256", "onnx_bytes", "seconds")},
            "engine_path": str(self.engine_path),
            "alias_path": str(self.alias_path),
            "contract": asdict(self.contract),
            "parity": [comparison.to_dict() for comparison in self.parity],
        }


def export_model(config: ExportConfig) -> ExportResult:
    """Make a servable model from weights; publish it only if every gate passed.

    Raises:
        CheckpointError: The checkpoint cannot be read or does not fit.
        OnnxError: The ONNX cannot be read, made or wrapped.
        ParityError: A stage differs from the stage before it; nothing was published.
        RepositoryError: The repository cannot be written.
    """
    started = time.monotonic()
    weights = config.weights
    _LOG.info("exporting %s from %s", config.model, config.path)
    wrap = ServingConfig(weights.mean, weights.std, sigmoid=weights.sigmoid, min_max=weights.min_max)

    core, reference = _core_from_checkpoint(config) if config.kind == "checkpoint" else _core_from_onnx(config)
    max_batch_size = config.max_batch_size if core.batched else 1
    serving = build_serving(core, wrap)

    scenes = make_scenes(max(_SCENES, min(max_batch_size, 8)), core.height, core.width)
    parity = _gates(core, serving, reference, scenes, wrap, max_batch_size)

    licence = _licence(config)
    contract = ModelContract(
        height=core.height,
        width=core.width,
        max_batch_size=max_batch_size,
        resample=weights.resample,
        alpha_resample=weights.alpha_resample,
        architecture=weights.architecture,
        weights=weights.name,
        weights_sha256=digest(config.path, "sha256"),
        weights_licence=licence,
    )
    serialized = serving.SerializeToString(deterministic=True)
    engine = Engine(
        model=config.model,
        contract=contract,
        file=serialized,
        manifest=export_manifest(
            model=config.model,
            contract=contract,
            weights=weights,
            kind=config.kind,
            weights_file=config.path.name,
            serving=serving,
            serialized=serialized,
            parity=[comparison.to_dict() for comparison in parity],
            tolerance=tolerance_for("fp32", weights.architecture),
        ),
        batching=config.batching,
        instances=config.instances,
    )
    engine_path, alias_path = write_model(config.model_repository, engine)
    return ExportResult(
        model=engine.model,
        engine=engine.name,
        engine_path=engine_path,
        alias_path=alias_path,
        onnx_sha256=sha256(serialized).hexdigest(),
        onnx_bytes=len(serialized),
        contract=contract,
        parity=parity,
        seconds=round(time.monotonic() - started, 1),
    )


def _core_from_checkpoint(config: ExportConfig) -> tuple[Core, Runner]:
    """Checkpoint → torch → core ONNX; the reference is the torch network."""
    weights = config.weights
    if weights.architecture not in MODEL_BUILDERS:
        raise ExportError(
            f"{weights.name}: there is no torch code for the architecture {weights.architecture!r} here; export its "
            "ONNX with --onnx"
        )
    model = build_model(weights.architecture, **weights.options)
    load_into(model, read_state_dict(config.path), weights.training_only)
    height, width = config.size or weights.input_size
    if (height, width) != weights.input_size:
        trained_height, trained_width = weights.input_size
        _LOG.warning(
            "%s was trained at %dx%d; at %dx%d it sees objects at another scale than it learned, look at the result",
            *(weights.name, trained_height, trained_width, height, width),
        )
    output_name = "logits" if weights.sigmoid else "probability"
    core = export_core(model, ToOnnxConfig(height, width, output_name, config.opset))

    def reference(pixel_values: NDArray[Any]) -> NDArray[Any]:
        with torch.inference_mode():
            return np.asarray(model(torch.from_numpy(pixel_values)))

    return Core(core, height, width, batched=True), reference


def _core_from_onnx(config: ExportConfig) -> tuple[Core, Runner]:
    """Public float ONNX → core ONNX; the reference is the file as it came, picture by picture."""
    original = load_core(config.path)
    core = prepare_core(original, config.size)
    return core, make_runner(original)


def _gates(
    core: Core,
    serving: onnx.ModelProto,
    reference: Runner,
    scenes: NDArray[np.uint8],
    wrap: ServingConfig,
    max_batch_size: int,
) -> tuple[EngineParity, ...]:
    """Compare every stage with the one before; raise at the first that fails."""
    images = scenes[:_SCENES]
    _LOG.info("comparing with the reference on %d pictures, and batches with single pictures", len(images))
    reference_maps = run_maps(reference, images, wrap)
    run_serving = watched_runner(serving)
    parity = [
        compare_core(run_maps(make_runner(core.model), images, wrap), reference_maps, wrap).require(),
        compare_serving(run_serving, reference_maps, images, wrap).require(),
    ]
    if max_batch_size > 1:
        sizes = range(1, min(max_batch_size, 8) + 1)
        parity.append(compare_batches(run_serving, scenes, sizes).require())
    return tuple(parity)


def _licence(config: ExportConfig) -> str:
    """The weights' licence; "unknown" if the file is shown to be another one than the registry's."""
    weights = config.weights
    source = weights.source(config.kind)
    for algorithm in ("sha256", "md5"):
        expected = getattr(source, algorithm, None)
        if expected is not None:
            if digest(config.path, algorithm) == expected:
                return weights.weights_licence
            _LOG.warning("%s is not the released %s: its licence is recorded as unknown", config.path, weights.name)
            return "unknown"
    return weights.weights_licence
