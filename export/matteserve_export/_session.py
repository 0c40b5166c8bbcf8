"""ONNX Runtime on the CPU, as the exporter uses it: one input, the first output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

__all__ = ["Runner", "make_runner", "open_session", "run_model", "run_outputs"]

Runner = Callable[[NDArray[Any]], NDArray[Any]]


def make_runner(model: onnx.ModelProto) -> Runner:
    """A function that runs the model: input array in, first output out."""
    session = open_session(model)
    name = session.get_inputs()[0].name

    def run(array: NDArray[Any]) -> NDArray[Any]:
        return np.asarray(session.run(None, {name: array})[0])

    return run


def run_model(model: onnx.ModelProto, array: NDArray[Any]) -> NDArray[Any]:
    """Run the model once."""
    return make_runner(model)(array)


def run_outputs(model: onnx.ModelProto, array: NDArray[Any]) -> dict[str, NDArray[Any]]:
    """Run the model once; all outputs by name."""
    session = open_session(model)
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {session.get_inputs()[0].name: array}), strict=True))


def open_session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    """A session on the CPU."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only; warnings about unused initializers are not the user's business
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
