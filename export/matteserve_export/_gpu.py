"""The GPU that CUDA would use, asked of the driver itself: no package and no child process is needed for it."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

__all__ = ["Gpu", "find_gpu"]

_COMPUTE_CAPABILITY_MAJOR, _COMPUTE_CAPABILITY_MINOR = 75, 76  # CUdevice_attribute


@dataclass(frozen=True)
class Gpu:
    """A GPU.

    Attributes:
        name: As the driver calls it.
        compute_capability: "8.9", for example.
    """

    name: str
    compute_capability: str


def find_gpu() -> Gpu | None:
    """The first GPU that CUDA_VISIBLE_DEVICES leaves; None without a driver or a GPU."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    name = ctypes.create_string_buffer(256)
    calls: tuple[tuple[Any, ...], ...] = (
        (cuda.cuInit, 0),
        (cuda.cuDeviceGet, ctypes.byref(device), 0),
        (cuda.cuDeviceGetName, name, len(name), device),
        (cuda.cuDeviceGetAttribute, ctypes.byref(major), _COMPUTE_CAPABILITY_MAJOR, device),
        (cuda.cuDeviceGetAttribute, ctypes.byref(minor), _COMPUTE_CAPABILITY_MINOR, device),
    )
    if any(function(*arguments) for function, *arguments in calls):  # each returns 0, or an error code and it ends
        return None
    return Gpu(name.value.decode(errors="replace"), f"{major.value}.{minor.value}")
