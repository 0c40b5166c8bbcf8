"""The backend for plans: everything that needs no GPU, what it says where there is none, and (gpu) a real plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf import json_format
from tritonclient.grpc import model_config_pb2 as pb

from matteserve_client import GrpcTransport
from matteserve_server import EmbeddedServer, ModelLoadError, ServerOptions
from matteserve_server.plan_backend import batching, cuda, plan
from matteserve_server.plan_backend.config import PlanConfig, PlanError, Tensor
from matteserve_server.plan_backend.plan import PlanTensor
from matteserve_server.repository import read_model
from support.tiny_model import SIZE, write_config, write_repository

IMAGE = Tensor("image", np.dtype(np.uint8), (SIZE, SIZE, 3))
ALPHA = Tensor("alpha", np.dtype(np.uint8), (SIZE, SIZE))


def write_plan_engine(repository: Path, kind: str, library: str) -> Path:
    """Write the engine `tiny_<kind>_fp16` whose plan is no plan, for an instance on whatever there is."""
    folder = repository / f"tiny_{kind}_fp16"
    (folder / "1").mkdir(parents=True)
    config = read_model(repository / "tiny_onnx_fp32").config
    config.name, config.backend, config.default_model_filename = folder.name, library, "model.plan"
    if library == "tensorrt":
        config.platform = "tensorrt_plan"
    config.optimization.cuda.graphs = True
    write_config(repository, config)
    (folder / "1" / "model.plan").write_bytes(b"not a plan")
    return folder


def triton_config(folder: Path, **changes: Any) -> dict[str, Any]:
    """The configuration as Triton gives it to a backend: JSON from the protobuf message."""
    text = json_format.MessageToJson(read_model(folder).config, preserving_proto_field_name=True)
    return {**json.loads(text), **changes}


def arguments(folder: Path, kind: str = "GPU") -> dict[str, str]:
    return {
        "model_repository": str(folder),
        "model_version": "1",
        "model_instance_kind": kind,
        "model_instance_device_id": "0",
    }


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    return write_repository(tmp_path / "repository")


@pytest.fixture
def folder(repository: Path) -> Path:
    return write_plan_engine(repository, "trt", "tensorrt")


def test_configuration_is_read(folder: Path) -> None:
    config = PlanConfig.from_triton(triton_config(folder), arguments(folder))
    assert (config.library, config.max_batch_size, config.device, config.on_gpu) == ("tensorrt", 8, 0, True)
    assert (config.inputs, config.outputs) == ((IMAGE,), (ALPHA,))
    assert config.graph_batch_sizes == (1, 8)
    assert config.pinned
    assert config.path_for("8.9") == folder / "1" / "model.plan"


def test_graphs_and_pinned_memory_follow_the_configuration(folder: Path) -> None:
    specs = [{"batch_size": 4}, {"batch_size": 1}, {"batch_size": 4}]
    optimization = {"cuda": {"graphs": True, "graph_spec": specs}, "input_pinned_memory": {"enable": False}}
    config = PlanConfig.from_triton(triton_config(folder, optimization=optimization), arguments(folder))
    assert (config.graph_batch_sizes, config.pinned) == ((1, 4), False)
    config = PlanConfig.from_triton(triton_config(folder, optimization={}), arguments(folder))
    assert (config.graph_batch_sizes, config.pinned) == ((), True)


def test_mixed_fleet_has_a_file_for_each_gpu(folder: Path) -> None:
    (folder / "1" / "model_8_6.plan").touch()
    raw = triton_config(folder, cc_model_filenames={"8.6": "model_8_6.plan", "9.0": "model_9_0.plan"})
    config = PlanConfig.from_triton(raw, arguments(folder))
    assert config.path_for("8.6").name == "model_8_6.plan"
    assert config.path_for("8.9").name == "model.plan"
    with pytest.raises(PlanError, match=r"no plan at .*model_9_0\.plan; make one with `matteserve build`"):
        config.path_for("9.0")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backend": "tensorflow"}, "backend 'tensorflow' is not one of tensorrt, tensorrt_rtx"),
        ({"max_batch_size": 0}, "max_batch_size is 0"),
        ({"input": [{"name": "image", "data_type": "TYPE_STRING", "dims": ["1"]}]}, "'image' is TYPE_STRING; this"),
        ({"output": [{"name": "alpha", "data_type": "TYPE_UINT8", "dims": ["-1"]}]}, r"'alpha' has dims \[-1\]; all"),
        (
            {"optimization": {"cuda": {"graphs": True, "graph_spec": [{"batch_size": 9}]}}},
            r"CUDA graphs are asked for batch sizes \[9\]; allowed are 1 to 8",
        ),
    ],
)
def test_configuration_that_asks_too_much(folder: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        PlanConfig.from_triton(triton_config(folder, **changes), arguments(folder))


@pytest.mark.parametrize("rows", [[1], [1, 1, 1], [2, 1, 3], [8]])
@pytest.mark.parametrize("tensor", [IMAGE, Tensor("scores", np.dtype(np.float32), (5,))], ids=["uint8", "float32"])
def test_rows_of_requests_go_in_and_come_out_in_order(rows: list[int], tensor: Tensor) -> None:
    generator = np.random.default_rng(sum(rows))
    parts = [generator.integers(0, 200, (count, *tensor.dims)).astype(tensor.dtype) for count in rows]
    buffer = np.zeros(8 * tensor.row_bytes, np.uint8)
    assert batching.gather(parts, buffer, tensor) == rows
    batch = batching.view(buffer, tensor, sum(rows))
    np.testing.assert_array_equal(batch, np.concatenate(parts))
    for part, answer in zip(parts, batching.split(batch, rows), strict=True):
        np.testing.assert_array_equal(answer, part)
        assert answer.base is not None, "answers are views of the buffer, not copies"


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (
            np.zeros((1, SIZE, SIZE, 4), np.uint8),
            r"input 'image' is uint8 \(1, 32, 32, 4\); expected is uint8 with",
        ),
        (np.zeros((1, SIZE, SIZE, 3), np.float32), "input 'image' is float32"),
        (np.zeros((9, SIZE, SIZE, 3), np.uint8), "9 rows are more than a batch holds, 8"),
    ],
)
def test_request_that_does_not_fit(part: np.ndarray, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        batching.gather([part], np.zeros(8 * IMAGE.row_bytes, np.uint8), IMAGE)


PLAN = {
    "image": PlanTensor("input", np.dtype(np.uint8), (-1, SIZE, SIZE, 3), 8),
    "alpha": PlanTensor("output", np.dtype(np.uint8), (-1, SIZE, SIZE)),
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, ""),
        ({"mask": PLAN["alpha"]}, "the plan also has mask"),
        (
            {"image": PlanTensor("input", np.dtype(np.float32), (-1, 3, SIZE, SIZE), 8)},
            "input 'image' is uint8 (-1, 32, 32, 3), in the plan it is an input, float32 (-1, 3, 32, 32)",
        ),
        (
            {"image": PlanTensor("input", np.dtype(np.uint8), (1, SIZE, SIZE, 3), 1)},
            "input 'image' is uint8 (-1, 32, 32, 3), in the plan it is an input, uint8 (1, 32, 32, 3)",
        ),
        (
            {"image": PlanTensor("input", np.dtype(np.uint8), (-1, SIZE, SIZE, 3), 4)},
            "max_batch_size is 8, the plan's profile ends at 4",
        ),
    ],
)
def test_plan_is_compared_with_the_configuration(folder: Path, changes: dict[str, Any], message: str) -> None:
    config = PlanConfig.from_triton(triton_config(folder), arguments(folder))
    assert plan.compare(config, {**PLAN, **changes}) == message


def test_plan_that_lacks_an_output(folder: Path) -> None:
    config = PlanConfig.from_triton(triton_config(folder), arguments(folder))
    assert plan.compare(config, {"image": PLAN["image"]}) == "output 'alpha' is not in the plan, which has image"


def test_manifest_is_held_against_library_and_gpu(folder: Path) -> None:
    config = PlanConfig.from_triton(triton_config(folder, cc_model_filenames={"9.0": "other.plan"}), arguments(folder))
    plan.check_manifest(config, "10.9.0", "8.6")  # no manifest: nothing to compare with
    builder = {"name": "tensorrt", "version": "10.13.3.9", "compute_capabilities": ["8.9"]}
    (folder / "1" / "manifest.json").write_text(json.dumps({"precision": "fp16", "builder": builder}))
    plan.check_manifest(config, "10.13.3.9", "8.9")
    plan.check_manifest(config, "10.13.3.9", "9.0")
    rebuild = "build it for this machine with `matteserve build tiny --engine trt --precision fp16`"
    with pytest.raises(PlanError, match=rf"'tiny_trt_fp16' was built by TensorRT 10\.13\.3\.9, .* 10\.9\.0: {rebuild}"):
        plan.check_manifest(config, "10.9.0", "8.9")
    with pytest.raises(
        PlanError, match=rf"for compute capability 8\.9 or 9\.0, this machine has GPU 0 \(8\.6\): {rebuild}"
    ):
        plan.check_manifest(config, "10.13.3.9", "8.6")


def test_memory_at_an_address_is_an_array() -> None:
    owner = np.arange(16, dtype=np.uint8)
    array = cuda.as_array(owner.ctypes.data, 16)
    array[3] = 99
    assert owner[3] == 99


@pytest.mark.triton
@pytest.mark.parametrize(("kind", "library"), [("trt", "tensorrt"), ("rtx", "tensorrt_rtx")])
def test_without_library_or_gpu_one_engine_is_refused_and_the_others_serve(
    repository: Path, kind: str, library: str
) -> None:
    engine = write_plan_engine(repository, kind, library).name
    reasons = (
        rf"backend '{library}' needs the Python package {library}.*: pip install",
        "plans need the CUDA bindings.*pip install",
        "GPU 0 cannot be used, and plans run on NVIDIA GPUs only: cudaSetDevice: CUDA error",
        "cannot load .*model.plan: ",  # with a GPU: the file is none
    )
    options = ServerOptions(repository, ("tiny",), grpc_port=0, metrics_port=None)
    with EmbeddedServer(options) as server:
        with pytest.raises(ModelLoadError, match=rf"model '{engine}' does not load: .*({'|'.join(reasons)})") as caught:
            server.control.load(engine, 60.0)
        assert "Traceback" not in str(caught.value)
        image = np.random.default_rng(0).integers(0, 256, (1, SIZE, SIZE, 3), np.uint8)
        transport = GrpcTransport(server.address)
        np.testing.assert_array_equal(transport.infer("tiny", image, timeout_s=20).result(), image[..., 0])
        transport.close()


@pytest.mark.gpu
@pytest.mark.triton
@pytest.mark.parametrize(("kind", "library"), [("trt", "tensorrt"), ("rtx", "tensorrt_rtx")])
def test_real_plan_answers_like_its_onnx_file_at_every_batch_size(repository: Path, kind: str, library: str) -> None:
    names = [name for name in plan._MODULES[library] if _importable(name)]
    if not names:
        pytest.skip(f"{library} is not installed")
    folder = write_plan_engine(repository, kind, library)
    config = read_model(folder).config
    config.instance_group[0].kind = pb.ModelInstanceGroup.KIND_GPU
    write_config(repository, config)
    compiled = compile_plan(__import__(names[0]), repository / "tiny_onnx_fp32" / "1" / "model.onnx")
    (folder / "1" / "model.plan").write_bytes(compiled)
    options = ServerOptions(repository, (folder.name,), grpc_port=0, metrics_port=None)
    with EmbeddedServer(options) as server:
        transport = GrpcTransport(server.address)
        for rows in range(1, 9):  # 1 and 8 run as CUDA graphs, the others do not
            images = np.random.default_rng(rows).integers(0, 256, (rows, SIZE, SIZE, 3), np.uint8)
            for _ in range(2):
                answer = transport.infer(folder.name, images, timeout_s=60).result()
                np.testing.assert_array_equal(answer, images[..., 0])
        transport.close()


def _importable(name: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(name) is not None


def compile_plan(library: Any, path: Path) -> bytes:
    """Compile an ONNX file with a profile from 1 to 8 for the GPU at hand."""
    builder = library.Builder(library.Logger(library.Logger.WARNING))
    network = builder.create_network(1 << int(library.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = library.OnnxParser(network, library.Logger(library.Logger.WARNING))
    assert parser.parse_from_file(str(path)), [parser.get_error(i).desc() for i in range(parser.num_errors)]
    config = builder.create_builder_config()
    profile = builder.create_optimization_profile()
    profile.set_shape("image", *((batch, SIZE, SIZE, 3) for batch in (1, 4, 8)))
    config.add_optimization_profile(profile)
    return bytes(builder.build_serialized_network(network, config))
