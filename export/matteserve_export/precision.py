"""Stage serving ONNX → serving ONNX of another precision: fp16, bf16 or int8 arithmetic behind the same uint8 wire.

Precision is made once, in the graph, because that is where every runtime reads it: TensorRT 11 knows strongly typed
networks only, ONNX Runtime never knew anything else. The FP32 graph is the source of all others.

What stays in float32 is short, and each entry of `KEPT` says why. Everything else is stored in the lower type,
`LayerNormalization` and `Softmax` too: both stay one node, whose statistics every runtime computes in float32 inside
(`stash_type` 1 says so in the graph), and a float32 Softmax would keep TensorRT from fusing the attention around it.

fp16 and bf16 are cast here rather than by a converter of the field; three were tried on the graphs of this project,
docs/precision.md has the figures. ONNX Runtime's `float16` puts a cast to float16 and back between any two nodes that
are to stay in float32 (so what is kept is rounded all the same), leaves the nodes out of order so that `onnx.checker`
refuses the file, and has no bf16. `onnxconverter_common`, its ancestor, breaks graphs that begin with uint8 → Cast.
NVIDIA's AutoCast (ModelOpt), given the list below, writes the same graph, but stores weights twice that two nodes share
(BiRefNet's backbone runs twice), and ModelOpt pins older onnx and onnxruntime releases than the exporter uses. int8 is
ONNX Runtime's own quantiser.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, get_args

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto

from matteserve_client import INPUT_NAME, OUTPUT_NAME, TOLERANCES, AlphaTolerance
from matteserve_export._errors import PrecisionError
from matteserve_export._mixed import FLOAT_TYPES, constants_as_initializers, lower
from matteserve_export._names import WRAP_PREFIX

__all__ = ["KEPT", "TOLERANCES", "Precision", "check_serving", "convert", "kept_nodes", "tolerance_for"]

_LOG = logging.getLogger(__name__)

Precision = Literal["fp32", "fp16", "bf16", "int8"]

KEPT: Mapping[str, str] = MappingProxyType(
    {
        "normalisation and alpha": (
            "what the exporter puts around the network: three channels before it, one after, so float32 costs nothing. "
            "The min-max's guard for flat maps, 1e-6, is below fp16's normal numbers"
        ),
        "last sigmoid": (
            "near 1 bf16 has steps of 1/256, a whole level of alpha, and fp16 of 1/2048; one channel, costs nothing"
        ),
        "sampling coordinates": (
            "a grid of -1..1 rounded to fp16 is off by up to 3 % of a pixel at 256 columns, each addition adds its "
            "own; summed in float32, the grid is rounded once, where GridSample wants it in the type of its input"
        ),
    }
)
"""What computes in float32 in a reduced graph, and why."""

_LOW = MappingProxyType({"fp16": int(TensorProto.FLOAT16), "bf16": int(TensorProto.BFLOAT16)})
_BF16_OPSET = 22
"""The first operator set in which convolution and pooling take bfloat16."""

# Operators by which a sampling grid is put together from offsets that a convolution made.
_MOVES = {"Concat", "Expand", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose"}
_COORDINATES = frozenset({*_MOVES, "Add", "Cast", "Div", "Mul", "Sub", "Unsqueeze"})


def tolerance_for(precision: Precision, architecture: str) -> AlphaTolerance:
    """Tolerance of an engine of this precision against its FP32 graph."""
    del architecture  # all of them fulfil the same
    return TOLERANCES[check_precision(precision)]


def check_precision(name: str) -> Precision:
    """Return a precision that exists.

    Raises:
        PrecisionError: It does not; the message lists those that do.
    """
    for known in get_args(Precision):
        if name == known:
            return known  # type: ignore[no-any-return]
    raise PrecisionError(f"no precision is called {name!r}; known are: {', '.join(get_args(Precision))}")


def convert(
    serving: onnx.ModelProto, precision: Precision, calibration: NDArray[np.uint8] | None = None
) -> onnx.ModelProto:
    """Bring a serving graph to a precision.

    Args:
        serving: The FP32 serving graph, as `matteserve_export.serving.build_serving` makes it.
        precision: What the result computes in.
        calibration: Pictures that show int8 the range of every activation: RGB, [N, H, W, 3] uint8, at the model's
            size. The other precisions need none.

    Returns:
        A checked serving graph: same input and output, uint8 both; the FP32 graph itself for "fp32".

    Raises:
        PrecisionError: No such precision, not an FP32 serving graph, a weight beyond the type's range, or no
            calibration pictures of the model's size.
    """
    check_precision(precision)
    height, width = check_serving(serving)
    if precision == "fp32":
        return serving
    if precision == "int8":
        from matteserve_export.quantize import quantize  # ONNX Runtime's quantiser takes a second to import

        result = quantize(serving, check_calibration(calibration, height, width), kept_nodes(serving))
    else:
        source = constants_as_initializers(_raise_opset(serving) if precision == "bf16" else serving)
        kept = kept_nodes(source)
        result = lower(source, _LOW[precision], lambda node: node.output[0] in kept)
    try:
        onnx.checker.check_model(result, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as exc:
        raise PrecisionError(f"this graph has no valid {precision} form: {exc}") from exc
    before, after = serving.ByteSize(), result.ByteSize()
    _LOG.info("%s: %.1f MiB, %.0f %% of fp32", precision, after / 2**20, 100 * after / before)
    return result


def kept_nodes(serving: onnx.ModelProto) -> dict[str, str]:
    """The nodes that stay in float32: name of the first output → entry of `KEPT`."""
    nodes = serving.graph.node
    producers = {name: node for node in nodes for name in node.output}
    kept = {node.output[0]: "normalisation and alpha" for node in nodes if node.name.startswith(WRAP_PREFIX)}
    readers: dict[str, list[NodeProto]] = {}
    for node in nodes:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    for node in nodes:
        followers = readers.get(node.output[0], ())
        if node.op_type == "Sigmoid" and followers and all(reader.output[0] in kept for reader in followers):
            kept.setdefault(node.output[0], "last sigmoid")
        if node.op_type == "GridSample":
            pending = [node.input[1]]
            while pending:
                producer = producers.get(pending.pop())
                if producer is not None and producer.op_type in _COORDINATES and producer.output[0] not in kept:
                    kept[producer.output[0]] = "sampling coordinates"
                    pending.extend(producer.input)
    return kept


def check_serving(serving: onnx.ModelProto) -> tuple[int, int]:
    """Check that a graph is an FP32 serving graph; return its (height, width).

    Raises:
        PrecisionError: Another wire format, precision already reduced, or a graph that the exporter did not wrap.
    """
    wanted = f"{INPUT_NAME!r} uint8 [batch, H, W, 3] → {OUTPUT_NAME!r} uint8 [batch, H, W]"
    found = " → ".join(
        ", ".join(_describe(value) for value in values) for values in (serving.graph.input, serving.graph.output)
    )
    shapes = [_dimensions(value) for value in (*serving.graph.input, *serving.graph.output)]
    height, width = shapes[0][1:3] if shapes and len(shapes[0]) == 4 else (0, 0)
    if found != wanted.replace("H, W", f"{height}, {width}") or not (height and width):
        raise PrecisionError(
            f"this ONNX is {found if shapes else 'empty'}; expected {wanted}. Take the model.onnx "
            "of a `…_onnx_fp32` engine, or make one with `matteserve export`"
        )
    nodes = serving.graph.node
    low = sorted({int(t.data_type) for t in serving.graph.initializer} & FLOAT_TYPES.keys() - {int(TensorProto.FLOAT)})
    quantised = [node.op_type for node in nodes if "Quantize" in node.op_type or node.op_type.startswith("QLinear")]
    if low or quantised:
        what = quantised[0] if quantised else f"{TensorProto.DataType.Name(low[0]).lower()} weights"
        raise PrecisionError(
            f"this ONNX is not fp32 any more (it has {what}); convert the fp32 one, so that nothing is rounded twice"
        )
    inner = (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)
    control = sorted({node.op_type for node in nodes if any(a.type in inner for a in node.attribute)})
    if control:
        raise PrecisionError(
            f"this ONNX decides at run time what to compute ({', '.join(control)}), which no reduced precision is "
            "made of here; export the network from its checkpoint"
        )
    first = [node for node in nodes if INPUT_NAME in node.input]
    if [node.op_type for node in first] != ["Cast"] or not first[0].name.startswith(WRAP_PREFIX):
        raise PrecisionError(
            "this ONNX was not wrapped by `matteserve export` (its input does not go into one Cast of the wrap), so "
            "it is not known which nodes normalise; export the float model it was made from"
        )
    return height, width


def check_calibration(images: NDArray[np.uint8] | None, height: int, width: int) -> NDArray[np.uint8]:
    """Return pictures that int8 can be calibrated with.

    Raises:
        PrecisionError: There are none, or they have another shape or dtype.
    """
    if images is None or not len(images):
        raise PrecisionError(
            "int8 needs pictures that show the range of every activation, and there are none; give a directory of some "
            "20 to 200 that are like those to come"
        )
    if images.dtype != np.uint8 or images.shape[1:] != (height, width, 3):
        raise PrecisionError(
            f"calibration pictures are {images.dtype} {list(images.shape)}; expected uint8 [N, {height}, {width}, 3]"
        )
    return images


def _raise_opset(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph in the operator set whose convolutions take bfloat16."""
    if max(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")) >= _BF16_OPSET:
        return model
    try:
        return onnx.version_converter.convert_version(model, _BF16_OPSET)
    except Exception as exc:  # the converter raises RuntimeError and classes of its own
        raise PrecisionError(f"bf16 needs operator set {_BF16_OPSET}, to which this graph has no way: {exc}") from exc


def _dimensions(value: onnx.ValueInfoProto) -> list[int]:
    return [dimension.dim_value for dimension in value.type.tensor_type.shape.dim]


def _describe(value: onnx.ValueInfoProto) -> str:
    """`'image' uint8 [batch, 320, 320, 3]`."""
    tensor = value.type.tensor_type
    dimensions = [str(d.dim_value) if d.HasField("dim_value") else "batch" for d in tensor.shape.dim]
    return f"{value.name!r} {TensorProto.DataType.Name(tensor.elem_type).lower()} [{', '.join(dimensions)}]"
