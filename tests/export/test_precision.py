"""Reduced graphs: what is cast and what is kept, what the emulation sees that a CPU does not, and what is refused."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from matteserve_export import PrecisionError
from matteserve_export._names import WRAP_PREFIX
from matteserve_export._session import make_runner
from matteserve_export.compare import gate_graph, graph_runs, make_scenes
from matteserve_export.emulate import activation_peaks, emulate, note
from matteserve_export.precision import KEPT, TOLERANCES, check_precision, convert, kept_nodes, tolerance_for
from matteserve_export.serving import ServingConfig
from support.everything import SIZE, Everything, serve

DEMO = Path(__file__).parents[2] / "model_repository" / "demo_onnx_fp32" / "1" / "model.onnx"

Images = NDArray[np.uint8]


@pytest.fixture(scope="session")
def everything(imagenet: ServingConfig) -> onnx.ModelProto:
    return serve(Everything(), dataclasses.replace(imagenet, min_max=True))


@pytest.fixture(scope="session")
def demo() -> onnx.ModelProto:
    return onnx.load(DEMO)


def types_of(model: onnx.ModelProto) -> dict[str, int]:
    graph = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    return {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.output)}


@pytest.mark.parametrize(("precision", "low"), [("fp16", TensorProto.FLOAT16), ("bf16", TensorProto.BFLOAT16)])
def test_everything_but_what_is_kept_is_stored_low(everything: onnx.ModelProto, precision: str, low: int) -> None:
    before = everything.SerializeToString(deterministic=True)
    reduced = convert(everything, precision)
    assert everything.SerializeToString(deterministic=True) == before
    assert (reduced.graph.input, reduced.graph.output) == (everything.graph.input, everything.graph.output)
    nodes, types = reduced.graph.node, types_of(reduced)
    assert (nodes[0].op_type, nodes[0].input[0], nodes[-1].output[0]) == ("Cast", "image", "alpha")

    kept = kept_nodes(everything)
    assert set(kept.values()) == set(KEPT)
    for node in nodes:
        if node.op_type == "Cast" or types[node.output[0]] not in (TensorProto.FLOAT, low):
            continue
        assert types[node.output[0]] == (TensorProto.FLOAT if node.output[0] in kept else low), node.name
    weights = {tensor.name: tensor.data_type for tensor in reduced.graph.initializer}
    convolutions = [node for node in nodes if node.op_type == "Conv"]
    assert {weights[name] for node in convolutions for name in node.input[1:]} == {low}


def test_what_is_kept(everything: onnx.ModelProto) -> None:
    kept = kept_nodes(everything)
    by_reason = {reason: Counter() for reason in KEPT}
    for node in everything.graph.node:
        if node.output[0] in kept:
            by_reason[kept[node.output[0]]][node.op_type] += 1
            assert (kept[node.output[0]] == "normalisation and alpha") == node.name.startswith(WRAP_PREFIX)
    assert by_reason["last sigmoid"] == {"Sigmoid": 1}
    assert by_reason["sampling coordinates"] == {"Transpose": 1, "Mul": 1, "Add": 1}


def test_no_cast_is_dead_and_none_is_repeated(everything: onnx.ModelProto) -> None:
    reduced = convert(everything, "fp16")
    casts = [node for node in reduced.graph.node if node.op_type == "Cast"]
    made_by_casts = {node.output[0] for node in casts}
    # In: uint8 to float, to fp16. Coordinates: offsets to float, grid to fp16. Out: map to float, alpha to uint8.
    assert len(casts) == 6
    assert len({(node.input[0], node.attribute[0].i) for node in casts}) == len(casts)
    assert not [node.name for node in casts if node.input[0] in made_by_casts]
    names = [tensor.name for tensor in reduced.graph.initializer]
    contents = Counter((t.data_type, tuple(t.dims), t.raw_data) for t in reduced.graph.initializer if len(t.dims) > 1)
    assert len(set(names)) == len(names)
    assert set(contents.values()) == {1}


def test_operators_keep_their_form(everything: onnx.ModelProto) -> None:
    reduced = convert(everything, "fp16")
    types = types_of(reduced)
    operators = Counter(node.op_type for node in reduced.graph.node)
    assert operators - Counter(Cast=operators["Cast"]) == Counter(
        node.op_type for node in everything.graph.node if node.op_type != "Cast"
    )
    (norm,) = (node for node in reduced.graph.node if node.op_type == "LayerNormalization")
    assert types[norm.output[0]] == TensorProto.FLOAT16
    assert next((a.i for a in norm.attribute if a.name == "stash_type"), 1) == TensorProto.FLOAT
    (sample,) = (node for node in reduced.graph.node if node.op_type == "GridSample")
    assert {types[name] for name in sample.input} == {TensorProto.FLOAT16}  # TensorRT wants one dtype


def test_half_the_size(demo: onnx.ModelProto) -> None:
    for precision in ("fp16", "bf16"):
        assert 0.49 < convert(demo, precision).ByteSize() / demo.ByteSize() < 0.53
    assert convert(demo, "fp32") is demo


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8"])
def test_the_trained_model_is_within_tolerance(demo: onnx.ModelProto, precision: str) -> None:
    scenes = make_scenes(2, 192, 192, seed=11)
    reduced = convert(demo, precision, calibration=make_scenes(3, 192, 192, seed=12))
    outcomes = gate_graph(reduced, demo, scenes, tolerance_for(precision, "u2netp"), batch_sizes=(1, 2))
    methods = {"fp16": ["ort-cpu", "emulated"], "bf16": ["emulated"], "int8": ["ort-cpu"]}
    assert [outcome.method for outcome in outcomes] == methods[precision]
    for outcome in outcomes:
        outcome.require()
        assert outcome.not_finite == 0


def test_tolerances_grow_as_bits_go() -> None:
    order = [TOLERANCES[precision] for precision in ("fp32", "fp16", "bf16", "int8")]
    for finer, coarser in itertools.pairwise(order):
        for name in ("max_abs", "p999_abs", "mean_abs"):
            assert getattr(finer, name) < getattr(coarser, name)
        assert finer.min_iou >= coarser.min_iou
    assert dataclasses.astuple(TOLERANCES["fp16"]) == (4 / 255, 3 / 255, 0.3 / 255, 0.999)


# --- emulation -------------------------------------------------------------------------------------------------------


def pointwise(operators: list[tuple[str, str]], low: int) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
    """x, cast to the lower type, through operators with a constant each; emulated."""
    nodes, constants = [helper.make_node("Cast", ["x"], ["v0"], to=low)], []
    for number, (operator, constant) in enumerate(operators):
        value = np.asarray(float(constant), np.float32).astype(helper.tensor_dtype_to_np_dtype(low))
        constants.append(numpy_helper.from_array(value, f"c{number}"))
        nodes.append(helper.make_node(operator, [f"v{number}", f"c{number}"], [f"v{number + 1}"]))
    nodes.append(helper.make_node("Cast", [f"v{len(operators)}"], ["y"], to=TensorProto.FLOAT))
    value_infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "pointwise", value_infos[:1], value_infos[1:], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    emulated = emulate(model)
    onnx.checker.check_model(emulated, full_check=True)
    assert {t.data_type for t in emulated.graph.initializer} <= {TensorProto.FLOAT}
    return make_runner(emulated)


@pytest.mark.parametrize("low", [TensorProto.FLOAT16, TensorProto.BFLOAT16])
def test_every_result_is_rounded_to_the_stored_type(low: int) -> None:
    """Equal to numpy, which rounds after every operation."""
    dtype = helper.tensor_dtype_to_np_dtype(low)
    x = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    ours = pointwise([("Mul", "1.7"), ("Add", "0.3"), ("Div", "0.7")], low)(x)
    theirs = (x.astype(dtype) * dtype.type(1.7) + dtype.type(0.3)) / dtype.type(0.7)
    assert np.array_equal(ours, theirs.astype(np.float32))
    assert not np.array_equal(ours, (x * 1.7 + 0.3) / 0.7)


def test_what_is_beyond_the_range_becomes_infinite() -> None:
    run = pointwise([("Mul", "256"), ("Div", "256")], TensorProto.FLOAT16)
    assert np.array_equal(run(np.array([1, 300, -300], np.float32)), np.array([1, np.inf, -np.inf], np.float32))
    run = pointwise([("Mul", "256"), ("Div", "256")], TensorProto.BFLOAT16)
    assert np.isfinite(run(np.array([300], np.float32))).all()


def test_an_fp32_graph_is_emulated_by_itself(everything: onnx.ModelProto, scenes: Images) -> None:
    assert len(emulate(everything).graph.node) == len(everything.graph.node)
    assert np.array_equal(make_runner(emulate(everything))(scenes), make_runner(everything)(scenes))


def test_an_overflow_is_seen_by_the_emulation(imagenet: ServingConfig, scenes: Images) -> None:
    """ONNX Runtime's CPU keeps float32 between most nodes and may miss it; a GPU would not."""
    serving = serve(Everything(gain=400.0), imagenet)
    on_cpu, emulated = gate_graph(convert(serving, "fp16"), serving, scenes[:2], TOLERANCES["fp16"])
    assert (on_cpu.method, emulated.method) == ("ort-cpu", "emulated")
    assert not emulated.passed
    assert emulated.not_finite == 1
    assert "of the network's output is not finite" in emulated.violations[0]
    with pytest.raises(Exception, match=r"FAILED .*emulated.*nothing was published"):
        emulated.require()
    worst = activation_peaks(serving, scenes[:2])[0]
    assert worst.peak > 65504
    assert worst.operator in ("Conv", "Mul")
    assert note(worst) == ": beyond fp16's 65504, this overflows"
    assert note(dataclasses.replace(worst, peak=32752.0)) == ": 50% of fp16's range"
    assert note(dataclasses.replace(worst, peak=100.0)) == ""
    # bf16 has float32's range.
    (outcome,) = gate_graph(convert(serving, "bf16"), serving, scenes[:2], TOLERANCES["bf16"])
    assert (outcome.method, outcome.not_finite) == ("emulated", 0)


def test_bf16_has_no_kernels_on_the_cpu(everything: onnx.ModelProto) -> None:
    """The day this fails, `graph_runs` can run bf16 as it is."""
    reduced = convert(everything, "bf16")
    assert reduced.opset_import[0].version == 22
    with pytest.raises(Exception, match="Could not find an implementation"):
        make_runner(reduced)
    assert [method for method, _ in graph_runs(reduced)] == ["emulated"]


# --- int8 ------------------------------------------------------------------------------------------------------------


def test_int8_is_what_tensorrt_takes(everything: onnx.ModelProto, scenes: Images) -> None:
    before = everything.SerializeToString(deterministic=True)
    quantised = convert(everything, "int8", scenes)
    assert everything.SerializeToString(deterministic=True) == before
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in quantised.graph.initializer}
    pairs = [node for node in quantised.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    zeros = [constants[node.input[2]] for node in pairs]
    assert all(zero.dtype == np.int8 and not zero.any() for zero in zeros)  # signed and symmetric
    producers = {name: node for node in quantised.graph.node for name in node.output}
    convolutions = [node for node in quantised.graph.node if node.op_type == "Conv"]
    assert len(convolutions) == 4
    for node in convolutions:
        inputs = [producers.get(name) for name in node.input]
        assert [entry.op_type if entry else None for entry in inputs] == ["DequantizeLinear"] * 2 + [None]
        assert constants[inputs[1].input[1]].shape == (constants[inputs[1].input[0]].shape[0],)  # one scale a channel
        assert constants[node.input[2]].dtype == np.float32  # the bias is not quantised
    assert not [node.name for node in pairs if node.output[0] in kept_nodes(everything)]
    assert make_runner(quantised)(scenes).shape == (8, SIZE, SIZE)


def test_calibration_sees_the_range(demo: onnx.ModelProto) -> None:
    """Pictures that show nothing give scales that fit what they show, and nothing else."""
    scenes = make_scenes(2, 192, 192, seed=11)

    def error(calibration: Images) -> float:
        (outcome,) = gate_graph(convert(demo, "int8", calibration), demo, scenes, TOLERANCES["int8"])
        return outcome.difference.mean_abs

    assert error(np.zeros((2, 192, 192, 3), np.uint8)) > 2 * error(make_scenes(4, 192, 192, seed=3))


# --- refusals --------------------------------------------------------------------------------------------------------


def test_unknown_precision(everything: onnx.ModelProto) -> None:
    with pytest.raises(PrecisionError, match="no precision is called 'fp8'; known are: fp32, fp16, bf16, int8"):
        convert(everything, "fp8")
    with pytest.raises(PrecisionError, match="'FP16'"):
        check_precision("FP16")


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (None, "int8 needs pictures that show the range of every activation, and there are none"),
        (np.zeros((0, SIZE, SIZE, 3), np.uint8), "there are none; give a directory"),
        (np.zeros((1, 32, SIZE, 3), np.uint8), r"are uint8 \[1, 32, 64, 3\]; expected uint8 \[N, 64, 64, 3\]"),
        (np.zeros((1, SIZE, SIZE, 3), np.float32), "are float32"),
    ],
)
def test_int8_needs_pictures_of_the_models_size(
    everything: onnx.ModelProto, images: Images | None, message: str
) -> None:
    with pytest.raises(PrecisionError, match=message):
        convert(everything, "int8", images)


@pytest.mark.parametrize("first", ["fp16", "bf16", "int8"])
def test_reduced_twice(everything: onnx.ModelProto, scenes: Images, first: str) -> None:
    reduced = convert(everything, first, scenes)
    with pytest.raises(PrecisionError, match=r"is not fp32 any more .*; convert the fp32 one"):
        convert(reduced, "fp16")


def test_another_wire_format(everything: onnx.ModelProto, op_model: Callable[..., onnx.ModelProto]) -> None:
    with pytest.raises(
        PrecisionError, match=r"'in0' float \[1, 3, 64, 64\] .*expected 'image' uint8 \[batch, H, W, 3\]"
    ):
        convert(op_model(), "fp16")
    with pytest.raises(PrecisionError, match="this ONNX is empty"):
        convert(onnx.ModelProto(), "fp16")
    renamed = onnx.ModelProto()
    renamed.CopyFrom(everything)
    renamed.graph.output[0].name = "mask"
    with pytest.raises(PrecisionError, match="'mask' uint8"):
        convert(renamed, "fp16")


def test_not_wrapped_by_us(everything: onnx.ModelProto) -> None:
    foreign = onnx.ModelProto()
    foreign.CopyFrom(everything)
    for node in foreign.graph.node:
        node.name = node.name.replace(WRAP_PREFIX, "")
    with pytest.raises(PrecisionError, match="was not wrapped by `matteserve export`"):
        convert(foreign, "fp16")


def test_control_flow(everything: onnx.ModelProto) -> None:
    branching = onnx.ModelProto()
    branching.CopyFrom(everything)
    branch = branching.graph.node[3].attribute.add(name="then_branch", type=onnx.AttributeProto.GRAPH)
    branch.g.name = "then"
    with pytest.raises(PrecisionError, match="decides at run time what to compute"):
        convert(branching, "fp16")


def test_a_weight_beyond_the_range(everything: onnx.ModelProto) -> None:
    heavy = onnx.ModelProto()
    heavy.CopyFrom(everything)
    tensor = next(t for t in heavy.graph.initializer if len(t.dims) == 4)
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(1e7), tensor.name))
    with pytest.raises(PrecisionError, match=r"the constant '.*' reaches .*e\+0.*, beyond the 65504 of fp16; serve"):
        convert(heavy, "fp16")
    convert(heavy, "bf16")
