"""What this machine can serve, and what not: everything that `matteserve serve` would trip over, asked beforehand."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tritonclient.grpc import model_config_pb2

from matteserve_server import shared_memory
from matteserve_server._errors import ResourceError, ServerError
from matteserve_server.alias import target_of
from matteserve_server.binary import WHEEL, WHEEL_VERSION, TritonBinary, find_tritonserver
from matteserve_server.machine import this_machine
from matteserve_server.plan_backend.fit import INSTALL, Machine
from matteserve_server.ports import check_port
from matteserve_server.repository import Repository, RepositoryModel

State = Literal["ok", "note", "problem"]

# The wheel does not say which server is in it, and that server does not know `--version`.
_WHEEL_TRITON = {"0.7.0": "2.51.0"}
_MEBIBYTE = 1 << 20


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        area: What it is about, e.g. "gpu".
        state: "ok"; "note" for what is missing but not needed; "problem" for what stops `matteserve serve`.
        text: What was found.
    """

    area: str
    state: State
    text: str


def examine(repository: Path, *, ports: Sequence[int] = (8001, 8002), machine: Machine | None = None) -> list[Finding]:
    """Look at this machine and a repository.

    Args:
        repository: Model repository that is to be served.
        ports: What `matteserve serve` would listen on.
        machine: What the engines are held against; None looks.
    """
    binary, triton = _triton()
    if machine is None:
        machine = this_machine(native_backends=_is_native(binary))
    onnxruntime, providers = _onnxruntime(binary)
    return [
        Finding("python", "ok", f"{platform.python_version()} at {sys.executable}, numpy {_version('numpy')}"),
        triton,
        *_gpus(machine),
        *onnxruntime,
        *_plan_libraries(machine, binary),
        *_ports(ports),
        *_repository(repository, binary, machine, providers),
    ]


def _is_native(binary: TritonBinary | None) -> bool:
    """Whether the server is NVIDIA's own, whose backends need nothing of this Python environment."""
    return binary is not None and binary.wheel_root is None


def _triton() -> tuple[TritonBinary | None, Finding]:
    try:
        binary = find_tritonserver()
        if binary.wheel_root is None:
            version_file = binary.executable.parents[1] / "TRITON_VERSION"
            version = version_file.read_text().strip() if version_file.is_file() else "version unknown"
        else:
            binary.stub()
            version = _WHEEL_TRITON.get(WHEEL_VERSION, f"of {WHEEL} {WHEEL_VERSION}")
    except ServerError as exc:
        return None, Finding("triton", "problem", str(exc))
    return binary, Finding("triton", "ok", f"{version} at {binary.executable} ({binary.source})")


def _gpus(machine: Machine) -> Iterator[Finding]:
    for gpu in machine.gpus:
        memory = f", {gpu.memory_bytes / (1 << 30):.0f} GiB" if gpu.memory_bytes else ""
        cuda = f", CUDA up to {machine.cuda}" if machine.cuda else ""
        yield Finding(
            "gpu",
            "ok",
            f"{gpu.name}, compute capability {gpu.compute_capability}{memory}, driver {machine.driver}{cuda}",
        )
    if not machine.gpus:
        yield Finding("gpu", "note", "no NVIDIA GPU that its driver shows; ONNX engines run on the CPU")


def _onnxruntime(binary: TritonBinary | None) -> tuple[list[Finding], list[str]]:
    if _is_native(binary):
        text = "Triton's own backend"
        return [Finding("onnxruntime", "ok", text)], ["CPUExecutionProvider", "CUDAExecutionProvider"]
    try:
        import onnxruntime
    except ImportError as exc:
        advice = "pip install 'matteserve[server]'"
        return [Finding("onnxruntime", "problem", f"{exc}; the embedded server needs it: {advice}")], []
    providers = list(onnxruntime.get_available_providers())
    findings = [Finding("onnxruntime", "ok", f"{onnxruntime.__version__}, {', '.join(providers)}")]
    if len(installed := [name for name in ("onnxruntime", "onnxruntime-gpu") if _version(name)]) > 1:
        text = f"{' and '.join(installed)} are both installed and share one module; uninstall one of them"
        findings.append(Finding("onnxruntime", "note", text))
    return findings, providers


def _plan_libraries(machine: Machine, binary: TritonBinary | None) -> Iterator[Finding]:
    for name, version in (("tensorrt", machine.tensorrt), ("tensorrt_rtx", machine.tensorrt_rtx)):
        if version is None:
            yield Finding(name, "note", f"not installed, its plans cannot be served ({INSTALL[name]})")
        elif _is_native(binary):
            yield Finding(name, "ok", version)
        elif bindings := _version("cuda-bindings"):
            yield Finding(name, "ok", f"{version}, cuda-bindings {bindings}")
        else:
            yield Finding(name, "note", f"{version}, but without cuda-bindings the embedded server cannot use it")


def _ports(ports: Sequence[int]) -> Iterator[Finding]:
    for port in ports:
        try:
            check_port("127.0.0.1", port, "another port")
            yield Finding("port", "ok", f"{port} is free")
        except ResourceError:
            yield Finding("port", "problem", f"{port} is taken; is a server running? Choose another one for the next")


def _repository(
    path: Path, binary: TritonBinary | None, machine: Machine, providers: Sequence[str]
) -> Iterator[Finding]:
    try:
        repository = Repository.read(path)
        repository.check(repository.default_models())
        needed = repository.engines_of(repository.default_models())
    except ServerError as exc:
        yield Finding("models", "problem", str(exc))
        return
    yield from _shared_memory(needed, binary)
    for name, model in repository.models.items():
        if model.is_alias:
            target = target_of(model.config) if len(model.steps) == 1 else ", ".join(model.steps)
            yield Finding("models", "ok", f"{name} points at {target}")
        elif reason := _unfit(repository, model, machine, providers):
            # An engine that no alias needs stops nobody.
            yield Finding("models", "problem" if model in needed else "note", reason)
        else:
            yield Finding("models", "ok", f"{name} can be served here")


def _unfit(repository: Repository, engine: RepositoryModel, machine: Machine, providers: Sequence[str]) -> str:
    try:
        repository.check([engine.name], machine)
    except ServerError as exc:
        return str(exc)
    on_gpu = any(group.kind == model_config_pb2.ModelInstanceGroup.KIND_GPU for group in engine.config.instance_group)
    if engine.config.backend == "onnxruntime" and on_gpu and "CUDAExecutionProvider" not in providers:
        return (
            f"engine {engine.name!r} asks for KIND_GPU, this onnxruntime has {', '.join(providers)}; install "
            "onnxruntime-gpu (and no onnxruntime beside it)"
        )
    return ""


def _shared_memory(engines: Sequence[RepositoryModel], binary: TritonBinary | None) -> Iterator[Finding]:
    if not shared_memory.SHM.is_dir():
        yield Finding("shm", "problem", "there is no /dev/shm, which Triton's Python backend needs")
        return
    usage = shutil.disk_usage(shared_memory.SHM)
    size = f"/dev/shm has {usage.free // _MEBIBYTE} of {usage.total // _MEBIBYTE} MiB free"
    try:
        if not _is_native(binary):
            shared_memory.check_room(engines)
        yield Finding("shm", "ok", size)
    except ResourceError as exc:
        yield Finding("shm", "problem", str(exc))


def _version(distribution: str) -> Any:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
