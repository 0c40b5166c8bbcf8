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
from matteserve_server.manifest import EngineFile, read_manifest
from matteserve_server.plan_backend.fit import Machine, rebuild_command, unfit

logger = logging.getLogger("matteserve.server")

PLAN_BACKENDS = ("tensorrt", "tensorrt_rtx")


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
            _check_file(
                version / manifest.file.name,
                manifest.file,
                rebuild_command(config.name, _backend(config), manifest.precision),
            )


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
        if reason := unfit(builder, _backend(config), machine):
            raise EngineMismatchError(
                f"engine {folder.name!r} {reason}: build it for this machine with "
                f"`{rebuild_command(config.name, _backend(config), manifest.precision)}`"
            )


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


def _backend(config: Any) -> str:
    return config.backend or ("tensorrt" if is_plan(config) else "onnxruntime")


def _versions(folder: Path) -> Iterable[Path]:
    return sorted(entry for entry in folder.iterdir() if entry.is_dir() and entry.name.isdigit())
