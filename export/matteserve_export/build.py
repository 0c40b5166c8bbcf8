"""From the FP32 serving ONNX in a repository to another engine of the same model, top to bottom.

::

    <model>_onnx_fp32 ──► lowered ──► fp16, bf16, int8 ──► gate ──► plan ──► <model>_<engine>_<precision>
                          lowering    precision            compare  engine   repository

Only the engine's own folder is written. Clients keep the engine that their alias points at until `matteserve swap`
switches it, which first runs the new one on the server, on its GPU, and compares it there: a plan for a GPU that is not
at hand cannot be run here, so what the gate judges is the very ONNX that was compiled, and the manifest says by what.
"""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import onnx
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from matteserve_client import AlphaTolerance, ContractError, ModelContract
from matteserve_export._errors import EngineBuildError, OnnxError, RepositoryError
from matteserve_export._files import digest
from matteserve_export.compare import EngineParity, gate_graph, make_scenes
from matteserve_export.engine import CompilerOptions, EngineConfig, Plan, Progress, build_plan, check_machine
from matteserve_export.lowering import lower_deform_conv
from matteserve_export.manifest import build_manifest, onnx_record, read_manifest
from matteserve_export.pictures import read_pictures
from matteserve_export.precision import Precision, check_precision, check_serving, convert, tolerance_for
from matteserve_export.repository import (
    DynamicBatching,
    Engine,
    GpuOptions,
    InstanceGroup,
    check_model_name,
    engine_name,
    model_filename,
    staging,
    write_model,
)
from matteserve_export.serving import load_core
from matteserve_export.sizing import SESSION_OPTIONS, default_batching, giga_macs

__all__ = ["BuildConfig", "BuildResult", "EngineKind", "Preflight", "build_engine", "preflight"]

_LOG = logging.getLogger(__name__)

EngineKind = Literal["onnx", "trt", "rtx"]
_SOURCE = "onnx", "fp32"
_SCENES = 4
_MAX_PICTURES = 64


@dataclass(frozen=True)
class BuildConfig:
    """One build.

    Attributes:
        model_repository: Where the model's FP32 engine is, and where to write.
        model: Name that clients call.
        engine: "onnx", "trt" or "rtx".
        precision: "fp32", "fp16", "bf16" or "int8".
        max_batch_size: Largest batch; None takes the FP32 engine's.
        opt_batch_size: Batch that kernels are chosen for; None takes 4, or the largest if that is less.
        images: Folder with pictures for the gate; None takes made-up ones.
        calibration: Folder with pictures from which int8 learns the ranges.
        lower_deform_conv: For a plan, write `DeformConv` with GridSample. TensorRT has the operator itself, TensorRT
            for RTX has not.
        options: How to compile a plan.
        max_queue_size: Requests that may wait; 0 sets no bound. See `DynamicBatching` for what a bound costs.
        batching: Dynamic batcher; None chooses by the cost of a picture.
        instances: Copies of the engine, on the GPU for a plan.
        gpu: How requests reach the GPU.
    """

    model_repository: Path
    model: str
    engine: EngineKind
    precision: str = "fp16"
    max_batch_size: int | None = None
    opt_batch_size: int | None = None
    images: Path | None = None
    calibration: Path | None = None
    lower_deform_conv: bool = True
    options: CompilerOptions = field(default_factory=CompilerOptions)
    max_queue_size: int = 0
    batching: DynamicBatching | None = None
    instances: int = 1
    gpu: GpuOptions = field(default_factory=GpuOptions)

    def __post_init__(self) -> None:
        check_model_name(self.model)
        check_precision(self.precision)
        if self.engine not in get_args(EngineKind):
            raise EngineBuildError(
                f"there is no engine kind {self.engine!r}; allowed are {', '.join(get_args(EngineKind))}"
            )
        if (self.engine, self.precision) == _SOURCE:
            raise EngineBuildError(
                "the engine onnx in fp32 is what all others are made from; `matteserve export` makes it"
            )
        if self.engine == "onnx" and self.options != CompilerOptions():
            raise EngineBuildError(
                "compiler options are for plans, engine kinds trt and rtx; ONNX Runtime compiles none"
            )
        if self.max_batch_size is not None and not 1 <= self.max_batch_size <= 256:
            raise EngineBuildError(f"max_batch_size is {self.max_batch_size}; allowed are 1 to 256")


@dataclass(frozen=True)
class Preflight:
    """What a build will do, found out without doing it.

    Attributes:
        name: Name of the engine.
        source: Name of the FP32 engine.
        source_path: Its folder.
        source_manifest: Its manifest, as schema 2.
        contract: What the new engine will promise.
        compiler: What will be compiled; None for an ONNX engine.
        tolerance: What the gate will allow.
    """

    name: str
    source: str
    source_path: Path
    source_manifest: dict[str, Any]
    contract: ModelContract
    compiler: EngineConfig | None
    tolerance: AlphaTolerance

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """Batch sizes to warm up."""
        if self.compiler is None:
            return (1,)
        return tuple(sorted({1, self.compiler.opt_batch_size, self.compiler.max_batch_size}))

    def to_dict(self) -> dict[str, Any]:
        """As `--dry-run --json` prints it."""
        compiler = None
        if self.compiler is not None:
            compiler = asdict(self.compiler)
            cache = self.compiler.options.timing_cache
            compiler["options"]["timing_cache"] = None if cache is None else str(cache)
        return {
            "engine": self.name,
            "source": self.source,
            "source_onnx_sha256": self.source_manifest["onnx"]["sha256"],
            "contract": asdict(self.contract),
            "compiler": compiler,
            "tolerance": asdict(self.tolerance),
        }


@dataclass(frozen=True)
class BuildResult:
    """What a build left behind.

    Attributes:
        model: Name that clients call.
        engine: Name of the new engine.
        engine_path: Its folder.
        size: Bytes of its file.
        manifest: What lies beside it.
        parity: The gates that it passed.
        hazards: Known wrong results of the compiler that the network could meet.
        seconds: Duration of the build.
    """

    model: str
    engine: str
    engine_path: Path
    size: int
    manifest: dict[str, Any]
    parity: tuple[EngineParity, ...]
    hazards: tuple[str, ...]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """As `--json` prints it."""
        return {
            "model": self.model,
            "engine": self.engine,
            "engine_path": str(self.engine_path),
            "manifest": self.manifest,
            "hazards": list(self.hazards),
            "seconds": self.seconds,
        }


def preflight(config: BuildConfig) -> Preflight:
    """Find out what a build will do, and everything that would stop it and takes no time to find out.

    Raises:
        RepositoryError: There is no FP32 engine of this model, or it is not whole.
        EngineBuildError: The compiler, its GPU or a compute capability is not to be had, or a batch size is not.
    """
    source, path, manifest, contract = _read_source(config)
    largest = config.max_batch_size or contract.max_batch_size
    if contract.max_batch_size == 1 < largest:
        raise EngineBuildError(
            f"{source} takes single pictures only (its export could not prove that it batches), so max_batch_size "
            f"{largest} is not possible: leave it out"
        )
    contract = replace(contract, engine=config.engine, precision=config.precision, max_batch_size=largest)
    compiler = None
    if config.engine != "onnx":
        opt = config.opt_batch_size or min(4, largest)
        compiler = EngineConfig(config.engine, config.precision, opt, largest, config.options)
        _, _, capabilities = check_machine(compiler)
        options = replace(config.options, compute_capabilities=capabilities)
        compiler = replace(compiler, options=options)
    precision = check_precision(config.precision)
    tolerance = tolerance_for(precision, contract.architecture)
    return Preflight(engine_name(config.model, contract), source, path, manifest, contract, compiler, tolerance)


def build_engine(config: BuildConfig, progress: Progress | None = None) -> BuildResult:
    """Make another engine of a model; publish it as a whole if it passed its gate, or not at all.

    Args:
        config: What to build.
        progress: Called from within the compiler.

    Raises:
        RepositoryError: As `preflight`; or the repository cannot be written.
        OnnxError: The FP32 engine's graph is not a serving graph, or cannot be lowered.
        PrecisionError: It cannot be brought to the precision, or calibration pictures are missing.
        ParityError: The result differs from the FP32 graph by more than the tolerance.
        EngineBuildError: As `preflight`; or the compiler refused the graph.
    """
    started = time.monotonic()
    checked = preflight(config)
    precision = check_precision(config.precision)
    _LOG.info("building %s from %s", checked.name, checked.source)
    serving = load_core(checked.source_path / "1" / "model.onnx")
    size = check_serving(serving)
    if size != (checked.contract.height, checked.contract.width):
        raise OnnxError(
            f"{checked.source}: its graph takes {size[0]}x{size[1]}, its config.pbtxt says {checked.contract.height}x"
            f"{checked.contract.width}; export it again"
        )
    graph, parity = _graph(config, checked, serving, precision)
    del serving
    try:
        with staging(config.model_repository) as folder:
            plan: Plan | None = None
            onnx_path = folder / "model.onnx"
            onnx_path.write_bytes(graph.SerializeToString(deterministic=True))
            record = onnx_record(graph, digest(onnx_path, "sha256"), onnx_path.stat().st_size)
            del graph  # up to a gigabyte that the compiler can use
            file = onnx_path
            if checked.compiler is not None:
                file = folder / "model.plan"
                plan = build_plan(onnx_path, file, checked.compiler, progress)
            manifest = build_manifest(
                model=config.model,
                contract=checked.contract,
                source_engine=checked.source,
                source=checked.source_manifest,
                file=file,
                file_name=model_filename(config.engine),
                compiled=record,
                parity=[gate.to_dict() for gate in parity],
                tolerance=checked.tolerance,
                builder=None if plan is None else plan.builder,
            )
            instances = InstanceGroup(config.instances, "KIND_AUTO" if config.engine == "onnx" else "KIND_GPU")
            contract = checked.contract
            cost = giga_macs(contract.architecture, contract.height, contract.width)
            engine = Engine(
                model=config.model,
                contract=checked.contract,
                file=file,
                manifest=manifest,
                batching=config.batching or default_batching(cost, contract.max_batch_size, config.max_queue_size),
                instances=instances,
                session_options=SESSION_OPTIONS if config.engine == "onnx" else {},
                gpu=config.gpu,
                batch_sizes=checked.batch_sizes,
            )
            engine_path, _ = write_model(config.model_repository, engine, alias=False)
    except OSError as exc:
        raise RepositoryError(
            f"{config.model_repository}: cannot write {checked.name}: {exc.strerror or exc}; nothing was published. "
            "The ONNX and the plan need room beside the repository"
        ) from exc
    return BuildResult(
        model=config.model,
        engine=engine.name,
        engine_path=engine_path,
        size=manifest["file"]["bytes"],
        manifest=manifest,
        parity=parity,
        hazards=() if plan is None else plan.hazards,
        seconds=round(time.monotonic() - started, 1),
    )


def _read_source(config: BuildConfig) -> tuple[str, Path, dict[str, Any], ModelContract]:
    """Name, folder, manifest and contract of the FP32 engine; its file is checked against the manifest."""
    name = "_".join((config.model, *_SOURCE))
    path = config.model_repository / name
    if not (path / "config.pbtxt").is_file():
        others = sorted(folder.name for folder in config.model_repository.glob("*_onnx_fp32"))
        raise RepositoryError(
            f"{config.model_repository} has no {name}, from which the other engines of {config.model!r} are made; "
            f"there are: {', '.join(others) or 'none'}. Make it with `matteserve export`"
        )
    manifest = read_manifest(path)
    try:
        parsed = text_format.Parse((path / "config.pbtxt").read_text(encoding="utf-8"), model_config_pb2.ModelConfig())
        contract = ModelContract.from_config(parsed)
    except (OSError, UnicodeDecodeError, text_format.ParseError, ContractError) as exc:
        raise RepositoryError(f"{path / 'config.pbtxt'} cannot be read: {exc}; export the model again") from exc
    file = path / "1" / "model.onnx"
    found = digest(file, "sha256") if file.is_file() else "no file"
    if found != manifest["file"]["sha256"]:
        raise RepositoryError(
            f"{file} is not the file that its manifest describes (sha256 {found}, expected "
            f"{manifest['file']['sha256']}): cut short or exchanged; export the model again"
        )
    return name, path, manifest, contract


def _graph(
    config: BuildConfig, checked: Preflight, serving: onnx.ModelProto, precision: Precision
) -> tuple[onnx.ModelProto, tuple[EngineParity, ...]]:
    """The graph to serve or to compile, and the gates that it passed against the FP32 one."""
    calibration = None
    if config.calibration is not None:
        calibration = read_pictures(config.calibration, checked.contract)
    images = (
        make_scenes(_SCENES, checked.contract.height, checked.contract.width)
        if config.images is None
        else read_pictures(config.images, checked.contract)
    )
    lowered = serving if config.engine == "onnx" or not config.lower_deform_conv else lower_deform_conv(serving)
    graph = convert(lowered, precision, calibration)
    _LOG.info("comparing with %s on %d pictures", checked.source, len(images))
    gates = gate_graph(
        graph,
        serving,
        images,
        checked.tolerance,
        batch_sizes=(1, 2) if checked.contract.max_batch_size > 1 else (1,),
        name=f"{config.precision} ONNX{'' if config.engine == 'onnx' else f' for {config.engine}'} vs fp32",
    )
    return graph, tuple(gate.require() for gate in gates)
