"""Triton's tensors as numpy arrays and back, for the stub's bindings, which are older than numpy 2.

Its own `as_numpy()` and `Tensor(name, array)` hand numpy 2 wrong data, silently; DLPack does not.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from numpy.typing import NDArray

# The stub marks a DLPack capsule that it took over with a name of its own where DLPack and numpy expect this one; numpy
# then reports an error for every tensor. PyCapsule_SetName keeps only the pointer: the text must outlive the capsule.
_CONSUMED = ctypes.create_string_buffer(b"used_dltensor")
_set_capsule_name = ctypes.pythonapi.PyCapsule_SetName
_set_capsule_name.argtypes = [ctypes.py_object, ctypes.c_void_p]
_set_capsule_name.restype = ctypes.c_int


def to_numpy(tensor: Any) -> NDArray[Any]:
    """A request's tensor as an array; nothing is copied."""
    return np.from_dlpack(tensor)


def to_tensor(pb_utils: Any, name: str, array: NDArray[Any]) -> Any:
    """An array as a response's tensor; it must stay as it is until `execute` returns."""
    capsule = np.ascontiguousarray(array).__dlpack__()
    tensor = pb_utils.Tensor.from_dlpack(name, capsule)
    _set_capsule_name(capsule, ctypes.addressof(_CONSUMED))
    return tensor
