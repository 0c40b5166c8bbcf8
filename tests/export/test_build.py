"""`matteserve build`: from an exported FP32 engine to another one, or to a clear refusal that publishes nothing."""

from __future__ import annotations

import dataclasses
import json
import logging
import resource
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from google.protobuf import text_format
from PIL import Image
from tritonclient.grpc import model_config_pb2

from matteserve_client import AlphaTolerance, ModelContract
from matteserve_export import (
    EngineBuildError,
    ExportError,
    OnnxError,
    ParityError,
    PrecisionError,
    RepositoryError,
    cli_build,
)
from matteserve_export import build as build_module
from matteserve_export._session import make_runner
from matteserve_export.build import BuildConfig, build_engine, preflight
from matteserve_export.engine import CompilerOptions
from matteserve_export.manifest import export_manifest, onnx_record, read_manifest
from matteserve_export.precision import tolerance_for
from matteserve_export.repository import Engine, write_model
from matteserve_export.weights import find_weights
from support.serving_graphs import SIZE, sampled, small

rtx = pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT for RTX is not installed: matteserve[rtx]")


@pytest.fixture(scope="session")
def graph() -> onnx.ModelProto:
    return small()


def publish(repository: Path, serving: onnx.ModelProto, max_batch_size: int = 8) -> Path:
    """Write the FP32 engine `m_onnx_fp32` and its alias, as an export does."""
    contract = ModelContract(SIZE, SIZE, max_batch_size, "bilinear", "lanczos", "u2netp", "u2netp")
    serialized = serving.SerializeToString(deterministic=True)
    manifest = export_manifest(
        model="m",
        contract=contract,
        weights=find_weights("u2netp"),
        kind="checkpoint",
        weights_file="m.pth",
        record=onnx_record(serving, sha256(serialized).hexdigest(), len(serialized)),
        parity=[],
        tolerance=tolerance_for("fp32", "u2netp"),
    )
    write_model(repository, Engine("m", contract, serialized, manifest))
    return repository


@pytest.fixture
def repository(graph: onnx.ModelProto, tmp_path: Path) -> Path:
    return publish(tmp_path / "models", graph)


@pytest.fixture
def config(repository: Path) -> BuildConfig:
    return BuildConfig(repository, "m", "rtx", "fp16")


def _files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def _config(path: Path) -> Any:
    return text_format.Parse((path / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())


# What is built.


@pytest.mark.parametrize(("precision", "methods"), [("fp32", ["ort-cpu"]), ("fp16", ["ort-cpu", "emulated"])])
def test_an_rtx_engine(config: BuildConfig, precision: str, methods: list[str]) -> None:
    options = CompilerOptions(compute_capabilities=("8.9",))
    before = _files(config.model_repository)
    result = build_engine(
        dataclasses.replace(config, precision=precision, options=options, max_batch_size=6, opt_batch_size=3)
    )
    path = config.model_repository / f"m_rtx_{precision}"
    assert (result.engine, result.engine_path) == (path.name, path)
    plan = (path / "1" / "model.plan").read_bytes()
    assert result.size == len(plan) > 10_000

    manifest = read_manifest(path)
    assert manifest == result.manifest
    assert manifest["file"] == {"name": "model.plan", "bytes": len(plan), "sha256": sha256(plan).hexdigest()}
    source = read_manifest(config.model_repository / "m_onnx_fp32")
    assert manifest["source"] == {"engine": "m_onnx_fp32", "onnx_sha256": source["file"]["sha256"]}
    assert (manifest["onnx"]["sha256"] == source["file"]["sha256"]) == (precision == "fp32")
    assert manifest["weights"] == source["weights"]
    builder = manifest["builder"]
    assert (builder["name"], builder["version"]) == ("tensorrt_rtx", rtx.__version__)
    assert builder["compute_capabilities"] == ["8.9"]
    assert builder["profile"] == {"min": 1, "opt": 3, "max": 6}
    # The plan did not run, and the manifest does not say that it did.
    assert [gate["method"] for gate in manifest["parity"]] == methods
    assert all(gate["passed"] and gate["batch_sizes"] == [1, 2] for gate in manifest["parity"])
    assert AlphaTolerance.from_dict(manifest["tolerance"]) == tolerance_for(precision, "u2netp")

    parsed = _config(path)
    contract = ModelContract.from_config(parsed)
    assert (contract.engine, contract.precision, contract.max_batch_size) == ("rtx", precision, 6)
    assert [sample.batch_size for sample in parsed.model_warmup] == [1, 3, 6]
    assert parsed.backend == "tensorrt_rtx"
    # Clients keep what they had, and nothing else is left behind.
    after = _files(config.model_repository)
    assert {name: after[name] for name in before} == before
    assert [child.name for child in config.model_repository.parent.iterdir()] == ["models"]


def test_an_onnx_engine(config: BuildConfig, graph: onnx.ModelProto) -> None:
    result = build_engine(dataclasses.replace(config, engine="onnx"))
    path = result.engine_path / "1" / "model.onnx"
    assert result.engine == "m_onnx_fp16"
    assert result.manifest["builder"] is None
    assert (
        result.manifest["file"]["sha256"] == result.manifest["onnx"]["sha256"] == sha256(path.read_bytes()).hexdigest()
    )
    assert (result.engine_path / "configs" / "cpu.pbtxt").is_file()
    images = np.random.default_rng(1).integers(0, 256, (3, SIZE, SIZE, 3), np.uint8)
    published, original = make_runner(onnx.load(path))(images), make_runner(graph)(images)
    assert np.ptp(original) > 100
    assert np.abs(published.astype(int) - original).max() <= 4


def test_a_build_replaces_an_earlier_one(config: BuildConfig) -> None:
    first = build_engine(dataclasses.replace(config, max_batch_size=2))
    second = build_engine(config)
    assert first.engine_path == second.engine_path
    assert read_manifest(second.engine_path)["builder"]["profile"]["max"] == 8


def test_pictures_of_ones_own(config: BuildConfig, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(3):
        noise = np.random.default_rng(number).integers(0, 256, (40, 50, 3), np.uint8)
        Image.fromarray(noise).save(folder / f"{number}.png")
    (folder / "notes.txt").write_text("not a picture")
    int8 = dataclasses.replace(config, engine="onnx", precision="int8", images=folder, calibration=folder)
    assert [(gate.method, gate.images) for gate in build_engine(int8).parity] == [("ort-cpu", 3)]


# What is refused, and that nothing is published then.


@pytest.fixture
def unchanged(config: BuildConfig) -> Iterator[None]:
    """Whatever goes wrong, the repository is as it was and no staging is left."""
    before = _files(config.model_repository)
    yield
    assert _files(config.model_repository) == before
    assert [child.name for child in config.model_repository.parent.iterdir()] == ["models"]


@pytest.mark.usefixtures("unchanged")
def test_a_failed_gate(config: BuildConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    impossible = AlphaTolerance(max_abs=0, p999_abs=0, mean_abs=-1, min_iou=1)
    monkeypatch.setattr(build_module, "tolerance_for", lambda *_: impossible)
    with pytest.raises(ParityError, match=r"FAILED fp16 ONNX for rtx vs fp32 \(ort-cpu\).*nothing was published"):
        build_engine(config)


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize("damage", ["cut short", "foreign"])
def test_a_plan_that_is_damaged_on_its_way(config: BuildConfig, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    """Between the moment that the manifest describes it and the moment that it is published."""
    describe = build_module.build_manifest

    def damaged(**arguments: Any) -> dict[str, Any]:
        manifest = describe(**arguments)
        plan = arguments["file"].read_bytes()
        arguments["file"].write_bytes(plan[:-100] if damage == "cut short" else b"x" * len(plan))
        return manifest

    monkeypatch.setattr(build_module, "build_manifest", damaged)
    with pytest.raises(RepositoryError, match=r"model.plan of m_rtx_fp16 is not the file that its manifest describes"):
        build_engine(config)


@pytest.mark.usefixtures("unchanged")
def test_an_interrupt(config: BuildConfig) -> None:
    def interrupt(phase: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_engine(config, interrupt)


@pytest.mark.usefixtures("unchanged")
def test_no_room(config: BuildConfig) -> None:
    """The kernel refuses the write in the middle of the plan, as on a full disk; another process, for its limit."""
    code = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from matteserve_export import RepositoryError\n"
        "from matteserve_export.build import BuildConfig, build_engine\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))\n"
        "try:\n"
        "    build_engine(BuildConfig(Path(sys.argv[1]), 'm', 'rtx', 'fp16'))\n"
        "except RepositoryError as exc:\n"
        "    print(exc)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(config.model_repository)],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert "cannot write m_rtx_fp16: File too large; nothing was published" in done.stdout
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"model": "other"},
            RepositoryError,
            r"has no other_onnx_fp32, .* there are: m_onnx_fp32. .*matteserve export",
        ),
        ({"model": "../m"}, RepositoryError, "model name '../m' is not usable"),
        ({"engine": "openvino"}, EngineBuildError, "no engine kind 'openvino'; allowed are onnx, trt, rtx"),
        ({"precision": "fp8"}, PrecisionError, "no precision is called 'fp8'; known are: fp32, fp16, bf16, int8"),
        (
            {"engine": "onnx", "precision": "fp32"},
            EngineBuildError,
            "what all others are made from; `matteserve export`",
        ),
        ({"engine": "onnx", "options": CompilerOptions(tf32=True)}, EngineBuildError, "compiler options are for plans"),
        ({"max_batch_size": 300}, EngineBuildError, "max_batch_size is 300; allowed are 1 to 256"),
        ({"opt_batch_size": 9}, EngineBuildError, "min 1, opt 9, max 8"),
        (
            {"options": CompilerOptions(compute_capabilities=("5.2",))},
            EngineBuildError,
            "compute capability 5.2 is not",
        ),
        ({"precision": "int8"}, PrecisionError, "int8 needs pictures"),
        ({"precision": "int8", "calibration": Path("nowhere")}, ExportError, "nowhere: no such directory"),
        ({"images": Path("nowhere")}, ExportError, "nowhere: no such directory; give one with pictures"),
    ],
)
def test_refusals(config: BuildConfig, changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build_engine(dataclasses.replace(config, **changes))


def test_no_pictures_in_the_folder(config: BuildConfig, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("not a picture")
    with pytest.raises(ExportError, match="empty: no pictures in it"):
        build_engine(dataclasses.replace(config, images=tmp_path / "empty"))


def test_no_gpu_for_tensorrt(config: BuildConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("tensorrt")
    module.__dict__.update({**rtx.__dict__, "__version__": "10.13.3.9"})
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    monkeypatch.setattr("matteserve_export.engine.find_gpu", lambda: None)
    with pytest.raises(EngineBuildError, match="TensorRT compiles on the GPU that will run the plan, and this machine"):
        preflight(dataclasses.replace(config, engine="trt"))


def test_a_source_that_takes_single_pictures(graph: onnx.ModelProto, tmp_path: Path) -> None:
    publish(tmp_path / "r", graph, max_batch_size=1)
    single = BuildConfig(tmp_path / "r", "m", "rtx")
    assert preflight(single).batch_sizes == (1,)
    with pytest.raises(EngineBuildError, match=r"m_onnx_fp32 takes single pictures only .* max_batch_size 2 is not"):
        preflight(dataclasses.replace(single, max_batch_size=2))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / "1" / "model.onnx").write_bytes(b"cut"), "model.onnx is not the file that its manifest"),
        (lambda path: (path / "1" / "model.onnx").unlink(), "model.onnx is not the file .*sha256 no file"),
        (lambda path: (path / "1" / "manifest.json").unlink(), "manifest.json: No such file or directory"),
        (
            lambda path: (path / "config.pbtxt").write_text("{"),
            "config.pbtxt cannot be read: .*; export the model again",
        ),
        (lambda path: (path / "config.pbtxt").write_text('name: "m"'), "config.pbtxt cannot be read: .*wire format"),
    ],
)
def test_a_source_that_is_not_whole(config: BuildConfig, damage: Callable[[Path], Any], message: str) -> None:
    damage(config.model_repository / "m_onnx_fp32")
    with pytest.raises(RepositoryError, match=message):
        preflight(config)


def test_a_source_of_another_wire(tmp_path: Path) -> None:
    """Not from this exporter's wrap: which of its nodes normalise is not known."""
    publish(tmp_path / "r", sampled())
    with pytest.raises((OnnxError, PrecisionError), match="was not wrapped by `matteserve export`"):
        build_engine(BuildConfig(tmp_path / "r", "m", "rtx"))
    assert not (tmp_path / "r" / "m_rtx_fp16").exists()


def test_a_source_of_another_size(tmp_path: Path) -> None:
    publish(tmp_path / "r", small(64))
    with pytest.raises(OnnxError, match=r"its graph takes 64x64, its config.pbtxt says 32x32; export it again"):
        build_engine(BuildConfig(tmp_path / "r", "m", "rtx"))


# The command.


@pytest.fixture
def run(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Result]]:
    """Runs the command beside the repository."""
    monkeypatch.chdir(repository.parent)

    def invoke(*arguments: object) -> Result:
        words = [str(argument) for argument in (*arguments, "--model-repository", "models")]
        return CliRunner().invoke(cli_build.build, words)

    yield invoke
    logger = logging.getLogger("matteserve_export")
    logger.handlers, logger.propagate = [], True


def test_command(run: Callable[..., Result], repository: Path) -> None:
    result = run("m", "--engine", "rtx", "--compute-capability", "8.9", "--compute-capability", "12.0")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].startswith("engine   m_rtx_fp16: ")
    assert "  compute_capabilities     8.9, 12.0" in lines
    assert "  profile                  min 1, opt 4, max 8" in lines
    assert sum(line.startswith("PASSED fp16 ONNX for rtx vs fp32") for line in lines) == 2
    assert lines[-2].startswith("The plan itself has not run yet")
    assert lines[-1] == "serve it: matteserve swap m --to rtx_fp16"
    # Progress and configuration, away from the result.
    assert "Building engine\n" in result.stderr
    assert "building model.plan: name tensorrt_rtx" in result.stderr
    assert (repository / "m_rtx_fp16" / "1" / "model.plan").is_file()


def test_command_as_json(run: Callable[..., Result], repository: Path) -> None:
    result = run("m", "--engine", "onnx", "--json")
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert printed["engine"] == "m_onnx_fp16"
    assert printed["manifest"] == read_manifest(repository / "m_onnx_fp16")


def test_dry_run_builds_nothing(run: Callable[..., Result], repository: Path) -> None:
    before = _files(repository)
    result = run("m", "--engine", "rtx", "--dry-run", "--no-cuda-graphs")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[0] == "would build m_rtx_fp16 from m_onnx_fp32"
    assert "  compute_capabilities     8.0, 8.6, 8.9, 12.0, 12.1" in result.stdout
    printed = json.loads(run("m", "--engine", "rtx", "--dry-run", "--json").stdout)
    assert printed["compiler"]["opt_batch_size"] == 4
    assert printed["contract"]["precision"] == "fp16"
    assert _files(repository) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["m", "--engine", "rtx", "--precision", "fp8"], "'fp8' is not one of 'fp32', 'fp16', 'bf16', 'int8'"),
        (["m", "--engine", "openvino"], "'openvino' is not one of 'onnx', 'trt', 'rtx'"),
        (["m"], "Missing option '--engine'"),
        (["x", "--engine", "rtx"], "Error: models has no x_onnx_fp32"),
        (["m", "--engine", "rtx", "--timing-cache", "t"], "timing_cache: TensorRT for RTX has no such thing"),
        (["m", "--engine", "trt", "--compute-capability", "8.9"], "compute capabilities are for engine kind rtx"),
        (
            ["m", "--engine", "rtx", "--native-deform-conv", "--compute-capability", "9"],
            "'9' is not one; write it as 8.9",
        ),
    ],
)
def test_command_refuses(run: Callable[..., Result], arguments: list[str], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code in (1, 2)
    assert message in result.stderr
    assert (result.stdout, "Traceback" in result.stderr) == ("", False)


def test_command_without_the_extra(run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matteserve_export.build", None)
    assert "pip install 'matteserve[export]'" in run("m", "--engine", "rtx").stderr


def test_command_without_the_compiler(run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings"):
        monkeypatch.setitem(sys.modules, name, None)
    assert "pip install 'matteserve[rtx]'" in run("m", "--engine", "rtx").stderr
    assert "pip install 'matteserve[gpu]'" in run("m", "--engine", "trt").stderr


def test_progress_on_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """One line that changes, at most ten times a second, and is gone at the end."""
    progress = cli_build._Progress()
    progress.live = True
    for done in range(101):
        progress("Building engine", done, 100)
    progress.close()
    written = capsys.readouterr().err
    assert "\r\x1b[KBuilding engine 100/100\r\x1b[K" in written
    assert written.count("Building engine") < 20


def test_help_has_an_example() -> None:
    assert "matteserve build u2netp --engine rtx" in CliRunner().invoke(cli_build.build, ["--help"]).stdout


@pytest.mark.triton
def test_the_cpu_variant_of_a_repository_with_plans(config: BuildConfig) -> None:
    """Where there is no GPU, the same repository serves its ONNX engine: `--model-config-name=cpu`."""
    import tritonclient.grpc as triton

    from matteserve_server import EmbeddedServer, ServerOptions

    repository = config.model_repository
    result = build_engine(config)
    # Clients are switched to the plan, as a swap would do it; the variant for the CPU stays.
    alias = _config(repository / "m")
    alias.ensemble_scheduling.step[0].model_name = result.engine
    (repository / "m" / "config.pbtxt").write_text(text_format.MessageToString(alias))
    options = ServerOptions(
        repository, ("m",), grpc_port=0, metrics_port=None, extra_arguments=("--model-config-name=cpu",)
    )
    with EmbeddedServer(options) as server, triton.InferenceServerClient(server.address) as connection:
        step = connection.get_model_config("m").config.ensemble_scheduling.step[0]
        assert step.model_name == "m_onnx_fp32"
        (group,) = connection.get_model_config("m_onnx_fp32").config.instance_group
        assert group.kind == model_config_pb2.ModelInstanceGroup.KIND_CPU
        images = np.random.default_rng(1).integers(0, 256, (2, SIZE, SIZE, 3), np.uint8)
        tensor = triton.InferInput("image", images.shape, "UINT8")
        tensor.set_data_from_numpy(images)
        alpha = connection.infer("m", [tensor], client_timeout=30).as_numpy("alpha")
    expected = make_runner(onnx.load(repository / "m_onnx_fp32" / "1" / "model.onnx"))(images)
    assert np.abs(alpha.astype(int) - expected).max() <= 1


def test_what_a_build_leaves_needs_no_staging(config: BuildConfig) -> None:
    """Nothing but the engine: no compiled ONNX beside the plan, no temporary folder."""
    path = build_engine(config).engine_path
    assert sorted(_files(path)) == ["1/manifest.json", "1/model.plan", "config.pbtxt"]
