"""The gate has teeth, and `matteserve verify` shows them: on files, and through a real server."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from numpy.typing import NDArray
from onnx import numpy_helper
from PIL import Image
from tritonclient.grpc import model_config_pb2 as pb

from matteserve_client import ModelContract
from matteserve_client._cli import cli
from matteserve_export import ExportError, ParityError
from matteserve_export.compare import gate_graph
from matteserve_export.contact_sheet import write_contact_sheet
from matteserve_export.pictures import read_pictures
from matteserve_export.precision import TOLERANCES, convert
from matteserve_export.serving import ServingConfig
from matteserve_server import EmbeddedServer, ServerOptions
from support.everything import SIZE, Everything, serve
from support.tiny_model import write_config

Images = NDArray[np.uint8]
CONTRACT = ModelContract(SIZE, SIZE, 4, "bilinear", "bilinear", architecture="everything", weights="none")


@pytest.fixture(scope="module")
def config(imagenet: ServingConfig) -> ServingConfig:
    return dataclasses.replace(imagenet, min_max=True)


@pytest.fixture(scope="module")
def network() -> Everything:
    return Everything()


@pytest.fixture(scope="module")
def fp32(network: Everything, config: ServingConfig) -> onnx.ModelProto:
    return serve(network, config)


def inverted(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy whose last convolution has the opposite sign."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    names = [list(node.input[1:]) for node in copy.graph.node if node.op_type == "Conv"][-1]
    for tensor in copy.graph.initializer:
        if tensor.name in names:
            tensor.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(tensor), tensor.name))
    return copy


def swapped_channels(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy whose first convolution reads BGR."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    name = next(node.input[1] for node in copy.graph.node if node.op_type == "Conv")
    tensor = next(tensor for tensor in copy.graph.initializer if tensor.name == name)
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor)[:, ::-1].copy(), name))
    return copy


class _Logits(Everything):
    """The same without its sigmoid."""

    def forward(self, x):  # type: ignore[no-untyped-def]
        return super().forward(x).logit()


MISTAKES = ["mean", "std", "channels", "sigmoid", "overflow", "weights"]


def mistaken(mistake: str, network: Everything, config: ServingConfig, fp32: onnx.ModelProto) -> onnx.ModelProto:
    """An fp16 graph with a mistake in it."""
    if mistake == "mean":
        return convert(serve(network, dataclasses.replace(config, mean=(0.5, 0.456, 0.406))), "fp16")
    if mistake == "std":
        return convert(serve(network, dataclasses.replace(config, std=(0.25, 0.224, 0.225))), "fp16")
    if mistake == "channels":
        return convert(swapped_channels(fp32), "fp16")
    if mistake == "sigmoid":
        logits = _Logits()
        logits.load_state_dict(network.state_dict())
        return convert(serve(logits, config), "fp16")
    if mistake == "overflow":
        return convert(serve(Everything(gain=400.0), config), "fp16")  # equal in fp32: a LayerNorm follows
    other = Everything()
    for parameter in other.parameters():
        parameter.data *= 1.05
    return convert(serve(other, config), "fp16")


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_gate_has_teeth(
    mistake: str, network: Everything, config: ServingConfig, fp32: onnx.ModelProto, scenes: Images
) -> None:
    right = gate_graph(convert(fp32, "fp16"), fp32, scenes, TOLERANCES["fp16"], batch_sizes=(1, 4))
    assert [outcome.passed for outcome in right] == [True, True]
    wrong = gate_graph(mistaken(mistake, network, config, fp32), fp32, scenes, TOLERANCES["fp16"], batch_sizes=(1, 4))
    assert not all(outcome.passed for outcome in wrong)
    if mistake != "overflow":  # which the CPU may not see
        assert not any(outcome.passed for outcome in wrong)
    with pytest.raises(ParityError, match=r"^FAILED .*; nothing was published$"):
        wrong[-1].require()


# --- the command -----------------------------------------------------------------------------------------------------


def write_engine(repository: Path, precision: str, graph: onnx.ModelProto, tolerance: dict[str, float] | None = None):
    """An engine's folder, as far as `verify` and Triton read it."""
    contract = dataclasses.replace(CONTRACT, precision=precision)
    name = f"m_onnx_{precision}"
    (repository / name / "1").mkdir(parents=True)
    onnx.save(graph, repository / name / "1" / "model.onnx")
    if tolerance is not None:
        (repository / name / "1" / "manifest.json").write_text(json.dumps({"tolerance": tolerance}))
    write_config(
        repository,
        pb.ModelConfig(
            name=name,
            backend="onnxruntime",
            default_model_filename="model.onnx",
            max_batch_size=4,
            input=[pb.ModelInput(name="image", data_type=pb.TYPE_UINT8, dims=[SIZE, SIZE, 3])],
            output=[pb.ModelOutput(name="alpha", data_type=pb.TYPE_UINT8, dims=[SIZE, SIZE])],
            parameters={k: pb.ModelParameter(string_value=v) for k, v in contract.to_parameters().items()},
            instance_group=[pb.ModelInstanceGroup(count=1, kind=pb.ModelInstanceGroup.KIND_CPU)],
        ),
    )


@pytest.fixture
def repository(tmp_path: Path, fp32: onnx.ModelProto) -> Path:
    path = tmp_path / "models"
    write_engine(path, "fp32", fp32)
    write_engine(path, "fp16", convert(fp32, "fp16"))
    return path


@pytest.fixture
def run(repository: Path) -> Callable[..., Result]:
    def invoke(*arguments: object) -> Result:
        return CliRunner().invoke(cli, ["verify", "m", *map(str, arguments)])

    return invoke


def test_verify_files(run: Callable[..., Result], repository: Path) -> None:
    result = run("--model-repository", repository)
    assert result.exit_code == 0, result.output
    header, *rows = result.stdout.splitlines()
    assert header.split()[:4] == ["RESULT", "ENGINE", "METHOD", "BATCH"]
    assert [row.split()[:4] for row in rows] == [
        ["PASSED", "m_onnx_fp16", "ort-cpu", "1+4"],
        ["PASSED", "m_onnx_fp16", "emulated", "1+4"],
    ]
    assert "comparing on 8 generated scenes; your own pictures say more" in result.stderr


def test_verify_files_that_fail(run: Callable[..., Result], repository: Path, fp32: onnx.ModelProto) -> None:
    write_engine(repository, "int8", inverted(fp32))
    sheet = repository / "worst.png"
    result = run("--model-repository", repository, "--contact-sheet", sheet, "--json", "--limit", 4)
    assert result.exit_code == 1
    printed = json.loads(result.stdout)
    outcomes = {(entry["engine"], entry["method"]): entry["passed"] for entry in printed["engines"]}
    assert outcomes == {
        ("m_onnx_fp16", "ort-cpu"): True,
        ("m_onnx_fp16", "emulated"): True,
        ("m_onnx_int8", "ort-cpu"): False,
    }
    with Image.open(sheet) as image:
        assert image.width > 4 * 256
        assert image.height > 4 * 256
    # One engine alone, by either of its names.
    assert run("--model-repository", repository, "--engine", "onnx_fp16").exit_code == 0
    assert run("--model-repository", repository, "--engine", "m_onnx_int8").exit_code == 1


def test_an_overflow_is_named(run: Callable[..., Result], repository: Path, config: ServingConfig) -> None:
    strong = serve(Everything(gain=400.0), config)
    onnx.save(strong, repository / "m_onnx_fp32" / "1" / "model.onnx")
    onnx.save(convert(strong, "fp16"), repository / "m_onnx_fp16" / "1" / "model.onnx")
    result = run("--model-repository", repository, "--limit", 2)
    assert result.exit_code == 1
    assert "m_onnx_fp16 vs m_onnx_fp32 (emulated): 100.00% of the network's output is not finite" in result.stdout
    assert "peak " in result.stdout
    assert "beyond fp16's 65504, this overflows" in result.stdout


def test_peaks_of_a_model_without_other_engines(run: Callable[..., Result], tmp_path: Path, fp32) -> None:
    write_engine(tmp_path / "alone", "fp32", fp32)
    result = run("--model-repository", tmp_path / "alone", "--peaks", "--limit", 1)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("peak ")


def test_the_manifests_tolerance_holds(run: Callable[..., Result], repository: Path, fp32: onnx.ModelProto) -> None:
    strict = {"max_abs": 0.0, "p999_abs": 0.0, "mean_abs": 0.0, "min_iou": 1.0}
    write_engine(repository, "bf16", convert(fp32, "fp16"), strict)
    result = run("--model-repository", repository, "--engine", "onnx_bf16")
    assert result.exit_code == 1
    assert "is above 0.00/255" in result.stdout


def test_verify_on_pictures(run: Callable[..., Result], repository: Path, scenes: Images) -> None:
    folder = repository / "pictures"
    folder.mkdir()
    for number, scene in enumerate(scenes[:3]):
        Image.fromarray(scene).resize((100, 70)).save(folder / f"{number}.png")
    (folder / "notes.txt").write_text("not a picture")
    result = run("--model-repository", repository, "--images", folder, "--json")
    assert result.exit_code == 0, result.output
    assert [entry["images"] for entry in json.loads(result.stdout)["engines"]] == [3, 3]
    assert read_pictures(folder, CONTRACT, limit=2).shape == (2, SIZE, SIZE, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model-repository", "nowhere"], "nowhere has no m_onnx_fp32/1/model.onnx"),
        (
            ["--engine", "onnx_int4"],
            "m_onnx_int4/config.pbtxt: No such file or directory; the repository has",
        ),
        (["--images", "nowhere"], "nowhere: no such directory; give one with pictures in it"),
        (["--images", "."], ".: no pictures in it; looked for .jpg"),
        (["--contact-sheet", "worst.xyz"], "worst.xyz: the contact sheet cannot be written"),
        (["--peaks", "--address", "localhost:1"], "--peaks looks into the FP32 graph's file"),
        (["--address", "nonsense"], "--address"),
        (["--address", "localhost:1", "--timeout-s", "1"], "localhost:1"),
    ],
)
def test_verify_refuses(
    run: Callable[..., Result],
    repository: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    if "--model-repository" not in arguments:
        arguments = ["--model-repository", str(repository), *arguments]
    result = run(*arguments)
    assert result.exit_code in (1, 2)
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_a_plan_needs_a_server(run: Callable[..., Result], repository: Path) -> None:
    folder = repository / "m_trt_fp16"
    folder.mkdir()
    text = (repository / "m_onnx_fp16" / "config.pbtxt").read_text()
    (folder / "config.pbtxt").write_text(text.replace('string_value: "onnx"', 'string_value: "trt"'))
    result = run("--model-repository", repository, "--engine", "trt_fp16")
    assert result.exit_code == 1
    assert "m_trt_fp16 is a plan, which only a server runs; give the server's address with --address" in result.stderr


def test_a_sheet_shows_a_single_bad_pixel(tmp_path: Path) -> None:
    images = np.zeros((1, 1024, 1024, 3), np.uint8)
    alpha = np.zeros((1, 1024, 1024), np.uint8)
    wrong = alpha.copy()
    wrong[0, 700, 701] = 8
    write_contact_sheet(tmp_path / "sheet.png", images, alpha, wrong, ["one pixel"], "title")
    with Image.open(tmp_path / "sheet.png") as sheet:
        last_tile = np.asarray(sheet)[52 : 52 + 256, 8 + 3 * 264 : 8 + 3 * 264 + 256]
    assert np.count_nonzero(last_tile.max(axis=2) == 255) == 1
    with pytest.raises(ExportError, match="cannot be written"):
        write_contact_sheet(tmp_path / "no" / "sheet.png", images, alpha, wrong, ["one pixel"], "title")


@pytest.mark.triton
def test_verify_through_a_real_server(run: Callable[..., Result], repository: Path, fp32: onnx.ModelProto) -> None:
    write_engine(repository, "int8", inverted(fp32))
    models = ("m_onnx_fp32", "m_onnx_fp16", "m_onnx_int8")
    with EmbeddedServer(ServerOptions(repository, models, grpc_port=0, metrics_port=None)) as server:
        passed = run("--address", server.address, "--engine", "onnx_fp16", "--limit", 3)
        assert passed.exit_code == 0, passed.output
        assert passed.stdout.splitlines()[1].split()[:4] == ["PASSED", "m_onnx_fp16", "server", "1+4"]
        both = run("--address", server.address, "--limit", 3, "--contact-sheet", repository / "sheet.png", "--json")
        assert both.exit_code == 1, both.output
        outcomes = {entry["engine"]: entry["passed"] for entry in json.loads(both.stdout)["engines"]}
        assert outcomes == {"m_onnx_fp16": True, "m_onnx_int8": False}
        assert (repository / "sheet.png").is_file()
        missing = run("--address", server.address, "--engine", "trt_fp16")
        assert f"{server.address} has not loaded m_trt_fp16; loaded are " in missing.stderr
        other = CliRunner().invoke(cli, ["verify", "other", "--address", server.address])
        assert "has not loaded other_onnx_fp32, with which other's engines are compared" in other.stderr
