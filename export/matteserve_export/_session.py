"""ONNX Runtime on the CPU, as the exporter uses it: one input, the first output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

__all__ = ["Runner", "make_runner", "run_model"]

Runner = Callable[[NDArray[Any]], NDArray[Any]]


def make_runner(model: onnx.ModelProto) -> Runner:
    """A function that runs the model: input array in, first output out."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only; warnings about unused initializers are not the user's business
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def run(array: NDArray[Any]) -> NDArray[Any]:
        return np.asarray(session.run(None, {name: array})[0])

    return run


def run_model(model: onnx.ModelProto, array: NDArray[Any]) -> NDArray[Any]:
    """Run the model once."""
    return make_runner(model)(array)
