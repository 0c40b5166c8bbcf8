"""What a GPU's arithmetic would do to the alpha, found without one.

ONNX Runtime's CPU provider runs a float16 graph by inserting casts: between two nodes without a float16 kernel nothing
is rounded, so such a run checks the graph and the rounding of the weights, and little else. Here the graph computes in
float32 with every node's result rounded to the type in which the graph stores it: what exceeds the type's range becomes
infinite, what is too small becomes zero, everything else is rounded to nearest, as on a GPU that accumulates inside a
node in float32 (tensor cores do).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from matteserve_export._inference import without_weights
from matteserve_export._mixed import FLOAT_TYPES, largest, value_types
from matteserve_export._names import WRAP_PREFIX
from matteserve_export._session import run_outputs

__all__ = ["Peak", "activation_peaks", "emulate", "note"]

_FLOAT = int(TensorProto.FLOAT)

# These only move or choose values: what comes out was rounded before.
_MOVES = {"Concat", "Expand", "Flatten", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose"}
_EXACT = frozenset({*_MOVES, "Max", "MaxPool", "Min", "Relu", "Unsqueeze", "Where"})


def emulate(model: onnx.ModelProto) -> onnx.ModelProto:
    """Make the float32 graph that computes what a float16 or bfloat16 one stores.

    Args:
        model: A serving graph, reduced or not.

    Returns:
        A graph for any float32 runtime, with the same inputs and outputs; equal to the model if nothing in it is
        stored in a lower type.
    """
    result = without_weights(model)
    graph = result.graph
    types = value_types(model)
    low = {name for name, dtype in types.items() if dtype in FLOAT_TYPES and dtype != _FLOAT}
    nodes: list[NodeProto] = []
    for node in graph.node:
        rounded = [name for name in node.output if name in low and node.op_type not in _EXACT]
        for index, name in enumerate(node.output):
            if name in rounded:
                node.output[index] = f"{name}/exact"
        if node.op_type == "Cast" and types.get(node.output[0].removesuffix("/exact")) in FLOAT_TYPES:
            del node.attribute[:]
            node.attribute.append(helper.make_attribute("to", _FLOAT))
        nodes.append(node)
        for name in rounded:
            nodes.append(helper.make_node("Cast", [f"{name}/exact"], [f"{name}/stored"], to=types[name]))
            nodes.append(helper.make_node("Cast", [f"{name}/stored"], [name], to=_FLOAT))
    del graph.node[:]
    graph.node.extend(nodes)
    for tensor in model.graph.initializer:
        if tensor.name in low:
            tensor = numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name)
        graph.initializer.append(tensor)
    return result


_NEAR = 4
"""Closer to the end of the range than this factor, other pictures may reach it."""


@dataclass(frozen=True)
class Peak:
    """The largest magnitude that one node reached.

    Attributes:
        node: Name of the node, or of its output if it has none.
        operator: ONNX operator.
        peak: Largest absolute value over all pictures.
    """

    node: str
    operator: str
    peak: float


def activation_peaks(model: onnx.ModelProto, images: NDArray[np.uint8]) -> list[Peak]:
    """Find what would overflow, or nearly: the largest magnitude in every node's result, the largest first.

    The network's nodes are looked at; what the wrap adds around it stays in float32 anyway.

    Args:
        model: A float32 serving graph.
        images: RGB, [N, H, W, 3] uint8; run one by one.
    """
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    graph = probe.graph
    types = value_types(model)
    del graph.output[:]
    found: dict[str, Peak] = {}
    for node in list(graph.node):
        for name in node.output:
            if types.get(name) != _FLOAT or node.op_type in _EXACT or node.name.startswith(WRAP_PREFIX):
                continue
            magnitude, peak = f"{name}/magnitude", f"{name}/peak"
            graph.node.append(helper.make_node("Abs", [name], [magnitude]))
            graph.node.append(helper.make_node("ReduceMax", [magnitude], [peak], keepdims=0))
            graph.output.append(helper.make_tensor_value_info(peak, TensorProto.FLOAT, []))
            found[peak] = Peak(node.name or name, node.op_type, 0.0)
    for image in images:
        for name, value in run_outputs(probe, image[None]).items():
            found[name] = Peak(found[name].node, found[name].operator, max(found[name].peak, float(value)))
    return sorted(found.values(), key=lambda peak: -peak.peak)


def note(peak: Peak) -> str:
    """What a peak means for fp16: nothing, or how near its end it is."""
    end = largest(int(TensorProto.FLOAT16))
    if not peak.peak <= end:
        return f": beyond fp16's {end:.0f}, this overflows"
    return f": {peak.peak / end:.0%} of fp16's range" if peak.peak > end / _NEAR else ""
