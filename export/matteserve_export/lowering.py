"""Stage serving ONNX → serving ONNX that NVIDIA's parser takes: `DeformConv` written with `GridSample` and `Conv`.

One FP32 graph with native `DeformConv` (operator set 19) is the source of every engine, because ONNX Runtime runs it
faster and in less memory than any other form. TensorRT for RTX has no such operator ("Plugin not found"), so for its
engines each node becomes, exactly:

::

    offset [B, 2·kh·kw, H', W'] ─ Reshape ─ Transpose ─ Reshape ─ Gather (x, y) ─ Mul (2/W, 2/H) ─ Add x ─ Add y ─┐
    X [B, C, H, W] ─ GridSample (bilinear, zeros, align_corners = 0) ──────────────── grid [B, H'·kh, W'·kw, 2] ──┘
                     └─ [B, C, H'·kh, W'·kw] ─ Mul mask ─ Conv, kernel and stride (kh, kw) ─ [B, M, H', W']

Each output pixel has its kh × kw samples beside each other, and a convolution whose stride is its kernel sums them up.
Of the forms that were compared this one has the fewest layers; `docs/engines.md` has the figures. The base grid is two
broadcast additions, because the whole grid as a constant would be folded into the file (kh·kw·H'·W'·2 numbers a node).

Coordinates are summed in float32 whatever the network's precision is: half precision has 11 bits, a third of a pixel at
a width of 1024 is gone in every addition. TensorRT wants `GridSample`'s input and grid in one dtype, so in a reduced
precision the finished sum is rounded once.

Dai et al., "Deformable Convolutional Networks", ICCV 2017; Zhu et al., "Deformable ConvNets v2", CVPR 2019 (the mask).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from matteserve_export._errors import OnnxError
from matteserve_export._inference import infer_values, without_weights

__all__ = ["lower_deform_conv"]

_LOG = logging.getLogger(__name__)
_OPSETS = range(16, 20)  # GridSample exists from 16 on; from 20 on some of NVIDIA's parsers take it for NEAREST


def lower_deform_conv(model: onnx.ModelProto) -> onnx.ModelProto:
    """Write every `DeformConv` with `GridSample` and `Conv`; batch symbolic, height and width fixed.

    Args:
        model: Serving ONNX, operator set 19 where it has `DeformConv`.

    Returns:
        A changed copy; the model itself if it has no such node.

    Raises:
        OnnxError: Another operator set, more than one offset group, or a size that is not fixed.
    """
    count = sum(node.op_type == "DeformConv" for node in model.graph.node)
    if not count:
        return model
    opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    if opset not in _OPSETS:
        raise OnnxError(
            f"the ONNX has DeformConv in operator set {opset}; it can be lowered in {_OPSETS[0]} to {_OPSETS[-1]}: "
            "NVIDIA's parsers may read a newer GridSample as NEAREST (NVIDIA/TensorRT issue 4646): export with "
            f"operator set {_OPSETS[-1]}"
        )
    lowered = without_weights(model)
    graph = lowered.graph
    tensors = _tensor_types(model)
    kernels = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    nodes: list[onnx.NodeProto] = []
    constants: dict[str, TensorProto] = {}
    for node in graph.node:
        if node.op_type == "DeformConv":
            nodes += _Lowering(node, tensors, kernels, constants).nodes()
        else:
            nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    graph.initializer.extend((*model.graph.initializer, *constants.values()))
    _LOG.info("lowering: %d DeformConv nodes became GridSample and Conv, %d nodes now", count, len(nodes))
    return lowered


@dataclass(frozen=True)
class _Lowering:
    """One `DeformConv` node on its way."""

    node: onnx.NodeProto
    tensors: Mapping[str, tuple[int, tuple[int | None, ...]]]
    kernels: Mapping[str, tuple[int, ...]]
    constants: dict[str, TensorProto]

    def nodes(self) -> list[onnx.NodeProto]:
        """What stands in its place; the last node gives the same output name."""
        out: list[onnx.NodeProto] = []
        label = self.node.name or self.node.output[0]

        def add(operator: str, inputs: list[str], step: str, **attributes: Any) -> str:
            name = f"{label}/{step}"
            out.append(helper.make_node(operator, inputs, [name], name=name, **attributes))
            return name

        x, weight, offset, bias, mask = [*self.node.input, "", ""][:5]
        attributes = {a.name: helper.get_attribute_value(a) for a in self.node.attribute}
        dtype, (_, _, height, width) = self._picture(x)
        kh, kw = attributes.get("kernel_shape") or self._kernel(weight)
        if attributes.get("offset_group", 1) != 1:
            raise self._error(f"it has {attributes['offset_group']} offset groups; only one can be lowered")
        pads = attributes.get("pads", [0, 0, 0, 0])
        strides, dilations = attributes.get("strides", [1, 1]), attributes.get("dilations", [1, 1])
        rows, base_y = _positions(height, kh, strides[0], dilations[0], pads[0], pads[2])
        columns, base_x = _positions(width, kw, strides[1], dilations[1], pads[1], pads[3])

        full = TensorProto.FLOAT
        if self.tensors.get(offset, (dtype,))[0] != full:
            offset = add("Cast", [offset], "offset_float", to=full)
        # Channel 2·tap is dy and 2·tap + 1 is dx, taps run over the rows of the kernel; a grid has x before y.
        grid = add("Reshape", [offset, self._shape(-1, kh, kw, 2, rows, columns)], "offset_taps")
        grid = add("Transpose", [grid], "offset_beside", perm=[0, 4, 1, 5, 2, 3])
        grid = add("Reshape", [grid, self._shape(-1, rows * kh, columns * kw, 2)], "offset_map")
        grid = add("Gather", [grid, self._shape(1, 0)], "offset_xy", axis=3)
        grid = add("Mul", [grid, self._constant(np.asarray([2 / width, 2 / height], np.float32))], "offset_grid")
        grid = add("Add", [grid, self._constant(_beside(base_x, 0)[None, None])], "grid_x")
        grid = add("Add", [grid, self._constant(_beside(base_y, 1)[None, :, None])], "grid")
        if dtype != full:
            x = add("Cast", [x], "input_float", to=full)
        sample = {"mode": "bilinear", "padding_mode": "zeros", "align_corners": 0}
        x = add("GridSample", [x, grid], "samples", **sample)
        if dtype != full:
            x = add("Cast", [x], "samples_cast", to=dtype)
        if mask:
            mask = add("Reshape", [mask, self._shape(-1, kh, kw, rows, columns)], "mask_taps")
            mask = add("Transpose", [mask], "mask_beside", perm=[0, 3, 1, 4, 2])
            mask = add("Reshape", [mask, self._shape(-1, 1, rows * kh, columns * kw)], "mask_map")
            x = add("Mul", [x, mask], "modulated")
        inputs = [x, weight, bias] if bias else [x, weight]
        group = attributes.get("group", 1)
        out.append(helper.make_node("Conv", inputs, list(self.node.output), name=label, strides=[kh, kw], group=group))
        return out

    def _picture(self, name: str) -> tuple[int, tuple[Any, ...]]:
        dtype, shape = self.tensors.get(name, (0, ()))
        if len(shape) != 4 or None in shape[1:]:
            raise self._error(f"its input {name!r} has shape {list(shape)}; height and width must be fixed")
        return dtype, shape

    def _kernel(self, weight: str) -> tuple[int, ...]:
        shape = self.kernels.get(weight) or self.tensors.get(weight, (0, ()))[1]
        if len(shape) != 4 or None in shape:
            raise self._error(f"the shape of its weight {weight!r} is not known")
        return tuple(int(side or 0) for side in shape[2:])

    def _shape(self, *sides: int) -> str:
        return self._constant(np.asarray(sides, np.int64))

    def _constant(self, value: NDArray[Any] | np.generic) -> str:
        """Name of an initializer; equal ones are stored once."""
        array = np.asarray(value)
        name = f"deform/{array.dtype}_{sha256(array.tobytes() + repr(array.shape).encode()).hexdigest()[:16]}"
        self.constants.setdefault(name, numpy_helper.from_array(array, name))
        return name

    def _error(self, reason: str) -> OnnxError:
        return OnnxError(f"DeformConv {self.node.name or self.node.output[0]!r} cannot be lowered: {reason}")


def _positions(
    size: int, kernel: int, stride: int, dilation: int, before: int, after: int
) -> tuple[int, NDArray[np.float32]]:
    """Number of outputs along one axis, and where their taps sample without offsets, in GridSample's -1..1.

    With align_corners off, pixel p of `size` lies at (2·p + 1) / size − 1.
    """
    outputs = (size + before + after - dilation * (kernel - 1) - 1) // stride + 1
    pixels = stride * np.arange(outputs)[:, None] - before + dilation * np.arange(kernel)
    return outputs, ((2 * pixels.ravel() + 1) / size - 1).astype(np.float32)


def _beside(positions: NDArray[np.float32], column: int) -> NDArray[np.float32]:
    """Positions as column 0 (x) or 1 (y) of a grid, zeros in the other: [n, 2]."""
    grid = np.zeros((len(positions), 2), np.float32)
    grid[:, column] = positions
    return grid


def _tensor_types(model: onnx.ModelProto) -> dict[str, tuple[int, tuple[int | None, ...]]]:
    """Dtype and shape of every tensor that inference can tell; an open dimension is None."""
    inferred = infer_values(model)
    types = {}
    for value in (*inferred.input, *inferred.value_info, *inferred.output):
        tensor_type = value.type.tensor_type
        sides = tuple(d.dim_value if d.HasField("dim_value") else None for d in tensor_type.shape.dim)
        types[value.name] = (tensor_type.elem_type, sides)
    return types
