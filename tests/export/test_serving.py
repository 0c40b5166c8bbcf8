"""The wrap around a core: its form, its arithmetic, public ONNX files, and files that cannot be wrapped."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxslim
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from matteserve_client._contract import Numerics
from matteserve_export import OnnxError
from matteserve_export._session import make_runner, run_model
from matteserve_export.compare import normalise, reference_alpha
from matteserve_export.serving import Core, ServingConfig, build_serving, load_core, prepare_core
from matteserve_export.to_onnx import count_nodes

SIZE = 64
FLOAT = TensorProto.FLOAT
OpModel = Callable[..., onnx.ModelProto]
PublicOnnx = Callable[..., Path]


def _levels(ours: NDArray[np.uint8], theirs: NDArray[np.uint8]) -> int:
    assert ours.dtype == theirs.dtype == np.uint8
    return int(np.abs(ours.astype(int) - theirs.astype(int)).max())


def _constant_core(op_model: OpModel, value: float) -> Core:
    """A core whose map is the same number everywhere, whatever the picture."""
    model = op_model(
        "ReduceMean", inputs=((FLOAT, ("batch", 3, SIZE, SIZE)),), output=(FLOAT, ("batch", 1, SIZE, SIZE)), axes=[1]
    )
    model.graph.node[0].output[0] = "mean"
    model.graph.initializer.append(numpy_helper.from_array(np.float32(0), "nothing"))
    model.graph.initializer.append(numpy_helper.from_array(np.float32(value), "value"))
    model.graph.node.append(onnx.helper.make_node("Mul", ["mean", "nothing"], ["zero"]))
    model.graph.node.append(onnx.helper.make_node("Add", ["zero", "value"], ["out"]))
    return Core(model, SIZE, SIZE, batched=True)


def _shape(value: onnx.ValueInfoProto) -> tuple[int, list[int | str]]:
    tensor = value.type.tensor_type
    return tensor.elem_type, [d.dim_param or d.dim_value for d in tensor.shape.dim]


@pytest.mark.parametrize("opset", [11, 13, 17, 18])
@pytest.mark.parametrize(
    ("sigmoid", "min_max", "numerics"),
    [
        (False, True, "reference"),
        (True, False, "reference"),
        (True, True, "reference"),
        (False, False, "reference"),
        (False, True, "rembg"),
        (True, True, "rembg"),
    ],
)
def test_the_wrap_equals_numpy(
    public_onnx: PublicOnnx,
    scenes: NDArray[np.uint8],
    imagenet: ServingConfig,
    opset: int,
    sigmoid: bool,
    min_max: bool,
    numerics: Numerics,
) -> None:
    config = dataclasses.replace(imagenet, sigmoid=sigmoid, min_max=min_max, numerics=numerics)
    # Rows of different maxima, a black one among them: every row is divided by its own.
    scenes = np.stack([scenes[0] // 3, scenes[1] // 2, 0 * scenes[0]]) if numerics == "rembg" else scenes
    original = load_core(public_onnx(opset=opset))
    serving = build_serving(prepare_core(original), config)
    reference = make_runner(original)
    expected = np.concatenate([reference_alpha(reference(normalise(row[None], config)), config) for row in scenes])
    assert np.ptp(expected) > 30  # a flat expectation would prove nothing
    assert _levels(make_runner(serving)(scenes), expected) <= 1


def test_rembgs_numerics_are_division_by_the_largest_sample_and_truncation(
    op_model: OpModel, imagenet: ServingConfig
) -> None:
    picture = np.full((1, SIZE, SIZE, 3), 100, np.uint8)
    picture[0, 0] = 50
    config = ServingConfig((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), numerics="rembg")
    assert normalise(picture, config).max() == 1.0
    assert normalise(picture, config).min() == 0.5
    assert normalise(0 * picture, config).max() == 0.0
    almost = np.full((1, 1, SIZE, SIZE), 0.999, np.float32)
    assert reference_alpha(almost, config).max() == 254
    assert reference_alpha(almost, dataclasses.replace(config, numerics="reference")).max() == 255
    run = make_runner(build_serving(_constant_core(op_model, 0.999), config))
    assert run(picture).max() == 254


def test_form_of_the_serving_graph(public_onnx: PublicOnnx, imagenet: ServingConfig) -> None:
    core = prepare_core(load_core(public_onnx()))
    serving = build_serving(core, dataclasses.replace(imagenet, min_max=True))
    assert core.batched
    assert [(v.name, *_shape(v)) for v in serving.graph.input] == [
        ("image", TensorProto.UINT8, ["batch", SIZE, SIZE, 3])
    ]
    assert [(v.name, *_shape(v)) for v in serving.graph.output] == [("alpha", TensorProto.UINT8, ["batch", SIZE, SIZE])]
    readers = [node.op_type for node in serving.graph.node if "image" in node.input]
    assert readers == ["Cast"]  # TensorRT takes a uint8 input in no other way
    assert count_nodes(serving)["Conv"] == 2  # the side output's is gone
    assert not {"Shape", "Gather"} & count_nodes(serving).keys()


@pytest.mark.parametrize("value", [0.0, 0.25, 1.0, 1.7, -3.0])
@pytest.mark.parametrize("min_max", [True, False])
def test_a_flat_map_keeps_its_own_values(
    op_model: OpModel, scenes: NDArray[np.uint8], imagenet: ServingConfig, value: float, min_max: bool
) -> None:
    config = dataclasses.replace(imagenet, min_max=min_max)
    alpha = run_model(build_serving(_constant_core(op_model, value), config), scenes)
    assert np.unique(alpha).tolist() == [round(min(max(value, 0), 1) * 255)]


def test_min_max_is_per_image(public_onnx: PublicOnnx, scenes: NDArray[np.uint8], imagenet: ServingConfig) -> None:
    """A dim picture in a batch with others is stretched as it is alone."""
    serving = make_runner(
        build_serving(prepare_core(load_core(public_onnx())), dataclasses.replace(imagenet, min_max=True))
    )
    batch = np.stack([scenes[0], scenes[1] // 16 + 100, scenes[2]])
    alpha = serving(batch)
    assert alpha.min(axis=(1, 2)).tolist() == [0, 0, 0]
    assert alpha.max(axis=(1, 2)).tolist() == [255, 255, 255]
    assert _levels(alpha[1:2], serving(batch[1:2])) == 0


def test_rounding_is_to_the_nearest(op_model: OpModel, scenes: NDArray[np.uint8], imagenet: ServingConfig) -> None:
    core = _constant_core(op_model, 99.6 / 255)
    assert run_model(build_serving(core, imagenet), scenes[:1]).max() == 100


def test_a_baked_batch_becomes_max_batch_size_1(
    public_onnx: PublicOnnx, scenes: NDArray[np.uint8], imagenet: ServingConfig, caplog: pytest.LogCaptureFixture
) -> None:
    original = load_core(public_onnx(baked_batch=True))
    core = prepare_core(original)
    assert not core.batched
    assert "works for single pictures only" in caplog.text
    serving = build_serving(core, imagenet)
    # Triton asks for a symbolic batch even where max_batch_size is 1.
    assert _shape(serving.graph.input[0])[1] == ["batch", SIZE, SIZE, 3]
    expected = reference_alpha(run_model(original, normalise(scenes[:1], imagenet)), imagenet)
    assert _levels(run_model(serving, scenes[:1]), expected) <= 1


def test_a_batch_written_into_resize_sizes_is_undone(
    public_onnx: PublicOnnx, scenes: NDArray[np.uint8], imagenet: ServingConfig
) -> None:
    """Simplifying a static export turns its size arithmetic into constants with batch 1 in them."""
    original = onnxslim.slim(load_core(public_onnx()))
    sizes = next(node.input[3] for node in original.graph.node if node.op_type == "Resize")
    constants = {tensor.name: numpy_helper.to_array(tensor).tolist() for tensor in original.graph.initializer}
    assert constants[sizes] == [1, 1, SIZE, SIZE]
    core = prepare_core(original)
    assert core.batched
    alpha = run_model(build_serving(core, imagenet), scenes)
    single = reference_alpha(run_model(original, normalise(scenes[3:4], imagenet)), imagenet)
    assert _levels(alpha[3:4], single) <= 1


def test_an_open_size_is_chosen(public_onnx: PublicOnnx) -> None:
    model = load_core(public_onnx(batch=True))
    with pytest.raises(OnnxError, match=r"'image' float32 \[n, 3, h, w\]: it leaves the size open; choose .* --size"):
        prepare_core(model)
    core = prepare_core(model, (96, 64))
    assert (core.height, core.width, core.batched) == (96, 64, True)


def test_a_fixed_size_cannot_be_changed(public_onnx: PublicOnnx) -> None:
    with pytest.raises(OnnxError, match="cannot be used at 96x96: leave out --size"):
        prepare_core(load_core(public_onnx()), (96, 96))


PICTURE = (FLOAT, (1, 3, SIZE, SIZE))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"inputs": ((TensorProto.FLOAT16, (1, 3, SIZE, SIZE)),)}, r"'in0' float16 \[1, 3, 64, 64\]; expected float32"),
        ({"inputs": ((TensorProto.UINT8, (1, SIZE, SIZE, 3)),)}, "is it a serving ONNX already"),
        ({"inputs": ((FLOAT, (3, SIZE, SIZE)),)}, r"float32 \[3, 64, 64\]; expected float32 \[batch, 3,"),
        ({"inputs": ((FLOAT, (1, 1, SIZE, SIZE)),)}, r"float32 \[1, 1, 64, 64\]; expected"),
        ({"inputs": ((FLOAT, (1, SIZE, SIZE, 3)),)}, r"float32 \[1, 64, 64, 3\]; expected"),
        ({"inputs": ((FLOAT, (4, 3, SIZE, SIZE)),)}, r"float32 \[4, 3, 64, 64\]; expected"),
        ({"operator": "Add", "inputs": (PICTURE, PICTURE)}, r"has 2 inputs \(\['in0', 'in1'\]\)"),
        ({"output": (TensorProto.FLOAT16, (1, 3, SIZE, SIZE))}, "first output is 'out' float16"),
        ({}, r"first output has shape \[1, 3, 64, 64\]; expected one map"),
        ({"opset": 10}, "operator set 10; at least 11 is needed"),
        ({"operator": "NoSuchOperator"}, "ONNX Runtime cannot run this model"),
    ],
)
def test_an_onnx_that_does_not_fit(op_model: OpModel, spec: dict[str, object], message: str) -> None:
    with pytest.raises(OnnxError, match=message):
        prepare_core(op_model(**spec))


def test_no_output(op_model: OpModel) -> None:
    model = op_model()
    del model.graph.output[:]
    with pytest.raises(OnnxError, match="has no output"):
        prepare_core(model)


def test_an_invalid_core_is_noticed(op_model: OpModel, imagenet: ServingConfig) -> None:
    core = Core(op_model("NoSuchOperator"), SIZE, SIZE, batched=True)
    with pytest.raises(OnnxError, match="the wrapped model is not valid ONNX"):
        build_serving(core, imagenet)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"", "not an ONNX model"),
        (b"not a protobuf at all \xff\xff\xff", "not an ONNX model, or it is cut short"),
        (b"PK\x03\x04 a torch checkpoint", "not an ONNX model"),
        ("cut", "not an ONNX model, or it is cut short"),
    ],
)
def test_not_an_onnx(public_onnx: PublicOnnx, tmp_path: Path, content: bytes | str | None, message: str) -> None:
    path = tmp_path / "model.onnx"
    if content == "cut":
        path.write_bytes(public_onnx().read_bytes()[:-200])
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(OnnxError, match=message):
        load_core(path)


def test_external_data(public_onnx: PublicOnnx, tmp_path: Path, scenes: NDArray[np.uint8]) -> None:
    model = onnx.load(str(public_onnx()))
    path = tmp_path / "model.onnx"
    onnx.save_model(model, str(path), save_as_external_data=True, location="weights.bin", size_threshold=0)
    assert prepare_core(load_core(path)).batched
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(OnnxError, match="its weights are in external files that are missing"):
        load_core(path)
