"""What this machine can run: its GPUs, and the versions of the libraries that load engines."""

from __future__ import annotations

import ctypes
import importlib.metadata
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace

from matteserve_server.plan_backend.fit import Gpu, Machine

_SMI_FIELDS = "name,compute_cap,memory.total,driver_version"
_SMI_TIMEOUT_S = 20.0
# Sonames of the library that Triton's native backend loads, newest first.
_NVINFER = ("libnvinfer.so.12", "libnvinfer.so.11", "libnvinfer.so.10")
_DISTRIBUTIONS = {
    "tensorrt": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
    "tensorrt_rtx": ("tensorrt-rtx", "tensorrt-rtx-cu13-bindings", "tensorrt-rtx-cu12-bindings"),
}


def this_machine(*, native_backends: bool = False) -> Machine:
    """Look at this machine; nothing is loaded into the process but a version number's library.

    Args:
        native_backends: Whether the server is NVIDIA's container, whose backend loads `libnvinfer` itself.
    """
    found = _by_management_library() or _by_smi() or Machine()
    return replace(
        found,
        tensorrt=_nvinfer_version() if native_backends else installed_version("tensorrt"),
        tensorrt_rtx=installed_version("tensorrt_rtx"),
    )


def installed_version(library: str) -> str | None:
    """Version of a Python package that loads plans ("tensorrt", "tensorrt_rtx"), without importing it."""
    for distribution in _DISTRIBUTIONS[library]:
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def parse_smi(output: str) -> Machine | None:
    """Read what `nvidia-smi --query-gpu=name,compute_cap,memory.total,driver_version` printed as CSV without units."""
    rows = [[cell.strip() for cell in line.split(",")] for line in output.splitlines() if line.count(",") == 3]
    gpus = tuple(Gpu(name, capability, int(float(mebibytes)) << 20) for name, capability, mebibytes, _ in rows)
    return Machine(gpus, rows[0][3]) if rows else None


def decode_nvinfer_version(number: int) -> str:
    """`getInferLibVersion()` of TensorRT 10 and later, as people write it: 101303 is 10.13.3."""
    return f"{number // 10000}.{number // 100 % 100}.{number % 100}"


def _by_management_library() -> Machine | None:
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        gpus = tuple(
            Gpu(
                name=str(pynvml.nvmlDeviceGetName(handle)),
                compute_capability="{}.{}".format(*pynvml.nvmlDeviceGetCudaComputeCapability(handle)),
                memory_bytes=int(pynvml.nvmlDeviceGetMemoryInfo(handle).total),
            )
            for handle in handles
        )
        cuda = int(pynvml.nvmlSystemGetCudaDriverVersion_v2())
        return Machine(gpus, str(pynvml.nvmlSystemGetDriverVersion()), f"{cuda // 1000}.{cuda % 1000 // 10}")
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()


def _by_smi() -> Machine | None:
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, f"--query-gpu={_SMI_FIELDS}", "--format=csv,noheader,nounits"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_SMI_TIMEOUT_S)
        return parse_smi(result.stdout) if result.returncode == 0 else None
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None


def _nvinfer_version() -> str | None:
    for soname in _NVINFER:
        try:
            version: Callable[[], int] = ctypes.CDLL(soname).getInferLibVersion
        except (OSError, AttributeError):
            continue
        return decode_nvinfer_version(version())
    return None
