"""int8 by ONNX Runtime's static quantiser: explicit QuantizeLinear/DequantizeLinear pairs, calibrated on pictures.

The settings are those that TensorRT takes too: signed and symmetric both ways, one scale per output channel of the
weights, biases left in float32. Only convolutions and matrix products are quantised, which are nearly all of the
arithmetic; what lies between them stays in float32.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static

from matteserve_client import INPUT_NAME

__all__ = ["QUANTISED", "quantize"]

QUANTISED = ("Conv", "ConvTranspose", "MatMul", "Gemm")
"""Operators that compute in int8."""


def quantize(serving: onnx.ModelProto, images: NDArray[np.uint8], kept: Mapping[str, str]) -> onnx.ModelProto:
    """Quantise a serving graph.

    Args:
        serving: The FP32 serving graph.
        images: Calibration pictures, [N, H, W, 3] uint8.
        kept: First outputs of the nodes that are not to be quantised.

    Returns:
        The graph with QDQ pairs around every convolution and matrix product.
    """
    excluded = [node.name for node in serving.graph.node if node.output[0] in kept]
    with tempfile.TemporaryDirectory() as folder:
        source, result = Path(folder) / "fp32.onnx", Path(folder) / "int8.onnx"
        onnx.save(serving, source)  # a ModelProto would be changed under the caller: its weights moved to a file
        with _without_advice():
            quantize_static(
                source,
                result,
                _Pictures(images),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=list(QUANTISED),
                per_channel=True,
                activation_type=QuantType.QInt8,
                weight_type=QuantType.QInt8,
                nodes_to_exclude=excluded,
                calibrate_method=CalibrationMethod.MinMax,
                extra_options={"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False},
            )
        return onnx.load(str(result))


@contextmanager
def _without_advice() -> Iterator[None]:
    """Silence the quantiser's advice, on the root logger, to simplify the graph first: the exporter has done so."""
    root = logging.getLogger()

    def advice(record: logging.LogRecord) -> bool:
        return "pre-processing" not in record.getMessage()

    root.addFilter(advice)
    try:
        yield
    finally:
        root.removeFilter(advice)


class _Pictures(CalibrationDataReader):  # type: ignore[misc]
    """Feeds the pictures one by one through the graph's own normalisation."""

    def __init__(self, images: NDArray[np.uint8]) -> None:
        self._feeds: Iterator[dict[str, Any]] = ({INPUT_NAME: image[None]} for image in images)

    def get_next(self) -> dict[str, Any] | None:
        return next(self._feeds, None)
