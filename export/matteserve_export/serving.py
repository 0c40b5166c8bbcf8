"""Stage core ONNX → serving ONNX: the wrap that turns uint8 pictures into uint8 alpha inside the graph.

::

    image UINT8 [batch, H, W, 3] ─ Cast ─ [Div by maximum] ─ Mul ─ Add ─ Transpose ─ core ─ [Sigmoid] ─ Reshape
                                 ─ [min-max] ─ Clip ─ Mul 255 ─ Round or Floor ─ Cast ─ alpha UINT8 [batch, H, W]

The wrap fits any core: our own export, or a public float32 ONNX with one picture input, such as rembg's assets. The
Cast must be the first node, because TensorRT takes uint8 inputs in no other way. The mean is not folded into the first
convolution, because its padding would then be wrong at the borders.

The references stretch a map to 0..1 by its minimum and maximum, over the whole array; here it is per image, so that a
batch gives what single pictures give. A flat map (maximum - minimum ≤ 1e-6) has no such stretch, 0/0 would be NaN: it
keeps its own values, clipped to 0..1.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxslim
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from matteserve_client import INPUT_NAME, OUTPUT_NAME
from matteserve_client._contract import Numerics
from matteserve_export._errors import OnnxError
from matteserve_export._names import BATCH_DIMENSION, WRAP_PREFIX
from matteserve_export._session import run_model, run_outputs

__all__ = ["FLAT_RANGE", "Core", "ServingConfig", "build_serving", "load_core", "prepare_core"]

_LOG = logging.getLogger(__name__)
_MIN_OPSET = 11  # Clip takes its bounds as inputs, and Round exists, from 11 on.

FLAT_RANGE = 1e-6
"""A map whose maximum minus minimum is not above this is flat and is not stretched."""


@dataclass(frozen=True)
class ServingConfig:
    """What the wrap does around the core.

    Attributes:
        mean: Mean per channel (R, G, B), after the division by 255.
        std: Standard deviation per channel (R, G, B).
        sigmoid: Apply the sigmoid to the core's output.
        min_max: Stretch each map to 0..1 by its own minimum and maximum.
        numerics: "rembg" divides a picture by its largest sample instead of 255 and truncates the alpha instead of
            rounding it, as rembg does.
    """

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    sigmoid: bool = False
    min_max: bool = False
    numerics: Numerics = "reference"


@dataclass(frozen=True)
class Core:
    """A core ONNX that the wrap can take.

    Attributes:
        model: One float32 input [batch, 3, H, W], one float32 output [batch, 1, H, W].
        height: Input height in pixels.
        width: Input width in pixels.
        batched: Whether it was shown that rows of a batch equal single runs; else the batch is fixed to 1.
    """

    model: onnx.ModelProto
    height: int
    width: int
    batched: bool


def load_core(path: Path) -> onnx.ModelProto:
    """Read an ONNX file, with its external data if it has any.

    Raises:
        OnnxError: No such file, not an ONNX, truncated, or its external data is missing.
    """
    if not path.is_file():
        raise OnnxError(f"{path}: no such file; give the path of a float32 .onnx, or fetch one with `matteserve pull`")
    try:
        model = onnx.load(str(path))
    except DecodeError as exc:
        raise OnnxError(
            f"{path}: this is not an ONNX model, or it is cut short ({path.stat().st_size} bytes); fetch it again, "
            "or if it is a torch checkpoint, pass it with --weights"
        ) from exc
    except (onnx.checker.ValidationError, FileNotFoundError) as exc:
        raise OnnxError(
            f"{path}: its weights are in external files that are missing; put them beside the .onnx ({exc})"
        ) from exc
    # Protobuf accepts many byte strings, an empty one among them: only a graph with nodes is a model.
    if not model.graph.node or not model.opset_import:
        raise OnnxError(f"{path}: this is not an ONNX model (no graph in it); if it is a checkpoint, use --weights")
    return model


def prepare_core(model: onnx.ModelProto, size: tuple[int, int] | None = None, *, try_batch: bool = True) -> Core:
    """Bring any float ONNX with one picture input to the form that the wrap takes.

    Only the first output is kept (segmentation networks return deeply supervised side maps after it), what no longer
    has a reader is removed, the batch is made symbolic and it is tried out whether it may be: a run of two different
    rows must give what two runs of one row give.

    Args:
        model: A float32 ONNX; input [B, 3, H, W], first output [B, 1, H, W] or [B, H, W].
        size: (height, width) for a model that leaves them open; must agree with a model that does not.
        try_batch: Whether a batch is wanted at all; the trial takes the time and the memory of two pictures.

    Raises:
        OnnxError: Another dtype, rank or number of channels, no size, or the model does not run.
    """
    model = _first_output_only(model)
    height, width = _check_input(model, size)
    _set_batch(model, 1, height, width)
    try:
        shape = run_model(model, np.zeros((1, 3, height, width), np.float32)).shape
    except Exception as exc:  # ONNX Runtime has no common base for its errors
        raise OnnxError(f"ONNX Runtime cannot run this model: {exc}") from exc
    if shape not in ((1, 1, height, width), (1, height, width)):
        raise OnnxError(f"the ONNX's first output has shape {list(shape)}; expected one map, [1, 1, {height}, {width}]")
    if not try_batch:
        return Core(model, height, width, False)
    dynamic = onnx.ModelProto()
    dynamic.CopyFrom(model)
    try:
        _scales_instead_of_sizes(dynamic, height, width)
        _set_batch(dynamic, None, height, width)
        dynamic = onnxslim.slim(dynamic)
        batched = _rows_equal_singles(dynamic, height, width)
    except Exception as exc:  # onnxslim and ONNX Runtime raise classes of their own; a batch is then not provable
        _LOG.info("no batch: %s", str(exc).splitlines()[0] if str(exc) else type(exc).__name__)
        batched = False
    if batched:
        return Core(dynamic, height, width, True)
    _LOG.warning("this ONNX works for single pictures only: batching could not be proven, max_batch_size becomes 1")
    return Core(model, height, width, False)


def build_serving(core: Core, config: ServingConfig) -> onnx.ModelProto:
    """Wrap a core: uint8 NHWC RGB in, uint8 alpha out.

    Args:
        core: Result of `prepare_core`.
        config: Normalisation and post-processing.

    Returns:
        Checked model with input `image` UINT8 [batch, H, W, 3] and output `alpha` UINT8 [batch, H, W].

    Raises:
        OnnxError: The operator set is too old, or the result is not valid.
    """
    opset = _opset(core.model)
    # All of the core's names get a prefix, so that none can be one of ours.
    inner = onnx.compose.add_prefix(core.model, "core/")
    pre, post = _Chain(opset), _Chain(opset)

    mean, std = (np.asarray(value, np.float64) for value in (config.mean, config.std))
    x = pre.node("Cast", INPUT_NAME, to=TensorProto.FLOAT)
    if config.numerics == "rembg":
        # A black picture is divided by one step instead of zero; it stays black, as it does in rembg.
        largest = pre.node("Max", pre.reduce("ReduceMax", x, [1, 2, 3]), pre.constant("one_step", np.float32(1)))
        x, divisor = pre.node("Div", x, largest), 1.0
    else:
        divisor = 255.0
    # (x / divisor − mean) / std as one multiplication and one addition, constants rounded once.
    x = pre.node("Mul", x, pre.constant("scale", (1.0 / (divisor * std)).astype(np.float32)))
    x = pre.node("Add", x, pre.constant("shift", (-mean / std).astype(np.float32)))
    core_input = inner.graph.input[0].name
    if core.batched:
        pre.node("Transpose", x, name=core_input, perm=[0, 3, 1, 2])
    else:
        # Triton wants a symbolic batch outside even where max_batch_size is 1; inside, the core needs its fixed one.
        x = pre.node("Transpose", x, perm=[0, 3, 1, 2])
        shape = pre.constant("core_shape", np.asarray([1, 3, core.height, core.width], np.int64))
        pre.node("Reshape", x, shape, name=core_input)

    alpha = inner.graph.output[0].name
    if config.sigmoid:
        alpha = post.node("Sigmoid", alpha)
    alpha_shape = post.constant("alpha_shape", np.asarray([-1, core.height, core.width], np.int64))
    alpha = post.node("Reshape", alpha, alpha_shape)
    if config.min_max:
        alpha = post.min_max(alpha)
    zero, one, full = (post.constant(f"constant_{value}", np.float32(value)) for value in (0, 1, 255))
    alpha = post.node("Clip", alpha, zero, one)
    alpha = post.node("Floor" if config.numerics == "rembg" else "Round", post.node("Mul", alpha, full))
    post.node("Cast", alpha, name=OUTPUT_NAME, to=TensorProto.UINT8)

    graph = helper.make_graph(
        [*pre.nodes, *inner.graph.node, *post.nodes],
        "matteserve",
        [helper.make_tensor_value_info(INPUT_NAME, TensorProto.UINT8, [BATCH_DIMENSION, core.height, core.width, 3])],
        [helper.make_tensor_value_info(OUTPUT_NAME, TensorProto.UINT8, [BATCH_DIMENSION, core.height, core.width])],
        [*pre.initializers, *inner.graph.initializer, *post.initializers],
    )
    serving = helper.make_model(graph, opset_imports=list(inner.opset_import), producer_name="matteserve")
    serving.ir_version = max(inner.ir_version, 4)  # from 4 on initializers need not be graph inputs
    serving.functions.extend(inner.functions)
    try:
        onnx.checker.check_model(serving, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as exc:
        raise OnnxError(f"the wrapped model is not valid ONNX: {exc}") from exc
    return serving


class _Chain:
    """Nodes and initializers under construction, each with a name of its own."""

    def __init__(self, opset: int) -> None:
        self.opset = opset
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[TensorProto] = []

    def node(self, operator: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        """Append a node with one output; return the output's name."""
        output = name or f"{WRAP_PREFIX}{operator}_{'_'.join(i.rsplit('/')[-1] for i in inputs[:1])}_{len(self.nodes)}"
        self.nodes.append(
            helper.make_node(operator, list(inputs), [output], name=f"{WRAP_PREFIX}{operator}_{output}", **attributes)
        )
        return output

    def constant(self, name: str, value: NDArray[np.generic] | np.generic) -> str:
        """Add an initializer; return its name."""
        self.initializers.append(numpy_helper.from_array(np.asarray(value), WRAP_PREFIX + name))
        return WRAP_PREFIX + name

    def min_max(self, x: str) -> str:
        """Stretch each map [batch, H, W] to 0..1; a flat one keeps its values."""
        low, high = self.reduce("ReduceMin", x, [1, 2]), self.reduce("ReduceMax", x, [1, 2])
        extent = self.node("Sub", high, low)
        flat_range = self.constant("flat_range", np.float32(FLAT_RANGE))
        stretched = self.node("Div", self.node("Sub", x, low), self.node("Max", extent, flat_range))
        return self.node("Where", self.node("Greater", extent, flat_range), stretched, x)

    def reduce(self, operator: str, x: str, axes: list[int]) -> str:
        """ReduceMin or ReduceMax; axes became an input with operator set 18."""
        if self.opset < 18:
            return self.node(operator, x, axes=axes, keepdims=1)
        constant = self.constant(f"{operator}_axes_{len(axes)}", np.asarray(axes, np.int64))
        return self.node(operator, x, constant, keepdims=1)


def _opset(model: onnx.ModelProto) -> int:
    opset = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)
    if opset < _MIN_OPSET:
        raise OnnxError(f"the ONNX has operator set {opset}; at least {_MIN_OPSET} is needed: export it again")
    return opset


def _first_output_only(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy with the first output only, without nodes and initializers that nothing reads any more."""
    if not model.graph.output:
        raise OnnxError("the ONNX has no output")
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph = copy.graph
    del graph.output[1:]
    needed = {graph.output[0].name}
    kept = []
    for node in reversed(graph.node):  # nodes are in topological order
        if needed.intersection(node.output):
            kept.append(node)
            needed.update(node.input)
            needed.update(_outer_names(node))
    del graph.node[:]
    graph.node.extend(reversed(kept))
    initializers = [tensor for tensor in graph.initializer if tensor.name in needed]
    del graph.initializer[:]
    graph.initializer.extend(initializers)
    # Old files list their initializers among the inputs.
    named = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in graph.input if value.name not in named]
    del graph.input[:]
    graph.input.extend(inputs)
    del graph.value_info[:]  # stale once the batch is symbolic
    return copy


def _outer_names(node: onnx.NodeProto) -> set[str]:
    """Names that the subgraphs of a node (If, Loop) may read from outside."""
    names: set[str] = set()
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            for inner in graph.node:
                names.update(inner.input)
                names |= _outer_names(inner)
            names.update(value.name for value in graph.output)
    return names


def _check_input(model: onnx.ModelProto, size: tuple[int, int] | None) -> tuple[int, int]:
    """Check inputs and output; return (height, width)."""
    _opset(model)
    inputs = model.graph.input
    if len(inputs) != 1:
        raise OnnxError(f"the ONNX has {len(inputs)} inputs ({[value.name for value in inputs]}); expected one picture")
    wanted = "expected float32 [batch, 3, height, width]"
    found = _describe(inputs[0])
    tensor = inputs[0].type.tensor_type
    if tensor.elem_type != TensorProto.FLOAT:
        hint = "; is it a serving ONNX already?" if tensor.elem_type == TensorProto.UINT8 else ""
        raise OnnxError(f"the ONNX's input is {found}; {wanted}{hint}")
    dimensions = [d.dim_value if d.HasField("dim_value") else 0 for d in tensor.shape.dim]
    if len(dimensions) != 4 or dimensions[1] not in (0, 3) or dimensions[0] > 1:
        raise OnnxError(f"the ONNX's input is {found}; {wanted}")
    output = model.graph.output[0]
    if output.type.tensor_type.elem_type != TensorProto.FLOAT:
        raise OnnxError(f"the ONNX's first output is {_describe(output)}; expected float32 [batch, 1, height, width]")
    fixed = tuple(dimensions[2:])
    if 0 in fixed:
        if size is None:
            raise OnnxError(f"the ONNX's input is {found}: it leaves the size open; choose one with --size")
        height, width = (have or want for have, want in zip(fixed, size, strict=True))
    else:
        height, width = fixed
    if size is not None and (height, width) != size:
        raise OnnxError(f"the ONNX's input is {found}; it cannot be used at {size[0]}x{size[1]}: leave out --size")
    return height, width


def _describe(value: onnx.ValueInfoProto) -> str:
    tensor = value.type.tensor_type
    dimensions = [str(d.dim_value) if d.HasField("dim_value") else d.dim_param or "?" for d in tensor.shape.dim]
    dtype = TensorProto.DataType.Name(tensor.elem_type).lower()
    return f"{value.name!r} {'float32' if dtype == 'float' else dtype} [{', '.join(dimensions)}]"


def _set_batch(model: onnx.ModelProto, batch: int | None, height: int, width: int) -> None:
    """Write batch (None: symbolic), channels, height and width into the input; open the output's batch."""
    first = model.graph.input[0].type.tensor_type.shape
    for dimension, value in zip(first.dim, (batch, 3, height, width), strict=True):
        dimension.Clear()
        if value is None:
            dimension.dim_param = BATCH_DIMENSION
        else:
            dimension.dim_value = value
    shape = model.graph.output[0].type.tensor_type.shape
    if batch is None and shape.dim:
        shape.dim[0].dim_param = BATCH_DIMENSION


def _scales_instead_of_sizes(model: onnx.ModelProto, height: int, width: int) -> None:
    """Give every Resize by whole factors constant scales in place of sizes.

    Public exports compute the sizes from the batch (a chain of Shape, Slice, Concat for every Resize), or have batch 1
    written into them; scales know nothing of the batch. The shapes are those of a run with one picture.
    """
    resizes = [node for node in model.graph.node if node.op_type == "Resize" and len(node.input) == 4]
    if not resizes:
        return
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    del probe.graph.output[:]
    names = dict.fromkeys(name for node in resizes for name in (node.input[0], node.output[0]))
    probe.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name != model.graph.input[0].name)
    picture = np.zeros((1, 3, height, width), np.float32)
    shapes = {name: array.shape for name, array in run_outputs(probe, picture).items()}
    shapes[model.graph.input[0].name] = picture.shape
    for index, node in enumerate(resizes):
        before, after = shapes[node.input[0]], shapes[node.output[0]]
        if (
            len(before) != 4
            or before[:2] != after[:2]
            or any(new % old for old, new in zip(before, after, strict=True))
        ):
            continue
        scales = np.asarray([1, 1, after[2] // before[2], after[3] // before[3]], np.float32)
        name = f"resize_scales_{index}"
        model.graph.initializer.append(numpy_helper.from_array(scales, name))
        del node.input[2:]
        node.input.append(name)


def _rows_equal_singles(model: onnx.ModelProto, height: int, width: int) -> bool:
    """Whether a run of two different rows gives what two runs of one row give."""
    rows = np.random.default_rng(0).standard_normal((2, 3, height, width)).astype(np.float32)
    together = run_model(model, rows)
    singles = np.concatenate([run_model(model, rows[i : i + 1]) for i in range(2)])
    return together.shape == singles.shape and bool(np.allclose(together, singles, rtol=1e-4, atol=1e-4))
