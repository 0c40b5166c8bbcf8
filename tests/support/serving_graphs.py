"""Serving graphs that take a moment: any architecture with weights that follow from names, and wires of one node."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from matteserve_export.models import build_model
from matteserve_export.serving import Core, ServingConfig, build_serving
from matteserve_export.to_onnx import ToOnnxConfig, export_core
from support.conformance import fill

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
ISNET = ((0.5, 0.5, 0.5), (1.0, 1.0, 1.0))
SIZE = 32


def exported(architecture: str, size: int) -> onnx.ModelProto:
    """Serving graph of an architecture, as `matteserve export` makes it; native `DeformConv` where it has any."""
    model = build_model(architecture)
    fill(model, seed=3)
    logits = architecture.startswith("birefnet")
    config = ToOnnxConfig(size, size, "logits" if logits else "probability")
    core = Core(export_core(model, config), size, size, batched=True)
    del model  # BiRefNet is a gigabyte
    constants = ISNET if architecture == "isnet" else IMAGENET
    return build_serving(core, ServingConfig(*constants, sigmoid=logits, min_max=not logits))


def small(size: int = SIZE) -> onnx.ModelProto:
    """The exporter's own wrap around two convolutions; drawn so that no pixel of the test pictures lies at 0.5."""
    torch.manual_seed(4)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 1, 3, padding=1), nn.Sigmoid()]
    core = export_core(nn.Sequential(*layers).eval(), ToOnnxConfig(size, size))
    return build_serving(Core(core, size, size, batched=True), ServingConfig(*IMAGENET, min_max=True))


def sampled(
    mode: str = "bilinear", *, opset: int = 17, dtype: int = TensorProto.FLOAT, **attributes: Any
) -> onnx.ModelProto:
    """Wire of the product around one convolution and one GridSample, whose grid is the convolution's result."""
    float_type = helper.tensor_dtype_to_np_dtype(dtype)
    nodes = [
        helper.make_node("Cast", ["image"], ["float"], to=dtype),
        helper.make_node("Transpose", ["float"], ["picture"], perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["picture", "weight"], ["offsets"], name="offset_conv"),
        helper.make_node("Transpose", ["offsets"], ["grid"], perm=[0, 2, 3, 1]),
        helper.make_node("GridSample", ["picture", "grid"], ["samples"], name="sample", mode=mode, **attributes),
        helper.make_node("Conv", ["samples", "last"], ["map"]),
        helper.make_node("Reshape", ["map", "shape"], ["alpha_float"]),
        helper.make_node("Cast", ["alpha_float"], ["alpha"], to=TensorProto.UINT8),
    ]
    rng = np.random.default_rng(0)
    constants = [
        numpy_helper.from_array(rng.uniform(-1e-3, 1e-3, (2, 3, 1, 1)).astype(float_type), "weight"),
        numpy_helper.from_array(np.full((1, 3, 1, 1), 1 / 3, float_type), "last"),
        numpy_helper.from_array(np.asarray([-1, SIZE, SIZE], np.int64), "shape"),
    ]
    return wire(nodes, constants, opset=opset)


def wire(
    nodes: list[onnx.NodeProto],
    constants: list[TensorProto],
    *,
    opset: int = 17,
    names: tuple[str, str] = ("image", "alpha"),
    dtype: int = TensorProto.UINT8,
    batch: int | str = "batch",
    channels: int = 3,
) -> onnx.ModelProto:
    """A model with the product's input and output, or with almost those."""
    graph = helper.make_graph(
        nodes,
        "wire",
        [helper.make_tensor_value_info(names[0], dtype, [batch, SIZE, SIZE, channels])],
        [helper.make_tensor_value_info(names[1], dtype, [batch, SIZE, SIZE])],
        constants,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
