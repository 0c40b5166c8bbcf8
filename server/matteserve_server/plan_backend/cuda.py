"""The few CUDA calls that a plan takes, through NVIDIA's `cuda-bindings`.

What is here needs a GPU; nothing of it has been run on one yet (tests marked `gpu` do).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .config import PlanError

# Errors after which the process' CUDA context is gone: illegal address, launch failures, hardware faults. Every later
# call fails too, so only a new process helps.
_FATAL = frozenset({214, 700, 702, 710, 714, 715, 716, 717, 718, 719})


class CudaError(PlanError):
    """A CUDA call failed.

    Attributes:
        fatal: Whether the process can use the GPU no more.
    """

    def __init__(self, function: str, code: int, text: str) -> None:
        super().__init__(f"{function}: CUDA error {code}, {text}")
        self.fatal = code in _FATAL


class Cuda:
    """One GPU, one stream, and what was allocated there; `close` gives everything back.

    Args:
        device: Index of the GPU.

    Raises:
        PlanError: The package is not installed, or there is no GPU.
    """

    def __init__(self, device: int) -> None:
        self._runtime = import_runtime()
        self._resources = ExitStack()
        try:
            self._call("cudaSetDevice", device)
        except CudaError as exc:
            raise PlanError(f"GPU {device} cannot be used, and plans run on NVIDIA GPUs only: {exc}") from exc
        self.stream = int(self._call("cudaStreamCreateWithFlags", self._runtime.cudaStreamNonBlocking))
        self._release_with("cudaStreamDestroy", self.stream)
        attribute = self._runtime.cudaDeviceAttr
        major = self._call("cudaDeviceGetAttribute", attribute.cudaDevAttrComputeCapabilityMajor, device)
        minor = self._call("cudaDeviceGetAttribute", attribute.cudaDevAttrComputeCapabilityMinor, device)
        self.capability = f"{major}.{minor}"

    def device_buffer(self, size: int) -> int:
        """Allocate on the GPU; returns the address."""
        address = int(self._call("cudaMalloc", max(1, size)))
        self._release_with("cudaFree", address)
        return address

    def host_buffer(self, size: int, *, pinned: bool) -> NDArray[np.uint8]:
        """Allocate on the host, page-locked if wanted; uint8, shape (size,)."""
        if not pinned:
            return np.empty(size, np.uint8)
        address = int(self._call("cudaMallocHost", size))
        self._release_with("cudaFreeHost", address)
        return as_array(address, size)

    def copy_in(self, device: int, host: NDArray[np.uint8], size: int) -> None:
        """Enqueue a copy from the host to the GPU."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", device, host.ctypes.data, size, kind, self.stream)

    def copy_out(self, host: NDArray[np.uint8], device: int, size: int) -> None:
        """Enqueue a copy from the GPU to the host."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", host.ctypes.data, device, size, kind, self.stream)

    def synchronize(self) -> None:
        """Wait until everything that was enqueued is done."""
        self._call("cudaStreamSynchronize", self.stream)

    def capture(self, enqueue: Callable[[], None]) -> Any:
        """Record what a function enqueues as a graph that can be launched again."""
        mode = self._runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", self.stream, mode)
        try:
            enqueue()
        except BaseException:
            # The capture has to be ended all the same; what it recorded is of no use, and may be no graph at all.
            self._runtime.cudaStreamEndCapture(self.stream)
            raise
        graph = self._call("cudaStreamEndCapture", self.stream)
        executable = self._call("cudaGraphInstantiate", graph, 0)
        self._call("cudaGraphDestroy", graph)
        self._release_with("cudaGraphExecDestroy", executable)
        return executable

    def launch(self, executable: Any) -> None:
        """Enqueue a captured graph."""
        self._call("cudaGraphLaunch", executable, self.stream)

    def close(self) -> None:
        """Release everything, in the reverse order."""
        self._resources.close()

    def _release_with(self, function: str, handle: Any) -> None:
        # A failure while the process ends anyway must not hide the first one.
        self._resources.callback(getattr(self._runtime, function), handle)

    def _call(self, function: str, *arguments: Any) -> Any:
        code, *results = getattr(self._runtime, function)(*arguments)
        if int(code) != 0:
            _, text = self._runtime.cudaGetErrorString(code)
            raise CudaError(function, int(code), text.decode() if isinstance(text, bytes) else str(text))
        return results[0] if results else None


def import_runtime() -> Any:
    """The CUDA runtime's bindings.

    Raises:
        PlanError: They are not installed.
    """
    try:
        from cuda.bindings import runtime
    except ImportError as exc:
        raise PlanError(
            f"plans need the CUDA bindings, and {exc.name or 'cuda'} cannot be imported in the server's Python: "
            "pip install cuda-bindings"
        ) from exc
    return runtime


def as_array(address: int, size: int) -> NDArray[np.uint8]:
    """Memory at an address as an array; whoever allocated it keeps it alive."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))
