"""Whether an engine can be loaded here, said in one sentence before Triton or TensorRT fails in its own words.

A plan is tied to the TensorRT that built it and to the GPU that it was built for. The manifest beside it says which;
this module compares that with the machine.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from matteserve_server._errors import EngineMismatchError
from matteserve_server.machine import Machine
from matteserve_server.manifest import Builder, EngineFile, read_manifest

logger = logging.getLogger("matteserve.server")

PLAN_BACKENDS = ("tensorrt", "tensorrt_rtx")
_TITLES = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT for RTX"}
INSTALL = {"tensorrt": "pip install 'matteserve[server,gpu]'", "tensorrt_rtx": "pip install 'matteserve[server,rtx]'"}


def is_plan(config: Any) -> bool:
    """Whether an `inference.ModelConfig` is that of a plan."""
    return config.backend in PLAN_BACKENDS or config.platform == "tensorrt_plan"


def check_files(folder: Path, config: Any) -> None:
    """Compare every version's engine file with its manifest, byte for byte; no manifest, nothing to compare with.

    Args:
        folder: The engine's folder.
        config: Its `inference.ModelConfig`.

    Raises:
        EngineMismatchError: The file is missing, cut off or another one.
    """
    for version in _versions(folder):
        manifest = read_manifest(version)
        if manifest is not None and manifest.file is not None:
            _check_file(version / manifest.file.name, manifest.file, _rebuild_command(config, manifest.precision))


def check_machine(folder: Path, config: Any, machine: Machine) -> None:
    """Compare what a plan was built for with a machine.

    Args:
        folder: The engine's folder.
        config: Its `inference.ModelConfig`.
        machine: Where it is to run.

    Raises:
        EngineMismatchError: It cannot run there; the message names both and how to build it again.
    """
    if not is_plan(config):
        return
    for version in _versions(folder):
        manifest = read_manifest(version)
        if manifest is None or manifest.builder is None:
            logger.warning("%s has no manifest that says what it was built for; it may not load", version)
            continue
        # For a mixed fleet the folder has plans for other GPUs, which Triton's own backend chooses among.
        capabilities = (*manifest.builder.compute_capabilities, *config.cc_model_filenames)
        builder = replace(manifest.builder, compute_capabilities=capabilities)
        if reason := unfit(builder, config.backend or "tensorrt", machine):
            raise EngineMismatchError(
                f"engine {folder.name!r} {reason}: build it for this machine with "
                f"`{_rebuild_command(config, manifest.precision)}`"
            )


def unfit(builder: Builder, backend: str, machine: Machine) -> str:
    """Why a plan cannot run on a machine, as the end of a sentence that begins with the engine; empty if it can."""
    built_by = f"was built by {_TITLES.get(builder.name, builder.name)} {builder.version}"
    built_for = f"for compute capability {' or '.join(builder.compute_capabilities)}"
    built_for += f" ({builder.gpu})" if builder.gpu else ""
    if builder.name != backend:
        return f"{built_by}, its config.pbtxt asks for {_TITLES.get(backend, backend)}, which cannot read it"
    if not machine.gpus:
        return f"{built_by} {built_for}, this machine has no NVIDIA GPU that its driver shows"
    running = machine.tensorrt if backend == "tensorrt" else machine.tensorrt_rtx
    if running is None:
        return f"{built_by}, this machine has no {_TITLES[backend]} ({INSTALL[backend]})"
    if not _version_fits(builder, running):
        return f"{built_by}, this machine has {_TITLES[backend]} {running}"
    if not any(_gpu_fits(builder, gpu.compute_capability) for gpu in machine.gpus):
        here = ", ".join(f"{gpu.name} ({gpu.compute_capability})" for gpu in machine.gpus)
        return f"{built_by} {built_for}, this machine has {here}"
    return ""


def _version_fits(builder: Builder, running: str) -> bool:
    """A plan needs the very version that built it, or, if built so, any later one."""
    built, here = _numbers(builder.version)[:3], _numbers(running)[:3]
    return here >= built if builder.version_compatible else here == built


def _gpu_fits(builder: Builder, capability: str) -> bool:
    if builder.hardware_compatibility == "ampere_plus":
        return _numbers(capability) >= (8, 0)
    return capability in builder.compute_capabilities


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())


def _check_file(path: Path, described: EngineFile, rebuild: str) -> None:
    advice = f"; copy it again, or build it with `{rebuild}`"
    if not path.is_file():
        raise EngineMismatchError(f"{path} is missing{advice}")
    if (size := path.stat().st_size) != described.size_bytes:
        raise EngineMismatchError(
            f"{path} has {size:,} bytes, its manifest says {described.size_bytes:,}: it was cut off or replaced{advice}"
        )
    with path.open("rb") as stream:
        digest = hashlib.sha256()
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest() != described.sha256:
        raise EngineMismatchError(
            f"{path} is not the file that was built: its sha256 is {digest.hexdigest()[:16]}…, its manifest says "
            f"{described.sha256[:16]}…{advice}"
        )


def _rebuild_command(config: Any, precision: str) -> str:
    kind = {"tensorrt_rtx": "rtx", "tensorrt": "trt"}.get(config.backend or "", "trt" if is_plan(config) else "onnx")
    model = config.name.removesuffix(f"_{kind}_{precision}")
    if (kind, precision) == ("onnx", "fp32"):
        return f"matteserve export {model}"
    return f"matteserve build {model} --engine {kind} --precision {precision}"


def _versions(folder: Path) -> Iterable[Path]:
    return sorted(entry for entry in folder.iterdir() if entry.is_dir() and entry.name.isdigit())
