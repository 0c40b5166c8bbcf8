"""Plans, really built by NVIDIA's parser and compiler (TensorRT for RTX needs no GPU for it), and what is refused."""

from __future__ import annotations

import ctypes
import logging
import shutil
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from matteserve_export import EngineBuildError, engine
from matteserve_export._gpu import Gpu, find_gpu
from matteserve_export.engine import (
    CompilerOptions,
    EngineConfig,
    build_plan,
    check_machine,
    load_module,
    parse_network,
)
from matteserve_export.lowering import lower_deform_conv
from matteserve_export.models import MODEL_BUILDERS
from matteserve_export.network import NetworkSummary
from matteserve_export.precision import convert
from support.serving_graphs import SIZE, exported, sampled, small, wire

rtx = pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT for RTX is not installed: matteserve[rtx]")

DEMO = Path(__file__).parents[2] / "model_repository" / "demo_onnx_fp32" / "1" / "model.onnx"
FULL_SIZE = [("u2netp", 320), ("u2net", 320), ("isnet", 1024)]
REDUCED = [("birefnet_lite", 128), ("birefnet_pvt_v2_b2", 128), ("birefnet_swin_s", 128)]
# Swin-B and Swin-L are Swin-S with wider layers: as many nodes, twice the time, several times the memory.
SLOW = [("birefnet_swin_b", 128), ("birefnet", 128), ("birefnet_lite", 1024), ("birefnet", 1024)]


_SLOW = (pytest.mark.slow, pytest.mark.timeout(1800))


@pytest.fixture(
    scope="module",
    params=[*FULL_SIZE, *REDUCED, *(pytest.param(p, marks=_SLOW) for p in SLOW)],
    ids=lambda case: f"{case[0]}-{case[1]}",
)
def architecture(request: pytest.FixtureRequest) -> tuple[str, int, onnx.ModelProto]:
    """Name, size and serving graph of an architecture; one at a time, they are large."""
    name, size = request.param
    return name, size, exported(name, size)


@pytest.fixture
def save(tmp_path: Path) -> Callable[[onnx.ModelProto], Path]:
    def write(model: onnx.ModelProto) -> Path:
        path = tmp_path / "model.onnx"
        onnx.save(model, path)
        return path

    return write


def test_every_architecture_is_here() -> None:
    assert {name for name, _ in (*FULL_SIZE, *REDUCED, *SLOW)} == set(MODEL_BUILDERS)


def test_every_architecture_becomes_a_plan(
    architecture: tuple[str, int, onnx.ModelProto], save: Callable[[onnx.ModelProto], Path], tmp_path: Path
) -> None:
    name, size, serving = architecture
    deformable = sum(node.op_type == "DeformConv" for node in serving.graph.node)
    assert (deformable > 0) == name.startswith("birefnet")
    lowered = lower_deform_conv(serving)
    plans = {}
    for precision in ("fp32", "fp16"):
        path = save(convert(lowered, precision))
        plans[precision] = build_plan(path, tmp_path / "model.plan", EngineConfig("rtx", precision))
        _assert_wire(path, size)
    single, half = plans["fp32"].network, plans["fp16"].network
    assert single.products == {"fp32": sum(single.products.values())}
    assert sum(single.products.values()) == sum(half.products.values()) > 100
    assert half.products["fp16"] / sum(half.products.values()) > 0.9
    assert single.grid_samples == half.grid_samples == deformable
    # Half the weights, or the engine is float32 in all but name.
    assert plans["fp16"].size < (0.75 if name == "u2netp" else 0.6) * plans["fp32"].size
    for plan in plans.values():
        assert plan.size == (tmp_path / "model.plan").stat().st_size or plan is plans["fp32"]
        assert plan.builder["profile"] == {"min": 1, "opt": 4, "max": 8}
        assert plan.builder["compute_capabilities"] == ["8.0", "8.6", "8.9", "12.0", "12.1"]
        assert "TF32" not in plan.builder["flags"]


def _assert_wire(path: Path, size: int) -> None:
    """The parsed network itself, read without the code under test."""
    logger = engine._logger(rtx)  # the compiler keeps to the first logger that it is given
    builder = rtx.Builder(logger)
    network = builder.create_network(1 << int(rtx.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = rtx.OnnxParser(network, logger)
    assert parser.parse_from_file(str(path))
    (image,) = (network.get_input(index) for index in range(network.num_inputs))
    (alpha,) = (network.get_output(index) for index in range(network.num_outputs))
    assert (image.name, image.dtype, tuple(image.shape)) == ("image", rtx.uint8, (-1, size, size, 3))
    assert (alpha.name, alpha.dtype, tuple(alpha.shape)) == ("alpha", rtx.uint8, (-1, size, size))
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == rtx.LayerType.GRID_SAMPLE:
            layer.__class__ = rtx.IGridSampleLayer
            assert layer.interpolation_mode == rtx.InterpolationMode.LINEAR
            assert (layer.sample_mode, layer.align_corners) == (rtx.SampleMode.FILL, False)
            assert layer.get_input(0).dtype == layer.get_input(1).dtype


def test_bf16(save: Callable[[onnx.ModelProto], Path]) -> None:
    summary = parse_network(save(convert(onnx.load(DEMO), "bf16")), "rtx", "bf16")
    assert summary.products == {"bf16": 119}


def test_int8(save: Callable[[onnx.ModelProto], Path]) -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (2, SIZE, SIZE, 3), np.uint8)
    summary = parse_network(save(convert(small(), "int8", pictures)), "rtx", "int8")
    assert summary.quantizers > 0


def test_everything_is_logged_and_reported(
    save: Callable[[onnx.ModelProto], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[tuple[str, int, int]] = []
    options = CompilerOptions(compute_capabilities=("8.9", "12.0"), tf32=True, optimization_level=1)
    config = EngineConfig("rtx", opt_batch_size=2, max_batch_size=3, options=options)
    with caplog.at_level(logging.INFO, "matteserve_export"):
        plan = build_plan(save(sampled()), tmp_path / "p", config, lambda *phase: seen.append(phase))
    assert plan.builder == {
        "name": "tensorrt_rtx",
        "version": rtx.__version__,
        "compute_capabilities": ["8.9", "12.0"],
        "gpu": None,
        "profile": {"min": 1, "opt": 2, "max": 3},
        "flags": ["STRONGLY_TYPED", "TF32"],
        "version_compatible": False,
        "hardware_compatibility": "none",
        "seconds": plan.builder["seconds"],
    }
    for text in ("compute_capabilities ['8.9', '12.0']", "'max': 3", "TF32", "optimization level 1", "built p: "):
        assert text in caplog.text
    assert {"Building engine", "Preparing graph for optimization"} <= {phase for phase, _, _ in seen}
    assert all(0 <= done <= total for _, done, total in seen)
    # What is known of TensorRT's GridSample is said before anybody serves it.
    assert plan.hazards
    assert "known wrong result: float32 GridSample differs" in caplog.text


def test_an_interrupt_stops_the_compiler(save: Callable[[onnx.ModelProto], Path], tmp_path: Path) -> None:
    def interrupt(phase: str, done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_plan(save(sampled()), tmp_path / "p", EngineConfig("rtx"), interrupt)
    assert not (tmp_path / "p").exists()


# What the parser read.


@pytest.mark.parametrize("opset", [16, 17, 19, 20, 22])
def test_grid_samples_are_read_as_bilinear(opset: int, save: Callable[[onnx.ModelProto], Path]) -> None:
    """This parser reads the new name, too; one that does not is found by the next test's check."""
    mode = "bilinear" if opset < 20 else "linear"
    assert parse_network(save(sampled(mode, opset=opset)), "rtx", "fp32").grid_samples == 1


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"mode": "nearest"}, "read GridSample 'sample' as NEAREST, FILL, align_corners False, FLOAT at FLOAT"),
        ({"align_corners": 1}, "as LINEAR, FILL, align_corners True"),
        ({"padding_mode": "border"}, "as LINEAR, CLAMP, align_corners False"),
    ],
)
def test_a_grid_sample_of_another_kind_is_refused(
    attributes: dict[str, Any], message: str, save: Callable[[onnx.ModelProto], Path]
) -> None:
    with pytest.raises(EngineBuildError, match=f"{message}.*issue 4646.: export with operator set 16 to 19"):
        parse_network(save(sampled(**attributes)), "rtx", "fp32")


def _identity(**options: Any) -> onnx.ModelProto:
    """One channel of the picture, through a wire that is not quite the product's."""
    names = options.get("names", ("image", "alpha"))
    nodes = [
        helper.make_node("Cast", [names[0]], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Gather", ["float", "channel"], ["map"], axis=3),
        helper.make_node("Cast", ["map"], [names[1]], to=options.get("dtype", TensorProto.UINT8)),
    ]
    return wire(nodes, [numpy_helper.from_array(np.asarray(0, np.int64), "channel")], **options)


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"names": ("input", "alpha")}, r"input UINT8 \[-1, 32, 32, 3\]"),
        ({"names": ("image", "mask")}, r"mask UINT8 \[-1, 32, 32\]"),
        ({"dtype": TensorProto.FLOAT}, r"image FLOAT \[-1, 32, 32, 3\]"),
        ({"batch": 1}, r"image UINT8 \[1, 32, 32, 3\]"),
        ({"channels": 4}, r"image UINT8 \[-1, 32, 32, 4\]"),
    ],
    ids=str,
)
def test_another_wire_is_refused(
    options: dict[str, Any], found: str, save: Callable[[onnx.ModelProto], Path], tmp_path: Path
) -> None:
    with pytest.raises(
        EngineBuildError, match=rf"another wire format: expected image UINT8 .*found .*{found}.*; build"
    ):
        build_plan(save(_identity(**options)), tmp_path / "p", EngineConfig("rtx"))
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize(
    ("dtype", "claimed", "counted"),
    [
        (TensorProto.FLOAT, "fp16", "2 fp32"),
        (TensorProto.FLOAT, "bf16", "2 fp32"),
        (TensorProto.FLOAT, "int8", "2 fp32"),
        (TensorProto.FLOAT16, "fp32", "2 fp16"),
    ],
)
def test_a_network_that_is_not_what_it_claims_is_refused(
    dtype: int, claimed: str, counted: str, save: Callable[[onnx.ModelProto], Path]
) -> None:
    """TensorRT 11 builds a float32 engine of a float32 graph whatever it is called."""
    with pytest.raises(EngineBuildError, match=rf"is not {claimed}: of its 2 convolutions .* are {counted}"):
        parse_network(save(sampled(dtype=dtype)), "rtx", claimed)


def test_what_the_parser_cannot_take_is_named(save: Callable[[onnx.ModelProto], Path]) -> None:
    """`DeformConv` without lowering: node, operator, and where the remedy is."""
    graph = sampled()
    zeros = numpy_helper.from_array(np.zeros((3, 3, 1, 1), np.float32), "deform_weight")
    graph.graph.initializer.append(zeros)
    sample = next(node for node in graph.graph.node if node.op_type == "GridSample")
    sample.CopyFrom(helper.make_node("DeformConv", ["picture", "deform_weight", "offsets"], ["samples"], name="deform"))
    graph.opset_import[0].version = 19
    with pytest.raises(EngineBuildError, match=r"cannot take model.onnx: deform \(DeformConv\): .*\(see lowering.py\)"):
        parse_network(save(graph), "rtx", "fp32")
    assert parse_network(save(lower_deform_conv(graph)), "rtx", "fp32").grid_samples == 1


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x08\x09"])
def test_a_file_that_is_no_onnx(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(EngineBuildError, match=r"model.onnx holds no network|cannot take model.onnx"):
        parse_network(tmp_path / "model.onnx", "rtx", "fp32")


def test_a_compiler_that_fails_says_why(
    save: Callable[[onnx.ModelProto], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Version-compatible RTX plans need a library that does not exist: the compiler starts, and fails."""
    configure = engine._configure

    def impossible(module: Any, *arguments: Any) -> Any:
        config = configure(module, *arguments)
        config.set_flag(module.BuilderFlag.VERSION_COMPATIBLE)
        return config

    monkeypatch.setattr(engine, "_configure", impossible)
    with pytest.raises(EngineBuildError, match=r"TensorRT for RTX could not compile model.onnx: .*nvinfer_lean"):
        build_plan(save(sampled()), tmp_path / "p", EngineConfig("rtx"))
    assert not (tmp_path / "p").exists()


# What is asked for.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"engine": "onnx"}, "no plan of engine kind 'onnx'; allowed are trt, rtx"),
        ({"opt_batch_size": 9}, "min 1, opt 9, max 8; they must ascend"),
        ({"opt_batch_size": 0}, "min 1, opt 0, max 8"),
        ({"timing_cache": Path("t")}, "timing_cache: TensorRT for RTX has no such thing; it is for engine kind trt"),
        ({"version_compatible": True}, "version_compatible: TensorRT for RTX has no such thing"),
        ({"hardware_compatibility": "ampere_plus"}, "for engine kind trt; an rtx plan names its GPUs"),
        ({"hardware_compatibility": "all"}, "'all' does not exist; allowed are none, ampere_plus, same_compute"),
        ({"compute_capabilities": ("sm89",)}, "compute capability 'sm89' is not one; write it as 8.9"),
        ({"optimization_level": 6}, "optimization level is 6; allowed are 0 to 5"),
        ({"engine": "trt", "compute_capabilities": ("8.9",)}, "for engine kind rtx; TensorRT compiles for the GPU"),
    ],
)
def test_unusable_configurations(arguments: dict[str, Any], message: str) -> None:
    def make(**values: Any) -> EngineConfig:
        named = CompilerOptions.__dataclass_fields__.keys() & values.keys()
        options = CompilerOptions(**{name: values.pop(name) for name in named})
        return EngineConfig(**{"engine": "rtx", "options": options, **values})

    with pytest.raises(EngineBuildError, match=message):
        make(**arguments)


def test_a_compute_capability_that_is_not_compiled_for() -> None:
    config = EngineConfig("rtx", options=CompilerOptions(compute_capabilities=("8.9", "5.2")))
    message = r"compute capability 5.2 is not one that TensorRT for RTX .*; allowed are 7.5, 8.0, 8.6, 8.9, 12.0"
    with pytest.raises(EngineBuildError, match=message):
        check_machine(config)


def test_turing_is_compiled_for_when_it_is_named(save: Callable[[onnx.ModelProto], Path], tmp_path: Path) -> None:
    options = CompilerOptions(compute_capabilities=("7.5",))
    plan = build_plan(save(sampled()), tmp_path / "p", EngineConfig("rtx", options=options))
    assert plan.builder["compute_capabilities"] == ["7.5"]


# The packages.


@pytest.mark.parametrize(
    ("kind", "modules", "message"),
    [
        ("trt", ["tensorrt"], r"needs TensorRT, .*matteserve\[gpu\].*NVIDIA's own package index.*Triton container"),
        (
            "rtx",
            ["tensorrt_rtx", "tensorrt_rtx_bindings"],
            r"needs TensorRT for RTX, .*pip install 'matteserve\[rtx\]'",
        ),
    ],
)
def test_a_missing_package_is_named_with_its_extra(
    kind: Any, modules: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in modules:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(EngineBuildError, match=message):
        load_module(kind)


@pytest.fixture
def tensorrt(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """The compiler for RTX under TensorRT's name and version: the two differ in switches only."""
    module = types.ModuleType("tensorrt")
    module.__dict__.update({**rtx.__dict__, "__name__": "tensorrt", "__version__": "10.13.3.9"})
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    return module


def test_an_old_tensorrt_is_refused(tensorrt: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt, "__version__", "8.6.1")
    with pytest.raises(EngineBuildError, match=r"TensorRT 8.6.1 is too old, at least 10.12 is needed"):
        load_module("trt")


def test_tensorrt_needs_a_gpu(tensorrt: types.ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(engine, "find_gpu", lambda: None)
    message = "compiles on the GPU that will run the plan, and this machine has none .* or build an rtx engine"
    with pytest.raises(EngineBuildError, match=message):
        build_plan(DEMO, tmp_path / "p", EngineConfig("trt"))


@pytest.mark.filterwarnings("ignore:Use Deprecated in TensorRT-RTX:DeprecationWarning")  # its timing cache does nothing
def test_the_way_of_tensorrt(
    tensorrt: types.ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    save: Callable[[onnx.ModelProto], Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Same code, other switches: timing cache, hardware compatibility, the GPU's own compute capability."""
    monkeypatch.setattr(engine, "find_gpu", lambda: Gpu("NVIDIA L4", "8.9"))
    cache = tmp_path / "caches" / "l4.timing"
    options = CompilerOptions(timing_cache=cache, hardware_compatibility="same_compute_capability")
    config = EngineConfig("trt", "fp16", options=options)
    path = save(sampled(dtype=TensorProto.FLOAT16))
    for _ in range(2):  # the second build reads what the first one wrote
        plan = build_plan(path, tmp_path / "p", config)
        assert cache.is_file()
    assert [child.name for child in cache.parent.iterdir()] == ["l4.timing"]
    assert plan.builder["gpu"] == "NVIDIA L4"
    assert plan.builder["compute_capabilities"] == ["8.9"]
    assert (plan.builder["name"], plan.builder["version"]) == ("tensorrt", "10.13.3.9")
    assert plan.builder["hardware_compatibility"] == "same_compute_capability"


def test_a_timing_cache_of_another_gpu(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Only TensorRT itself tells one from another, so it is stood in for."""
    (tmp_path / "cache").write_bytes(b"of an A100")

    class BuilderConfig:
        def create_timing_cache(self, data: bytes) -> bytes:
            return data

        def set_timing_cache(self, cache: bytes, ignore_mismatch: bool) -> bool:
            return cache == b""

    module = types.SimpleNamespace(__name__="tensorrt", __version__="10.13.3.9")
    config = EngineConfig("trt", options=CompilerOptions(timing_cache=tmp_path / "cache"))
    assert engine._load_timing_cache(module, BuilderConfig(), config) == b""
    assert "cache: not a timing cache of this GPU and tensorrt 10.13.3.9; a new one is made" in caplog.text


def test_a_timing_cache_that_cannot_be_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The plan is good without it."""
    (tmp_path / "file").touch()
    engine._save_timing_cache(types.SimpleNamespace(serialize=lambda: b""), tmp_path / "file" / "cache")
    assert "cache: the timing cache could not be written: " in caplog.text


def test_a_compatibility_that_this_tensorrt_does_not_know(
    tensorrt: types.ModuleType, monkeypatch: pytest.MonkeyPatch, save: Callable[[onnx.ModelProto], Path], tmp_path: Path
) -> None:
    monkeypatch.setattr(engine, "find_gpu", lambda: Gpu("NVIDIA L4", "8.9"))
    level = types.SimpleNamespace(NONE=0, AMPERE_PLUS=1)
    monkeypatch.setattr(tensorrt, "HardwareCompatibilityLevel", level)
    options = CompilerOptions(hardware_compatibility="same_compute_capability")
    with pytest.raises(
        EngineBuildError, match=r"TensorRT 10.13.3.9 does not know hardware compatibility 'same_compute"
    ):
        build_plan(save(sampled()), tmp_path / "p", EngineConfig("trt", options=options))


@pytest.mark.parametrize(
    ("kind", "version", "network", "batch", "issues"),
    [
        ("trt", "10.13.3.9", {"grid_samples": 4}, 8, []),
        ("trt", "10.14.1.48", {"grid_samples": 4}, 1, ["4813", "4074"]),
        ("trt", "10.12.0", {"softmaxes": 4}, 8, ["4853"]),
        ("trt", "11.1.0.106", {"softmaxes": 4, "grid_samples": 4}, 8, ["4813", "4074", "4853"]),
        ("trt", "11.1.0.106", {"softmaxes": 4}, 1, []),
        ("trt", "11.1.0.106", {}, 8, []),
        ("rtx", "1.7.1.116", {"softmaxes": 4, "grid_samples": 4}, 8, ["4813", "4074", "4853"]),
    ],
)
def test_known_wrong_results_are_told(kind: Any, version: str, network: Any, batch: int, issues: list[str]) -> None:
    config = EngineConfig(kind, opt_batch_size=1, max_batch_size=batch)
    found = " ".join(engine._hazards(config, version, NetworkSummary(layers=1, products={}, **network)))
    assert [issue for issue in ("4813", "4074", "4853") if issue in found] == issues


# The GPU.


class _Driver:
    """As much of libcuda as is asked; each call returns an error code."""

    def __init__(self, failing: str = "") -> None:
        self.failing = failing

    def __getattr__(self, name: str) -> Callable[..., int]:
        def call(*arguments: Any) -> int:
            if name == "cuDeviceGetName":
                arguments[0].value = b"NVIDIA L4"
            if name == "cuDeviceGetAttribute":
                arguments[0]._obj.value = {75: 8, 76: 9}[arguments[1]]
            return 100 if name == self.failing else 0

        return call


def test_the_driver_is_asked_for_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: _Driver())
    assert find_gpu() == Gpu("NVIDIA L4", "8.9")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: _Driver(failing="cuInit"))  # a driver, but no GPU
    assert find_gpu() is None


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="there is a GPU")
def test_no_driver_is_no_gpu() -> None:
    assert find_gpu() is None


@pytest.mark.gpu
def test_the_gpu_is_found() -> None:
    query = ["nvidia-smi", "--query-gpu=name,compute_cap", "--format=csv,noheader"]
    listed = subprocess.run(query, capture_output=True, text=True, check=True, timeout=60).stdout.splitlines()
    gpu = find_gpu()
    assert gpu is not None
    assert f"{gpu.name}, {gpu.compute_capability}" in listed


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_tensorrt_itself(precision: Any, save: Callable[[onnx.ModelProto], Path], tmp_path: Path) -> None:
    """The real package on a real GPU; then the plan can be opened, too."""
    trt = pytest.importorskip("tensorrt")
    options = CompilerOptions(timing_cache=tmp_path / "timing")
    config = EngineConfig("trt", precision, options=options)
    plan = build_plan(save(convert(onnx.load(DEMO), precision)), tmp_path / "p", config)
    assert plan.builder["version"] == trt.__version__
    assert options.timing_cache is not None
    assert options.timing_cache.stat().st_size > 0
    opened = trt.Runtime(trt.Logger(trt.Logger.ERROR)).deserialize_cuda_engine((tmp_path / "p").read_bytes())
    assert tuple(opened.get_tensor_shape("image")) == (-1, 192, 192, 3)
    assert opened.get_tensor_dtype("alpha") == trt.uint8
    assert tuple(opened.get_tensor_profile_shape("image", 0)[2]) == (8, 192, 192, 3)
