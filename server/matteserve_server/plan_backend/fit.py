"""Whether a plan fits a machine. A plan is tied to the TensorRT that built it and to the GPU that it was built for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

TITLES = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT for RTX"}
INSTALL = {"tensorrt": "pip install 'matteserve[server,gpu]'", "tensorrt_rtx": "pip install 'matteserve[server,rtx]'"}
_KINDS = {"tensorrt": "trt", "tensorrt_rtx": "rtx", "onnxruntime": "onnx"}


@dataclass(frozen=True)
class Builder:
    """What compiled a plan, and for what; the entry `builder` of a manifest.

    Attributes:
        name: "tensorrt" or "tensorrt_rtx".
        version: Its version, e.g. "10.13.3.9".
        compute_capabilities: What the plan runs on, e.g. ("8.9",).
        gpu: Name of the GPU that it was built on; None if none was needed.
        version_compatible: Whether later versions of the library may load it.
        hardware_compatibility: "none", "ampere_plus" or "same_compute_capability".
    """

    name: str
    version: str
    compute_capabilities: tuple[str, ...]
    gpu: str | None = None
    version_compatible: bool = False
    hardware_compatibility: str = "none"

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Builder:
        """Read the manifest's entry; KeyError or TypeError if it is none."""
        return cls(
            name=str(fields["name"]),
            version=str(fields["version"]),
            compute_capabilities=tuple(map(str, fields["compute_capabilities"])),
            gpu=fields.get("gpu"),
            version_compatible=bool(fields.get("version_compatible", False)),
            hardware_compatibility=str(fields.get("hardware_compatibility", "none")),
        )


@dataclass(frozen=True)
class Gpu:
    """One NVIDIA GPU.

    Attributes:
        name: As the driver calls it, e.g. "NVIDIA L4".
        compute_capability: E.g. "8.9".
        memory_bytes: All of its memory; 0 if it was not asked.
    """

    name: str
    compute_capability: str
    memory_bytes: int = 0


@dataclass(frozen=True)
class Machine:
    """What decides whether a plan can be loaded.

    Attributes:
        gpus: The GPUs; empty without any.
        driver: Version of the NVIDIA driver; None without one.
        cuda: Newest CUDA that the driver serves, e.g. "13.0"; None if it does not say.
        tensorrt: Version of TensorRT; None if there is none.
        tensorrt_rtx: Version of TensorRT for RTX; None if there is none.
    """

    gpus: tuple[Gpu, ...] = ()
    driver: str | None = None
    cuda: str | None = None
    tensorrt: str | None = None
    tensorrt_rtx: str | None = None


def unfit(builder: Builder, backend: str, machine: Machine) -> str:
    """Why a plan cannot run on a machine, as the end of a sentence that begins with the engine; empty if it can.

    Args:
        builder: What the plan's manifest says.
        backend: What is to load it: "tensorrt" or "tensorrt_rtx".
        machine: Where it is to run.
    """
    built_by = f"was built by {TITLES.get(builder.name, builder.name)} {builder.version}"
    built_for = f"for compute capability {' or '.join(builder.compute_capabilities)}"
    built_for += f" ({builder.gpu})" if builder.gpu else ""
    if builder.name != backend:
        return f"{built_by}, its config.pbtxt asks for {TITLES.get(backend, backend)}, which cannot read it"
    if not machine.gpus:
        return f"{built_by} {built_for}, this machine has no NVIDIA GPU that its driver shows"
    running = machine.tensorrt if backend == "tensorrt" else machine.tensorrt_rtx
    if running is None:
        return f"{built_by}, this machine has no {TITLES[backend]} ({INSTALL[backend]})"
    if not _version_fits(builder, running):
        return f"{built_by}, this machine has {TITLES[backend]} {running}"
    if not any(_gpu_fits(builder, gpu.compute_capability) for gpu in machine.gpus):
        here = ", ".join(f"{gpu.name} ({gpu.compute_capability})" for gpu in machine.gpus)
        return f"{built_by} {built_for}, this machine has {here}"
    return ""


def rebuild_command(engine: str, backend: str, precision: str) -> str:
    """The command that makes an engine again.

    Args:
        engine: Name of the engine, `<model>_<engine>_<precision>`.
        backend: Its Triton backend.
        precision: Its precision.
    """
    kind = _KINDS.get(backend, "onnx")
    model = engine.removesuffix(f"_{kind}_{precision}")
    if (kind, precision) == ("onnx", "fp32"):
        return f"matteserve export {model}"
    return f"matteserve build {model} --engine {kind} --precision {precision}"


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
