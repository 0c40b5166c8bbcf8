"""What ONNX tells about the values of a graph, without copying gigabytes of weights about."""

from __future__ import annotations

import onnx
from onnx import helper

__all__ = ["infer_values", "without_weights"]

_SMALL = 4096  # bytes; what inference reads (shapes, axes, scales) is far smaller


def infer_values(model: onnx.ModelProto) -> onnx.GraphProto:
    """The graph with the type and shape of each value that inference can tell; large weights are among its inputs."""
    # Inference works on a serialized copy; weights tell it nothing, as inputs they are as good.
    light = without_weights(model)
    for tensor in model.graph.initializer:
        if tensor.ByteSize() > _SMALL:
            light.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
        else:
            light.graph.initializer.append(tensor)
    return onnx.shape_inference.infer_shapes(light, data_prop=True).graph


def without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy without the initializers, which are nearly all of a model, and without inferred shapes."""
    graph = onnx.GraphProto(
        name=model.graph.name, node=model.graph.node, input=model.graph.input, output=model.graph.output
    )
    return onnx.ModelProto(
        ir_version=model.ir_version,
        producer_name=model.producer_name,
        producer_version=model.producer_version,
        opset_import=model.opset_import,
        functions=model.functions,
        metadata_props=model.metadata_props,
        graph=graph,
    )
