"""Stage serving ONNX or plan → model repository: the engine's folder and the alias that clients call.

::

    model_repository/
      u2netp/config.pbtxt                    the alias: an ensemble with one step
      u2netp/configs/cpu.pbtxt               the alias where there is no GPU: its step is an ONNX engine
      u2netp/1/.gitkeep                      Triton wants a version folder, git does not keep empty ones
      u2netp_onnx_fp32/config.pbtxt          the engine: batcher, queue, instances, warm-up, contract
      u2netp_onnx_fp32/MODEL_CARD.md         for people; Triton does not look at it
      u2netp_onnx_fp32/configs/cpu.pbtxt     the same with KIND_CPU
      u2netp_onnx_fp32/1/model.onnx
      u2netp_onnx_fp32/1/manifest.json
      u2netp_trt_fp16/config.pbtxt           another engine: CUDA graphs, pinned memory, a warm-up per batch size
      u2netp_trt_fp16/1/model.plan           or model_sm89.plan, model_sm90.plan … where the fleet is mixed
      u2netp_trt_fp16/1/manifest.json

`tritonserver --model-config-name=cpu` reads `configs/cpu.pbtxt` where a model has one, so one repository serves both
kinds of machine.

The folders are written completely elsewhere on the same file system and then renamed, so that a reader finds the old
state or the new one, never half of it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from matteserve_client import INPUT_NAME, OUTPUT_NAME, ModelContract
from matteserve_export._errors import RepositoryError
from matteserve_export._files import digest

__all__ = [
    "DynamicBatching",
    "Engine",
    "GpuOptions",
    "InstanceGroup",
    "alias_config",
    "check_model_name",
    "engine_config",
    "engine_name",
    "model_filename",
    "staging",
    "to_pbtxt",
    "write_model",
]

_MODEL_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
_OWN_FILES = frozenset({"config.pbtxt", "1", "MODEL_CARD.md"})
_CPU_CONFIG = Path("configs", "cpu.pbtxt")
_CPU_ENGINE = "onnx", "fp32"  # what an alias falls back to where there is no GPU
_BACKENDS = {"onnx": "onnxruntime", "trt": "tensorrt", "rtx": "tensorrt_rtx"}


@dataclass(frozen=True)
class DynamicBatching:
    """The engine's dynamic batcher and its queue.

    A bound of the queue, by size or by time, is not the default because of what it costs. Triton then no longer hands
    the next batch to an instance that is still at work, and its batcher thread, if a request arrives in that moment,
    sleeps on for up to half a second before it looks again (seen with Triton 2.51; the condition is
    `support_prefetching_` in its scheduler). `bench/results/README.md` has what that costs. Without a bound, requests
    whose client gave up are still dropped from the queue uncomputed.

    Attributes:
        max_queue_delay_us: How long the first request of a batch waits for others, in microseconds.
        max_queue_size: Requests that may wait; one more is refused at once. 0 sets no bound.
        default_queue_timeout_us: A request that waited this long is refused, in microseconds; a client may ask for less
            or more. 0 sets no bound.
    """

    max_queue_delay_us: int = 2_000
    max_queue_size: int = 0
    default_queue_timeout_us: int = 0

    def __post_init__(self) -> None:
        for name in ("max_queue_delay_us", "max_queue_size", "default_queue_timeout_us"):
            if getattr(self, name) < 0:
                raise RepositoryError(f"dynamic batching: {name} is {getattr(self, name)}, must not be negative")

    @property
    def bounded(self) -> bool:
        """Whether a request may be refused for waiting."""
        return bool(self.max_queue_size or self.default_queue_timeout_us)


@dataclass(frozen=True)
class InstanceGroup:
    """How many copies of the engine run, and where.

    Attributes:
        count: Copies; without a number Triton would start two.
        kind: "KIND_AUTO" takes a GPU where there is one.
    """

    count: int = 1
    kind: Literal["KIND_AUTO", "KIND_CPU", "KIND_GPU"] = "KIND_AUTO"

    def __post_init__(self) -> None:
        if self.count < 1:
            raise RepositoryError(f"instance group: count is {self.count}, must be at least 1")


@dataclass(frozen=True)
class GpuOptions:
    """How a plan's requests reach the GPU. What the batcher does not use costs memory, so each can be switched off.

    Attributes:
        cuda_graphs: Capture one CUDA graph for each batch size in `Engine.batch_sizes`; other sizes run without.
        output_copy_stream: Copy results on a stream of their own, while the next batch computes.
        pinned_memory: Gather inputs and outputs in page-locked memory, from which copies run at full speed.
    """

    cuda_graphs: bool = True
    output_copy_stream: bool = True
    pinned_memory: bool = True


@dataclass(frozen=True)
class Engine:
    """One engine of a model, as the repository stores it.

    Attributes:
        model: Name that clients call; the engine's own name follows from it.
        contract: What a client must know. Its engine kind decides about backend and file name.
        file: The serving graph or the plan. A path is moved into the repository, not read.
        manifest: Provenance and parity figures; written beside it. Where it names the file's size and digest
            (`manifest["file"]`), a file that differs is not published.
        card: Model card in Markdown; none is written if it is empty.
        batching: Dynamic batcher.
        instances: Instance group; None takes one, on the GPU for a plan.
        session_options: Options of ONNX Runtime's session, by the names that Triton's onnxruntime backend reads them.
        gpu: For plans only.
        batch_sizes: Batch sizes to warm up, and to capture CUDA graphs for; 1 is always among them.
        other_plans: For a mixed fleet: plans of the same engine for other GPUs, by compute capability ("8.9"). `file`
            stays the one for every GPU that is not named.
    """

    model: str
    contract: ModelContract
    file: bytes | Path
    manifest: Mapping[str, Any]
    card: str = ""
    batching: DynamicBatching = field(default_factory=DynamicBatching)
    instances: InstanceGroup | None = None
    session_options: Mapping[str, str] = field(default_factory=dict)
    gpu: GpuOptions = field(default_factory=GpuOptions)
    batch_sizes: tuple[int, ...] = (1,)
    other_plans: Mapping[str, Path] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_model_name(self.model)
        if self.contract.engine not in _BACKENDS:
            raise RepositoryError(
                f"no backend serves engine kind {self.contract.engine!r}; allowed are {', '.join(_BACKENDS)}"
            )
        largest = self.contract.max_batch_size
        for batch in self.batch_sizes:
            if not 1 <= batch <= largest:
                raise RepositoryError(f"batch size {batch} to warm up is not between 1 and max_batch_size, {largest}")
        for capability in self.other_plans:
            if self.contract.engine != "trt" or not re.fullmatch(r"\d{1,2}\.\d", capability):
                raise RepositoryError(
                    f"plan for compute capability {capability!r} of engine kind {self.contract.engine!r}: Triton "
                    'chooses among plans of kind trt only, by capabilities such as "8.9"'
                )

    @property
    def name(self) -> str:
        """`<model>_<engine>_<precision>`."""
        return engine_name(self.model, self.contract)

    @property
    def size(self) -> int:
        """Bytes of the file, or files."""
        own = len(self.file) if isinstance(self.file, bytes) else self.file.stat().st_size
        return own + sum(path.stat().st_size for path in self.other_plans.values())


def check_model_name(name: str) -> str:
    """Return a name that is safe as a folder and as a Triton model.

    Raises:
        RepositoryError: It is not.
    """
    if not _MODEL_NAME.fullmatch(name):
        raise RepositoryError(
            f"model name {name!r} is not usable; allowed are 1 to 64 of a-z, 0-9, '_' and '-', a letter or digit first"
        )
    return name


def engine_name(model: str, contract: ModelContract) -> str:
    """Name of the engine that serves `model` with the contract's engine kind and precision."""
    return f"{model}_{contract.engine}_{contract.precision}"


def model_filename(engine: str, compute_capability: str = "") -> str:
    """Name of an engine's file: `model.onnx`, `model.plan`, or `model_sm89.plan` for one GPU of a mixed fleet."""
    suffix = "onnx" if engine == "onnx" else "plan"
    return f"model_sm{compute_capability.replace('.', '')}.{suffix}" if compute_capability else f"model.{suffix}"


def engine_config(engine: Engine, *, cpu: bool = False) -> Any:
    """The engine's `inference.ModelConfig`, or with `cpu` its variant for a machine without a GPU."""
    kind = engine.contract.engine
    config = _base_config(engine.name, engine.contract)
    config.backend = _BACKENDS[kind]
    if kind == "trt":
        config.platform = "tensorrt_plan"
    config.default_model_filename = model_filename(kind)
    for capability in sorted(engine.other_plans):
        config.cc_model_filenames[capability] = model_filename(kind, capability)
    config.version_policy.latest.num_versions = 1
    for key, value in engine.session_options.items():
        config.parameters[key].string_value = value
    instances = engine.instances or InstanceGroup(kind="KIND_AUTO" if kind == "onnx" else "KIND_GPU")
    config.instance_group.add(
        count=instances.count,
        kind=model_config_pb2.ModelInstanceGroup.Kind.Value("KIND_CPU" if cpu else instances.kind),
    )
    _add_batching(config, engine.batching)
    sizes = sorted({1, *engine.batch_sizes})
    if kind != "onnx":
        _add_gpu_options(config, engine.gpu, engine.contract, sizes)
    for batch in sizes:
        # Black pictures: they load the kernels, and capture the CUDA graphs, before the model counts as ready. The
        # first is also what the supervisor's probe sends.
        name = "one_black_image" if batch == 1 else f"{batch}_black_images"
        warmup = config.model_warmup.add(name=name, batch_size=batch, count=1)
        warmup.inputs[INPUT_NAME].data_type = model_config_pb2.TYPE_UINT8
        warmup.inputs[INPUT_NAME].dims.extend(engine.contract.input_shape)
        warmup.inputs[INPUT_NAME].zero_data = True
    return config


def _add_batching(config: Any, batching: DynamicBatching) -> None:
    config.dynamic_batching.max_queue_delay_microseconds = batching.max_queue_delay_us
    if not batching.bounded:
        return
    policy = config.dynamic_batching.default_queue_policy
    policy.timeout_action = model_config_pb2.ModelQueuePolicy.REJECT
    policy.default_timeout_microseconds = batching.default_queue_timeout_us
    policy.allow_timeout_override = batching.default_queue_timeout_us > 0
    policy.max_queue_size = batching.max_queue_size


def _add_gpu_options(config: Any, gpu: GpuOptions, contract: ModelContract, batch_sizes: Sequence[int]) -> None:
    optimization = config.optimization
    optimization.input_pinned_memory.enable = gpu.pinned_memory
    optimization.output_pinned_memory.enable = gpu.pinned_memory
    optimization.cuda.output_copy_stream = gpu.output_copy_stream
    optimization.cuda.graphs = gpu.cuda_graphs
    if gpu.cuda_graphs:
        # Named sizes only, and no lower bounds: a larger graph for a smaller batch would compute rows that nobody set.
        for batch in batch_sizes:
            graph = optimization.cuda.graph_spec.add(batch_size=batch)
            graph.input[INPUT_NAME].dim.extend(contract.input_shape)


def alias_config(engine: Engine, *, cpu: bool = False) -> Any:
    """The alias' `inference.ModelConfig`: an ensemble with one step, the engine, or with `cpu` the ONNX engine."""
    contract = engine.contract
    if cpu:
        kind, precision = _CPU_ENGINE
        contract = replace(contract, engine=kind, precision=precision)
    config = _base_config(engine.model, contract)
    config.platform = "ensemble"
    step = config.ensemble_scheduling.step.add(model_name=engine_name(engine.model, contract), model_version=-1)
    step.input_map[INPUT_NAME] = INPUT_NAME
    step.output_map[OUTPUT_NAME] = OUTPUT_NAME
    return config


def to_pbtxt(config: Any) -> str:
    """A model configuration in protobuf's text format."""
    return str(text_format.MessageToString(config))


def write_model(repository: Path, engine: Engine, *, alias: bool = True) -> tuple[Path, Path]:
    """Write an engine, and its alias; replace what an earlier export or build wrote.

    What else lies in the folders (notes, `configs/` of your own) is kept.

    Args:
        repository: Triton's model repository; made if it does not exist.
        engine: What to write. Files that it names by path are gone afterwards.
        alias: Write the alias, too. Without, clients keep the engine that they have until the alias is switched.

    Returns:
        Folders of the engine and of the alias.

    Raises:
        RepositoryError: A folder of that name belongs to somebody else, the file is not the one that the manifest
            describes, or the disk is full or not writable. The repository is then as it was.
    """
    engine_path, alias_path = repository / engine.name, repository / engine.model
    try:
        repository.mkdir(parents=True, exist_ok=True)
        for path in (engine_path, alias_path) if alias else (engine_path,):
            _refuse_foreign(path)
        with staging(repository) as folder:
            staged_engine = _stage(folder / engine.name, engine_path, engine_config(engine))
            if engine.contract.engine == "onnx":
                _write_cpu_config(staged_engine, engine_config(engine, cpu=True))
            _write_files(engine, staged_engine / "1")
            if engine.card:
                (staged_engine / "MODEL_CARD.md").write_text(engine.card, encoding="utf-8")
            # The engine first: an alias must never point at nothing.
            moves = [(staged_engine, engine_path)]
            if alias:
                staged_alias = _stage(folder / engine.model, alias_path, alias_config(engine))
                _write_cpu_config(staged_alias, alias_config(engine, cpu=True))
                (staged_alias / "1" / ".gitkeep").touch()
                moves.append((staged_alias, alias_path))
            _flush(folder)
            _replace_all(moves, folder)
    except OSError as exc:
        raise RepositoryError(
            f"{repository}: cannot write model {engine.model!r}: {exc.strerror or exc}; the repository is as it was. "
            f"Needed are {_mebibytes(engine)} of disk and the right to write there"
        ) from exc
    return engine_path, alias_path


def _mebibytes(engine: Engine) -> str:
    try:
        return f"{engine.size / 2**20:.0f} MiB"
    except OSError:  # a file that was named by path is not there
        return "the size of the plan"


def _write_files(engine: Engine, folder: Path) -> None:
    """Write or move the engine's files, and the manifest; check them against it."""
    kind = engine.contract.engine
    path = folder / model_filename(kind)
    if isinstance(engine.file, bytes):
        path.write_bytes(engine.file)
    else:
        shutil.move(engine.file, path)  # a rename on the same file system
    for capability, plan in engine.other_plans.items():
        shutil.move(plan, folder / model_filename(kind, capability))
    wanted = engine.manifest.get("file")
    if wanted is not None:
        found = {"name": path.name, "bytes": path.stat().st_size, "sha256": digest(path, "sha256")}
        if found != {key: wanted.get(key) for key in found}:
            raise RepositoryError(
                f"{path.name} of {engine.name} is not the file that its manifest describes: found {found['bytes']} "
                f"bytes, {found['sha256']}, expected {wanted.get('bytes')} bytes, sha256 {wanted.get('sha256')}: "
                "it is cut short, or another engine's; nothing was published. Build it again"
            )
    manifest = json.dumps(engine.manifest, indent=2, sort_keys=True, ensure_ascii=False)
    (folder / "manifest.json").write_text(manifest + "\n", encoding="utf-8")


def _write_cpu_config(staged: Path, config: Any) -> None:
    """Write `configs/cpu.pbtxt`, unless somebody wrote one by hand."""
    path = staged / _CPU_CONFIG
    if path.exists() and not _is_ours(path):
        return
    path.parent.mkdir(exist_ok=True)
    path.write_text(to_pbtxt(config), encoding="utf-8")


def _base_config(name: str, contract: ModelContract) -> Any:
    """What engine and alias have in common: wire format and contract."""
    config = model_config_pb2.ModelConfig(name=name, max_batch_size=contract.max_batch_size)
    config.input.add(name=INPUT_NAME, data_type=model_config_pb2.TYPE_UINT8, dims=contract.input_shape)
    config.output.add(name=OUTPUT_NAME, data_type=model_config_pb2.TYPE_UINT8, dims=contract.input_shape[:2])
    for key, value in contract.to_parameters().items():
        config.parameters[key].string_value = value
    return config


def _refuse_foreign(path: Path) -> None:
    """Raise if the folder exists and was not written by an export."""
    if not path.exists() and not path.is_symlink():
        return
    if path.is_symlink() or not _is_ours(path / "config.pbtxt"):
        raise RepositoryError(
            f"{path} exists and was not written by `matteserve export`; remove it, or choose another name with --name"
        )


def _is_ours(path: Path) -> bool:
    """Whether a configuration carries a contract."""
    config = model_config_pb2.ModelConfig()
    try:
        text_format.Parse(path.read_text(encoding="utf-8"), config)
    except (OSError, UnicodeDecodeError, text_format.ParseError):
        return False
    return any(key.startswith("matteserve.") for key in config.parameters)


@contextmanager
def staging(repository: Path) -> Iterator[Path]:
    """A temporary folder on the repository's file system.

    It lies beside the repository where that is possible, because Triton takes every folder inside for a model.
    """
    parent = repository.resolve().parent
    if parent.stat().st_dev != repository.stat().st_dev or not os.access(parent, os.W_OK):
        parent = repository
    folder = Path(tempfile.mkdtemp(prefix=".matteserve-export-", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _stage(staged: Path, current: Path, config: Any) -> Path:
    """Make a model's folder with its configuration, and with what somebody else put into the current one."""
    (staged / "1").mkdir(parents=True)
    if current.is_dir():
        for child in current.iterdir():
            if child.name in _OWN_FILES:
                continue
            if child.is_dir() and not child.is_symlink():
                shutil.copytree(child, staged / child.name, symlinks=True)
            else:
                shutil.copy2(child, staged / child.name, follow_symlinks=False)
    (staged / "config.pbtxt").write_text(to_pbtxt(config), encoding="utf-8")
    return staged


def _flush(folder: Path) -> None:
    """Force the files to disk, so that a rename that survives a power cut does not point at empty ones."""
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def _replace_all(moves: Sequence[tuple[Path, Path]], aside: Path) -> None:
    """Move staged folders to their places, all of them or none: what was there before comes back after a failure."""
    with ExitStack() as undo:
        for number, (staged, target) in enumerate(moves):
            old = aside / f"old{number}"
            if target.exists():
                target.rename(old)
                undo.callback(old.rename, target)
            staged.rename(target)
            undo.callback(target.rename, staged)
        undo.pop_all()
