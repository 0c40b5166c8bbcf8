"""What NVIDIA's parser made of an ONNX, judged before anything is compiled.

Without a GPU a plan cannot be opened, and with one its layers have been fused beyond recognition: the parsed network is
the place to see whether the names, types and shapes are those of the wire, whether the batch is dynamic, how every
GridSample was read, and whether the network is in the precision that it claims. An engine that is float32 in all but
name works, at half the speed and twice the size; nothing else would tell.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from matteserve_client import INPUT_NAME, OUTPUT_NAME
from matteserve_export._errors import EngineBuildError

__all__ = ["NetworkSummary", "check_network"]

# Layers that multiply; their precision is the engine's. The others follow, or are kept in float32 on purpose.
_PRODUCTS = frozenset({"CONVOLUTION", "DECONVOLUTION", "MATRIX_MULTIPLY"})
_FLOATING = {"FLOAT": "fp32", "HALF": "fp16", "BF16": "bf16", "FP8": "fp8"}


@dataclass(frozen=True)
class NetworkSummary:
    """What the parser made of an ONNX.

    Attributes:
        layers: Number of layers.
        products: Convolutions and matrix products by the precision that they are computed in.
        grid_samples: Number of GridSample layers, each bilinear.
        softmaxes: Number of softmax layers, that is of attentions.
        quantizers: Number of Quantize and Dequantize layers.
    """

    layers: int
    products: Mapping[str, int]
    grid_samples: int = 0
    softmaxes: int = 0
    quantizers: int = 0


def check_network(module: ModuleType, network: Any, precision: str) -> NetworkSummary:
    """Raise unless the network has the wire format, batches, and the precision that it claims."""
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    outputs = [network.get_output(index) for index in range(network.num_outputs)]
    found = [f"{t.name} {t.dtype.name} {list(t.shape)}" for t in (*inputs, *outputs)]
    shape = tuple(inputs[0].shape) if inputs else ()
    uint8 = module.DataType.UINT8
    wire = len(shape) == 4 and [(t.name, t.dtype, tuple(t.shape)) for t in (*inputs, *outputs)] == [
        (INPUT_NAME, uint8, (-1, *shape[1:3], 3)),
        (OUTPUT_NAME, uint8, (-1, *shape[1:3])),
    ]
    if not wire or -1 in shape[1:]:
        raise EngineBuildError(
            f"the network has another wire format: expected {INPUT_NAME} UINT8 [-1, H, W, 3] and {OUTPUT_NAME} UINT8 "
            f"[-1, H, W], found {', '.join(found)}; build from a serving ONNX of `matteserve export`"
        )
    counts: Counter[str] = Counter()
    products: Counter[str] = Counter()
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        kind = layer.type.name
        counts[kind] += 1
        if kind in _PRODUCTS:
            dtype = layer.get_input(0).dtype.name
            products[_FLOATING.get(dtype, dtype.lower())] += 1
        elif kind == "GRID_SAMPLE":
            _check_grid_sample(module, layer)
    summary = NetworkSummary(
        layers=network.num_layers,
        products=dict(products),
        grid_samples=counts["GRID_SAMPLE"],
        softmaxes=counts["SOFTMAX"] + counts["ATTENTION_INPUT"],
        quantizers=counts["QUANTIZE"] + counts["DEQUANTIZE"],
    )
    _check_precision(summary, precision)
    return summary


def _check_grid_sample(module: ModuleType, layer: Any) -> None:
    """Raise unless the layer samples as `DeformConv` does; a parser that reads another mode says nothing about it."""
    layer.__class__ = module.IGridSampleLayer  # the API hands out the base class
    grid, picture = layer.get_input(1).dtype.name, layer.get_input(0).dtype.name
    mode, outside = layer.interpolation_mode.name, layer.sample_mode.name
    if (mode, outside, layer.align_corners) != ("LINEAR", "FILL", False) or grid != picture:
        raise EngineBuildError(
            f"the parser read GridSample {layer.name!r} as {mode}, {outside}, align_corners {layer.align_corners}, "
            f"{picture} at {grid} coordinates; expected LINEAR, FILL, False and one dtype. Some parsers read operator "
            "set 20 and above as NEAREST (NVIDIA/TensorRT issue 4646): export with operator set 16 to 19"
        )


def _check_precision(summary: NetworkSummary, precision: str) -> None:
    """Raise unless most products are in the precision that is claimed, and for fp32 all of them."""
    total = sum(summary.products.values())
    if precision == "int8":
        right = summary.quantizers > 0
    elif precision == "fp32":
        right = summary.products.get("fp32", 0) == total and not summary.quantizers
    else:
        right = summary.products.get(precision, 0) * 2 > total
    if not right:
        counted = ", ".join(f"{count} {name}" for name, count in sorted(summary.products.items())) or "none"
        raise EngineBuildError(
            f"the network is not {precision}: of its {total} convolutions and matrix products are {counted}, and it "
            f"has {summary.quantizers} quantizers. Precision is what the ONNX declares; convert the ONNX first"
        )
