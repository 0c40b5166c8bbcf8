"""One graph in two floating types: what each node computes in, and the casts between."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import ml_dtypes
import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from matteserve_export._errors import PrecisionError
from matteserve_export._inference import infer_values, without_weights

__all__ = ["FLOAT_TYPES", "constants_as_initializers", "largest", "lower", "value_types"]

FLOAT_TYPES = MappingProxyType(
    {
        int(TensorProto.FLOAT): np.dtype(np.float32),
        int(TensorProto.FLOAT16): np.dtype(np.float16),
        int(TensorProto.BFLOAT16): np.dtype(ml_dtypes.bfloat16),
    }
)
"""The floating types of a serving graph, as numpy knows them."""

_FLOAT = int(TensorProto.FLOAT)
_LARGEST = {_FLOAT: 3.4028235e38, int(TensorProto.FLOAT16): 65504.0, int(TensorProto.BFLOAT16): 3.3895314e38}
_SHORT = {_FLOAT: "fp32", int(TensorProto.FLOAT16): "fp16", int(TensorProto.BFLOAT16): "bf16"}

# Inputs that the operator's definition wants as float32 whatever the rest is: Resize's region and scales.
_FLOAT32_INPUTS: Mapping[str, frozenset[int]] = MappingProxyType({"Resize": frozenset({1, 2})})


def largest(dtype: int) -> float:
    """Largest finite value of a floating type."""
    return _LARGEST[dtype]


def value_types(model: onnx.ModelProto) -> dict[str, int]:
    """Element type of every value of the graph: inputs, initializers, and what the nodes make."""
    graph = infer_values(model)
    types = {tensor.name: int(tensor.data_type) for tensor in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        types[value.name] = int(value.type.tensor_type.elem_type)
    return types


def constants_as_initializers(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in which every constant tensor is an initializer; some exporters write nodes instead."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    nodes = []
    for node in graph.node:
        tensor = next((a.t for a in node.attribute if a.name == "value"), None) if node.op_type == "Constant" else None
        if tensor is None:
            nodes.append(node)
        else:
            graph.initializer.add().CopyFrom(tensor)
            graph.initializer[-1].name = node.output[0]
    del graph.node[:]
    graph.node.extend(nodes)
    return result


def lower(model: onnx.ModelProto, low: int, keep: Callable[[NodeProto], bool]) -> onnx.ModelProto:
    """Compute in a lower floating type, but for the nodes that are to be kept.

    Every value has one type, the one that its node computes in, and is cast where a reader wants the other: once,
    however many readers there are. So no value is rounded between two kept nodes, no cast is undone by the next one,
    and the nodes stay in order.

    Args:
        model: A float32 graph whose constants are initializers and whose nodes contain no graphs of their own. Its
            inputs and outputs are not floating.
        low: `TensorProto.FLOAT16` or `TensorProto.BFLOAT16`.
        keep: Whether a node computes in float32.

    Raises:
        PrecisionError: A weight is beyond the type's range, or a value's type cannot be inferred.
    """
    result = without_weights(model)
    graph = result.graph
    types = value_types(model)
    computes = [_FLOAT if keep(node) else low for node in graph.node]

    # A constant keeps its name; one with readers of both types exists twice.
    wanted_as: dict[str, set[int]] = {tensor.name: set() for tensor in model.graph.initializer}
    for node, compute in zip(graph.node, computes, strict=True):
        for index, name in enumerate(node.input):
            if name in wanted_as and types[name] in FLOAT_TYPES:
                wanted_as[name].add(_input_type(node, index, compute))
        for name in node.output:
            if name and name not in types:
                raise PrecisionError(f"the type of {name!r}, made by {node.op_type} {node.name!r}, cannot be inferred")
            if types.get(name) in FLOAT_TYPES:
                types[name] = compute
    for tensor in model.graph.initializer:
        variants = sorted(wanted_as[tensor.name], reverse=True) or [int(tensor.data_type)]
        types[tensor.name] = variants[0]
        for dtype in variants:
            name = tensor.name if dtype == variants[0] else _cast_name(tensor.name, dtype)
            graph.initializer.append(_constant(tensor, name, dtype))

    nodes: list[NodeProto] = []
    cast = {tensor.name for tensor in graph.initializer}  # casts that exist already, and constants in a second type
    for node, compute in zip(graph.node, computes, strict=True):
        for index, name in enumerate(node.input):
            wanted = _input_type(node, index, compute)
            if types.get(name) not in FLOAT_TYPES or types[name] == wanted:
                continue
            node.input[index] = other = _cast_name(name, wanted)
            if other not in cast:
                cast.add(other)
                nodes.append(helper.make_node("Cast", [name], [other], name=other, to=wanted))
        if node.op_type == "Cast" and types[node.output[0]] in FLOAT_TYPES:
            del node.attribute[:]
            node.attribute.append(helper.make_attribute("to", compute))
        nodes.append(node)

    del graph.node[:]
    graph.node.extend(nodes)
    return result


def _input_type(node: NodeProto, index: int, compute: int) -> int:
    """Type in which a node wants a floating input."""
    return _FLOAT if index in _FLOAT32_INPUTS.get(node.op_type, ()) else compute


def _cast_name(name: str, dtype: int) -> str:
    return f"{name}/{_SHORT[dtype]}"


def _constant(tensor: TensorProto, name: str, dtype: int) -> TensorProto:
    """A constant under a name, in a floating type; rounded to nearest."""
    if int(tensor.data_type) == dtype:
        copy = TensorProto()
        copy.CopyFrom(tensor)
        copy.name = name
        return copy
    values = numpy_helper.to_array(tensor)
    peak = float(np.abs(values, where=np.isfinite(values), out=np.zeros_like(values)).max(initial=0.0))
    if peak > largest(dtype):
        raise PrecisionError(
            f"the constant {tensor.name!r} reaches {peak:.3g}, beyond the {largest(dtype):.5g} of {_SHORT[dtype]}; "
            "serve these weights in bf16 or fp32"
        )
    return numpy_helper.from_array(values.astype(FLOAT_TYPES[dtype]), name)
