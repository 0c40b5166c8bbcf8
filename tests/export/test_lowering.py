"""`DeformConv` written with GridSample and Conv computes the same, in ONNX Runtime and against recorded results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from matteserve_export import OnnxError
from matteserve_export.lowering import lower_deform_conv
from matteserve_export.to_onnx import count_nodes

RECORDED = Path(__file__).parent / "conformance" / "deform_conv2d.npz"


def deform_conv(
    weight: NDArray[np.float32],
    size: tuple[int, int],
    *,
    masked: bool = True,
    bias: bool = False,
    opset: int = 19,
    dtype: int = TensorProto.FLOAT,
    batch: int | str = "batch",
    **attributes: Any,
) -> onnx.ModelProto:
    """A model of one DeformConv; inputs x, offset and mask."""
    _, channels, kh, kw = weight.shape
    channels *= attributes.get("group", 1)
    pads, strides = attributes.get("pads", [0] * 4), attributes.get("strides", [1, 1])
    dilations = attributes.get("dilations", [1, 1])
    out = [
        (side + pads[axis] + pads[axis + 2] - dilations[axis] * (kernel - 1) - 1) // strides[axis] + 1
        for axis, (side, kernel) in enumerate(zip(size, (kh, kw), strict=True))
    ]
    values = {"x": [batch, channels, *size], "offset": [batch, 2 * kh * kw, *out], "mask": [batch, kh * kw, *out]}
    if not masked:
        del values["mask"]
    inputs = ["x", "w", "offset", "b" if bias else "", "mask" if masked else ""]
    while not inputs[-1]:
        inputs.pop()
    constants = [numpy_helper.from_array(weight.astype(helper.tensor_dtype_to_np_dtype(dtype)), "w")]
    if bias:
        constants.append(numpy_helper.from_array(np.arange(len(weight), dtype=np.float32), "b"))
    graph = helper.make_graph(
        [helper.make_node("DeformConv", inputs, ["y"], name="deform", **attributes)],
        "one",
        [helper.make_tensor_value_info(name, dtype, shape) for name, shape in values.items()],
        [helper.make_tensor_value_info("y", dtype, [batch, len(weight), *out])],
        constants,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)


def run(model: onnx.ModelProto, *arrays: NDArray[Any]) -> NDArray[Any]:
    import onnxruntime

    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    return np.asarray(session.run(None, dict(zip(names, arrays, strict=True)))[0])


def drawn(model: onnx.ModelProto, batch: int, spread: float = 3.0) -> list[NDArray[np.float32]]:
    """Inputs whose offsets reach over the borders."""
    rng = np.random.default_rng(5)
    shapes = [[batch, *(d.dim_value for d in v.type.tensor_type.shape.dim[1:])] for v in model.graph.input]
    scales = (1.0, spread, 1.0)
    return [(rng.standard_normal(s) * k).astype(np.float32) for s, k in zip(shapes, scales, strict=False)]


@pytest.mark.parametrize("case", range(5))
def test_recorded_results(case: int) -> None:
    """What the official BiRefNet's deformable convolution gave (1x1, 3x3 and 7x7 kernels, batches of 1 and 2)."""
    with np.load(RECORDED) as recorded:
        x, offset, mask, weight, padding, expected = (
            recorded[f"{case}/{name}"] for name in ("input", "offset", "mask", "weight", "padding", "output")
        )
    lowered = lower_deform_conv(deform_conv(weight, x.shape[2:], pads=[int(padding)] * 4))
    np.testing.assert_allclose(run(lowered, x, offset, mask), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"masked": False},
        {"bias": True},
        {"bias": True, "masked": False},
        {"pads": [3, 1, 2, 0]},
        {"strides": [2, 1], "pads": [1, 1, 1, 1]},
        {"dilations": [2, 3], "pads": [2, 2, 2, 2]},
        {"group": 2},
        {"kernel_shape": [3, 5]},
    ],
    ids=str,
)
def test_equals_onnxruntime(options: dict[str, Any]) -> None:
    """Every attribute that DeformConv has, height and width not equal, and several batches through one graph."""
    rng = np.random.default_rng(1)
    weight = rng.standard_normal((4, 4 // options.get("group", 1), 3, 5)).astype(np.float32)
    native = deform_conv(weight, (17, 12), **options)
    lowered = lower_deform_conv(native)
    onnx.checker.check_model(lowered, full_check=True)
    assert "DeformConv" not in count_nodes(lowered)
    assert "DeformConv" in count_nodes(native)
    for batch in (1, 3):
        arrays = drawn(native, batch)
        np.testing.assert_allclose(run(lowered, *arrays), run(native, *arrays), rtol=0, atol=5e-5)


@pytest.mark.parametrize("mistake", ["x and y swapped", "align_corners", "no mask"])
def test_the_comparison_has_teeth(mistake: str) -> None:
    """Mistakes that such a rewrite invites are far outside of the tolerance."""
    weight = np.random.default_rng(1).standard_normal((4, 4, 3, 3)).astype(np.float32)
    native = deform_conv(weight, (16, 16), pads=[1] * 4)
    lowered = lower_deform_conv(native)
    nodes = {node.name: node for node in lowered.graph.node}
    if mistake == "x and y swapped":
        lowered.graph.node.remove(nodes["deform/offset_xy"])
        nodes["deform/offset_grid"].input[0] = nodes["deform/offset_map"].output[0]
    elif mistake == "align_corners":
        next(a for a in nodes["deform/samples"].attribute if a.name == "align_corners").i = 1
    else:
        nodes["deform"].input[0] = nodes["deform/samples"].output[0]
    arrays = drawn(native, 1)
    assert np.abs(run(lowered, *arrays) - run(native, *arrays)).max() > 0.1


def test_half_precision_samples_at_full_coordinates() -> None:
    """In a half precision graph the grid stays float32: sampling is as exact as the float32 graph's."""
    weight = np.eye(2, dtype=np.float32).reshape(2, 2, 1, 1)
    half = lower_deform_conv(deform_conv(weight, (4, 1024), dtype=TensorProto.FLOAT16))
    ramp = np.broadcast_to(np.arange(1024, dtype=np.float16), (1, 2, 4, 1024)).copy()
    offset = np.zeros((1, 2, 4, 1024), np.float16)
    offset[:, 1] = 0.25
    alpha = run(half, ramp, offset, np.ones((1, 1, 4, 1024), np.float16))
    inner = alpha[0, 0, :, :-1].astype(np.float32)
    np.testing.assert_array_equal(inner, (ramp[0, 0, :, :-1].astype(np.float32) + 0.25).astype(np.float16))
    onnx.checker.check_model(half, full_check=True)


def test_constants_are_small() -> None:
    """The base grid is not written out: 7x7 taps at 64x64 would be 1.6 MB."""
    weight = np.zeros((8, 4, 7, 7), np.float32)
    native = deform_conv(weight, (64, 64), pads=[3] * 4)
    assert lower_deform_conv(native).ByteSize() - native.ByteSize() < 12_000
    assert len(lower_deform_conv(native).graph.node) == 13


def test_equal_constants_are_stored_once_whatever_the_number_of_nodes() -> None:
    weight = np.zeros((4, 4, 3, 3), np.float32)
    once = deform_conv(weight, (16, 16), pads=[1] * 4)
    twice = deform_conv(weight, (16, 16), pads=[1] * 4)
    second = onnx.NodeProto()
    second.CopyFrom(twice.graph.node[0])
    twice.graph.node[0].output[0] = second.input[0] = "between"
    second.name = "second"
    twice.graph.node.append(second)
    assert len(lower_deform_conv(twice).graph.initializer) == len(lower_deform_conv(once).graph.initializer)
    onnx.checker.check_model(lower_deform_conv(twice), full_check=True)


def test_a_graph_without_it_is_returned_as_it_is(op_model: Any) -> None:
    model = op_model()
    assert lower_deform_conv(model) is model


def test_refusals() -> None:
    weight = np.zeros((4, 4, 3, 3), np.float32)
    with pytest.raises(OnnxError, match=r"operator set 22; .* 16 to 19: .* issue 4646\): export with operator set 19"):
        lower_deform_conv(deform_conv(weight, (8, 8), opset=22))
    two = deform_conv(weight, (8, 8), offset_group=2)
    with pytest.raises(OnnxError, match="DeformConv 'deform' cannot be lowered: it has 2 offset groups; only one"):
        lower_deform_conv(two)
    opened = deform_conv(weight, (8, 8))
    opened.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "height"
    with pytest.raises(
        OnnxError, match=r"its input 'x' has shape \[None, 4, None, 8\]; height and width must be fixed"
    ):
        lower_deform_conv(opened)
