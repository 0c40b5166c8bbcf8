"""Stage serving ONNX → model repository: the engine's folder and the alias that clients call.

::

    model_repository/
      u2netp/config.pbtxt                    the alias: an ensemble with one step
      u2netp/1/.gitkeep                      Triton wants a version folder, git does not keep empty ones
      u2netp_onnx_fp32/config.pbtxt          the engine: batcher, queue, instances, warm-up, contract
      u2netp_onnx_fp32/MODEL_CARD.md         for people; Triton does not look at it
      u2netp_onnx_fp32/1/model.onnx
      u2netp_onnx_fp32/1/manifest.json

Both folders are written completely elsewhere on the same file system and then renamed, so that a reader finds the old
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from matteserve_client import INPUT_NAME, OUTPUT_NAME, ModelContract
from matteserve_export._errors import RepositoryError

__all__ = [
    "DynamicBatching",
    "Engine",
    "InstanceGroup",
    "alias_config",
    "check_model_name",
    "engine_config",
    "engine_name",
    "to_pbtxt",
    "write_model",
]

_MODEL_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
_OWN_FILES = frozenset({"config.pbtxt", "1", "MODEL_CARD.md"})


@dataclass(frozen=True)
class DynamicBatching:
    """The engine's dynamic batcher and its bounded queue.

    Attributes:
        max_queue_delay_us: How long the first request of a batch waits for others, in microseconds.
        max_queue_size: Requests that may wait; one more is refused at once (back-pressure instead of timeouts).
        default_queue_timeout_us: A request that waited this long is refused, in microseconds; a client may ask for less
            or more. Nobody is left to read an answer by then, so computing it would only delay the others.
    """

    max_queue_delay_us: int = 2_000
    max_queue_size: int = 64
    default_queue_timeout_us: int = 60_000_000

    def __post_init__(self) -> None:
        for name in ("max_queue_delay_us", "max_queue_size", "default_queue_timeout_us"):
            if getattr(self, name) < 0:
                raise RepositoryError(f"dynamic batching: {name} is {getattr(self, name)}, must not be negative")


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
class Engine:
    """One engine of a model, as the repository stores it.

    Attributes:
        model: Name that clients call; the engine's own name follows from it.
        contract: What a client must know.
        onnx: The serving graph, serialized.
        manifest: Provenance and parity figures; written beside the graph.
        card: Model card in Markdown; none is written if it is empty.
        batching: Dynamic batcher.
        instances: Instance group.
        session_options: Options of ONNX Runtime's session, by the names that Triton's onnxruntime backend reads them.
    """

    model: str
    contract: ModelContract
    onnx: bytes
    manifest: Mapping[str, Any]
    card: str = ""
    batching: DynamicBatching = field(default_factory=DynamicBatching)
    instances: InstanceGroup = field(default_factory=InstanceGroup)
    session_options: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_model_name(self.model)

    @property
    def name(self) -> str:
        """`<model>_<engine>_<precision>`."""
        return engine_name(self.model, self.contract)


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


def engine_config(engine: Engine) -> Any:
    """The engine's `inference.ModelConfig`."""
    batching, instances = engine.batching, engine.instances
    config = _base_config(engine.name, engine.contract)
    config.backend = "onnxruntime"
    config.default_model_filename = "model.onnx"
    config.version_policy.latest.num_versions = 1
    for key, value in engine.session_options.items():
        config.parameters[key].string_value = value
    config.instance_group.add(
        count=instances.count, kind=model_config_pb2.ModelInstanceGroup.Kind.Value(instances.kind)
    )
    config.dynamic_batching.max_queue_delay_microseconds = batching.max_queue_delay_us
    policy = config.dynamic_batching.default_queue_policy
    policy.timeout_action = model_config_pb2.ModelQueuePolicy.REJECT
    policy.default_timeout_microseconds = batching.default_queue_timeout_us
    policy.allow_timeout_override = True
    policy.max_queue_size = batching.max_queue_size
    # One black picture: it loads the kernels before the model counts as ready, and the supervisor's probe reads it.
    warmup = config.model_warmup.add(name="one_black_image", batch_size=1, count=1)
    warmup.inputs[INPUT_NAME].data_type = model_config_pb2.TYPE_UINT8
    warmup.inputs[INPUT_NAME].dims.extend(engine.contract.input_shape)
    warmup.inputs[INPUT_NAME].zero_data = True
    return config


def alias_config(engine: Engine) -> Any:
    """The alias' `inference.ModelConfig`: an ensemble with one step, the engine."""
    config = _base_config(engine.model, engine.contract)
    config.platform = "ensemble"
    step = config.ensemble_scheduling.step.add(model_name=engine.name, model_version=-1)
    step.input_map[INPUT_NAME] = INPUT_NAME
    step.output_map[OUTPUT_NAME] = OUTPUT_NAME
    return config


def to_pbtxt(config: Any) -> str:
    """A model configuration in protobuf's text format."""
    return str(text_format.MessageToString(config))


def write_model(repository: Path, engine: Engine) -> tuple[Path, Path]:
    """Write an engine and its alias; replace what an earlier export wrote.

    What else lies in the folders (`configs/` per machine, for example) is kept.

    Args:
        repository: Triton's model repository; made if it does not exist.
        engine: What to write.

    Returns:
        Folders of the engine and of the alias.

    Raises:
        RepositoryError: A folder of that name belongs to somebody else, or the disk is full or not writable. The
            repository is then as it was.
    """
    engine_path, alias_path = repository / engine.name, repository / engine.model
    try:
        repository.mkdir(parents=True, exist_ok=True)
        for path in (engine_path, alias_path):
            _refuse_foreign(path)
        with _staging(repository) as staging:
            staged_engine = _stage(staging / engine.name, engine_path, engine_config(engine))
            (staged_engine / "1" / "model.onnx").write_bytes(engine.onnx)
            manifest = json.dumps(engine.manifest, indent=2, sort_keys=True, ensure_ascii=False)
            (staged_engine / "1" / "manifest.json").write_text(manifest + "\n", encoding="utf-8")
            if engine.card:
                (staged_engine / "MODEL_CARD.md").write_text(engine.card, encoding="utf-8")
            staged_alias = _stage(staging / engine.model, alias_path, alias_config(engine))
            (staged_alias / "1" / ".gitkeep").touch()
            _flush(staging)
            # The engine first: an alias must never point at nothing.
            _replace_all([(staged_engine, engine_path), (staged_alias, alias_path)], staging)
    except OSError as exc:
        raise RepositoryError(
            f"{repository}: cannot write model {engine.model!r}: {exc.strerror or exc}; the repository is as it was. "
            f"Needed are {len(engine.onnx) / 2**20:.0f} MiB of disk and the right to write there"
        ) from exc
    return engine_path, alias_path


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
    config = model_config_pb2.ModelConfig()
    try:
        text_format.Parse((path / "config.pbtxt").read_text(encoding="utf-8"), config)
    except (OSError, UnicodeDecodeError, text_format.ParseError):
        config.Clear()
    if path.is_symlink() or not any(key.startswith("matteserve.") for key in config.parameters):
        raise RepositoryError(
            f"{path} exists and was not written by `matteserve export`; remove it, or choose another name with --name"
        )


@contextmanager
def _staging(repository: Path) -> Iterator[Path]:
    """A temporary folder on the repository's file system.

    It lies beside the repository where that is possible, because Triton takes every folder inside for a model.
    """
    parent = repository.resolve().parent
    if parent.stat().st_dev != repository.stat().st_dev or not os.access(parent, os.W_OK):
        parent = repository
    staging = Path(tempfile.mkdtemp(prefix=".matteserve-export-", dir=parent))
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


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


def _replace_all(moves: Sequence[tuple[Path, Path]], staging: Path) -> None:
    """Move staged folders to their places, all of them or none: what was there before comes back after a failure."""
    with ExitStack() as undo:
        for number, (staged, target) in enumerate(moves):
            old = staging / f"old{number}"
            if target.exists():
                target.rename(old)
                undo.callback(old.rename, target)
            staged.rename(target)
            undo.callback(target.rename, staged)
        undo.pop_all()
