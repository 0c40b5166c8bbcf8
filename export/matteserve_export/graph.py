"""Stage traced ONNX → clean ONNX: everything that depends on weights alone is computed once, and stored once.

The graph comes without weights: they are graph inputs, named as in the state dict, and their values lie beside it. So
no pass copies them, and a weight that the network uses twice stays one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from hashlib import sha256
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import NodeProto, numpy_helper

__all__ = ["attach_weights", "clean_graph"]

Constants = dict[str, NDArray[Any]]

_BIAS_PLACE = {"Conv": 2, "DeformConv": 3}  # among the inputs


def clean_graph(model: onnx.ModelProto, weights: Mapping[str, NDArray[Any]]) -> Constants:
    """Simplify a graph in place.

    Args:
        model: Graph whose inputs are its real inputs and the weights. The weights' inputs are updated to those that the
            simplified graph needs.
        weights: Values of the weights; they are not modified.

    Returns:
        Values of the weights that the simplified graph needs, by the names of its inputs.
    """
    graph = model.graph
    constants: Constants = {**weights, **{entry.name: numpy_helper.to_array(entry) for entry in graph.initializer}}
    outputs = {value.name for value in graph.output}
    nodes = _without_identities(list(graph.node), outputs)
    nodes = _fold_constants(nodes, constants, outputs, model)
    nodes = _fold_batch_norms(nodes, constants, outputs)
    nodes = _merge_pointwise(nodes, constants, outputs)
    nodes = _without_unused(nodes, outputs)
    _share_equal(nodes, constants)

    used = {name: constants[name] for node in nodes for name in node.input if name in constants}
    inputs = [value for value in graph.input if value.name not in constants]
    inputs += [
        onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
        for name, value in used.items()
    ]
    for field in (graph.node, graph.input, graph.initializer, graph.value_info):
        del field[:]
    graph.node.extend(nodes)
    graph.input.extend(inputs)
    return used


def attach_weights(model: onnx.ModelProto, weights: Mapping[str, NDArray[Any]]) -> None:
    """Turn the inputs that are weights into initializers, in place."""
    inputs = [value for value in model.graph.input if value.name not in weights]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    for name, value in weights.items():
        model.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(value), name))


def _without_identities(nodes: list[NodeProto], outputs: set[str]) -> list[NodeProto]:
    sources: dict[str, str] = {}
    kept = []
    for node in nodes:
        _rename_inputs(node, sources)
        if node.op_type == "Identity" and node.output[0] not in outputs:
            sources[node.output[0]] = node.input[0]
        else:
            kept.append(node)
    return kept


def _fold_constants(
    nodes: list[NodeProto], constants: Constants, outputs: set[str], model: onnx.ModelProto
) -> list[NodeProto]:
    """Take out the nodes that depend on constants alone; ONNX Runtime computes them in one run."""
    known = set(constants)
    folded, kept = [], []
    for node in nodes:
        has_subgraph = any(attribute.type == onnx.AttributeProto.GRAPH for attribute in node.attribute)
        if known.issuperset(filter(None, node.input)) and not has_subgraph and outputs.isdisjoint(node.output):
            known.update(node.output)
            folded.append(node)
        else:
            kept.append(node)
    needed = {name for node in kept for name in node.input} & {name for node in folded for name in node.output}
    folded = _without_unused(folded, needed)
    if folded:
        constants.update(_evaluate(folded, constants, sorted(needed), model))
    return kept


def _evaluate(nodes: list[NodeProto], constants: Constants, wanted: list[str], model: onnx.ModelProto) -> Constants:
    feeds = {name: constants[name] for node in nodes for name in node.input if name in constants}
    graph = onnx.helper.make_graph(
        nodes,
        "constants",
        [
            onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
            for name, value in feeds.items()
        ],
        [onnx.helper.make_empty_tensor_value_info(name) for name in wanted],
    )
    part = onnx.helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(part.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return dict(zip(wanted, session.run(wanted, feeds), strict=True))


def _fold_batch_norms(nodes: list[NodeProto], constants: Constants, outputs: set[str]) -> list[NodeProto]:
    """Make batch norms part of the convolutions before them: deformable ones too, and sums of several."""
    before = _sole_producers(nodes, outputs)
    merged: set[int] = set()
    sources: dict[str, str] = {}
    for node in nodes:
        convolutions = _summands(node.input[0], before, constants) if node.op_type == "BatchNormalization" else []
        if not convolutions or not constants.keys() >= set(node.input[1:]):
            continue
        # In float64, so that the weights come out correctly rounded.
        gain, shift, mean, variance = (constants[name].astype(np.float64) for name in node.input[1:5])
        gain = gain / np.sqrt(variance + _attribute(node, "epsilon", 1e-5))
        shift = shift - mean * gain
        for convolution in convolutions:
            weight, bias = _weights(convolution, constants)
            weight = weight * gain.reshape(-1, *[1] * (weight.ndim - 1))
            _set_weights(convolution, weight, bias * gain + shift, constants)
            shift = np.zeros_like(shift)  # the first summand has it
        sources[node.output[0]] = node.input[0]
        merged.add(id(node))
    kept = [node for node in nodes if id(node) not in merged]
    for node in kept:
        _rename_inputs(node, sources)
    return kept


def _summands(name: str, before: Mapping[str, NodeProto], constants: Constants) -> list[NodeProto]:
    """The convolutions with constant weights whose sum a tensor is; none if it is anything else."""
    node = before.get(name)
    if node is None:
        return []
    if node.op_type in _BIAS_PLACE:
        place = _BIAS_PLACE[node.op_type]
        return [node] if constants.keys() >= {node.input[1], *node.input[place : place + 1]} else []
    if node.op_type == "Add":
        parts = [_summands(part, before, constants) for part in node.input]
        return parts[0] + parts[1] if all(parts) else []
    return []


def _merge_pointwise(nodes: list[NodeProto], constants: Constants, outputs: set[str]) -> list[NodeProto]:
    """Make one convolution of a convolution and a 1x1 convolution right after it, where that is less work."""
    before = _sole_producers(nodes, outputs)
    merged: set[int] = set()
    for node in nodes:
        source = before.get(node.input[0]) if node.op_type == "Conv" else None
        if source is None or source.op_type != "Conv" or not constants.keys() >= {*source.input[1:], *node.input[1:]}:
            continue
        plain = _attribute(source, "group", 1) == 1 == _attribute(node, "group", 1)
        plain = plain and set(_attribute(node, "strides", [1])) == {1} and set(_attribute(node, "pads", [0])) == {0}
        (first, first_bias), (second, second_bias) = _weights(source, constants), _weights(node, constants)
        if not plain or second.shape[2:] != (1, 1) or len(second) * first[0].size >= first.size + second.size:
            continue
        mix = second[:, :, 0, 0].astype(np.float64)
        _set_weights(source, np.tensordot(mix, first, 1), mix @ first_bias + second_bias, constants)
        source.output[0] = node.output[0]
        merged.add(id(node))
    return [node for node in nodes if id(node) not in merged]


def _without_unused(nodes: list[NodeProto], wanted: Iterable[str]) -> list[NodeProto]:
    needed = set(wanted)
    kept = []
    for node in reversed(nodes):
        if not needed.isdisjoint(node.output):
            needed.update(node.input)
            kept.append(node)
    return kept[::-1]


def _share_equal(nodes: list[NodeProto], constants: Constants) -> None:
    """Let equal constants be one: the backbone, which runs twice, has everything derived from its weights twice."""
    names: dict[object, str] = {}
    sources: dict[str, str] = {}
    for name in dict.fromkeys(name for node in nodes for name in node.input if name in constants):
        value = np.ascontiguousarray(constants[name])
        key = (value.dtype.str, value.shape, sha256(value.data).digest())
        sources[name] = names.setdefault(key, name)
    for node in nodes:
        _rename_inputs(node, sources)


def _sole_producers(nodes: list[NodeProto], outputs: set[str]) -> dict[str, NodeProto]:
    """The node behind each name that exactly one node reads."""
    readers = Counter(name for node in nodes for name in node.input)
    return {name: node for node in nodes for name in node.output if readers[name] == 1 and name not in outputs}


def _weights(node: NodeProto, constants: Constants) -> tuple[NDArray[Any], NDArray[Any]]:
    """Weight and bias of a convolution."""
    weight = constants[node.input[1]]
    place = _BIAS_PLACE[node.op_type]
    return weight, constants[node.input[place]] if len(node.input) > place else np.zeros(len(weight), weight.dtype)


def _set_weights(node: NodeProto, weight: NDArray[Any], bias: NDArray[Any], constants: Constants) -> None:
    """Give a convolution new weights, under names of its own: others may read the old ones."""
    place = _BIAS_PLACE[node.op_type]
    if len(node.input) == place:
        node.input.append("")
    for index, kind, value in ((1, "weight", weight), (place, "bias", bias)):
        node.input[index] = f"{node.output[0]}.{kind}"
        constants[node.input[index]] = value.astype(np.float32)


def _rename_inputs(node: NodeProto, sources: Mapping[str, str]) -> None:
    for index, name in enumerate(node.input):
        if name in sources:
            node.input[index] = sources[name]


def _attribute(node: NodeProto, name: str, default: Any) -> Any:
    return next((onnx.helper.get_attribute_value(entry) for entry in node.attribute if entry.name == name), default)
