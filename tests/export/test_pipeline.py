"""The whole way, and the commands: from a checkpoint or a public ONNX to a repository, or to a clear refusal."""

from __future__ import annotations

import dataclasses
import json
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner, Result
from google.protobuf import text_format
from numpy.typing import NDArray
from torch import nn
from tritonclient.grpc import model_config_pb2

from matteserve_client import ModelContract
from matteserve_export import CheckpointError, ExportError, ParityError, RepositoryError, cli, pipeline
from matteserve_export._session import make_runner
from matteserve_export.compare import normalise, reference_alpha
from matteserve_export.pipeline import ExportConfig, export_model
from matteserve_export.serving import ServingConfig
from matteserve_export.weights import REGISTRY, find_weights


@pytest.fixture
def config(checkpoint: Path, tmp_path: Path) -> ExportConfig:
    return ExportConfig(
        weights=find_weights("u2netp"),
        kind="checkpoint",
        path=checkpoint,
        model_repository=tmp_path / "models",
        model="small",
        size=(64, 64),
        max_batch_size=4,
    )


@pytest.fixture
def tiny_config(tiny: Path, config: ExportConfig) -> ExportConfig:
    """The same with the smallest architecture."""
    return dataclasses.replace(
        config, path=tiny, weights=dataclasses.replace(config.weights, architecture="tiny"), max_batch_size=2
    )


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Result]]:
    """Runs a command in an empty folder with an empty cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MATTESERVE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cli, "_DEMO_WEIGHTS", tmp_path / "demo_weights")

    def invoke(command: str, *arguments: object) -> Result:
        return CliRunner().invoke(getattr(cli, command), [str(argument) for argument in arguments])

    yield invoke
    logger = logging.getLogger("matteserve_export")
    logger.handlers, logger.propagate = [], True


def test_from_a_checkpoint_to_the_repository(
    config: ExportConfig, lively_u2netp: nn.Module, scenes: NDArray[np.uint8]
) -> None:
    result = export_model(config)

    graph = (result.engine_path / "1" / "model.onnx").read_bytes()
    manifest = json.loads((result.engine_path / "1" / "manifest.json").read_text(encoding="utf-8"))
    weights_sha256 = sha256(config.path.read_bytes()).hexdigest()
    assert result.onnx_sha256 == manifest["onnx"]["sha256"] == sha256(graph).hexdigest()
    assert manifest["weights"]["sha256"] == weights_sha256
    # The registry knows the released file's digest, and this is another file.
    assert manifest["weights"]["licence"] == "unknown"
    assert (manifest["schema_version"], manifest["engine"], manifest["precision"]) == (2, "onnx", "fp32")
    assert manifest["file"] == {"name": "model.onnx", "sha256": result.onnx_sha256, "bytes": len(graph)}
    assert (manifest["builder"], "source" in manifest) == (None, False)
    assert [gate["passed"] for gate in manifest["parity"]] == [True] * 3
    assert manifest["producer"]["torch"] == torch.__version__

    for folder in (result.engine_path, result.alias_path):
        parsed = text_format.Parse((folder / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())
        contract = ModelContract.from_config(parsed)
        assert contract == result.contract
        assert (contract.input_shape, contract.max_batch_size) == ((64, 64, 3), 4)
        assert contract.weights_sha256 == weights_sha256

    # The published file, not what the pipeline had in memory, equals torch.
    weights = config.weights
    wrap = ServingConfig(weights.mean, weights.std, weights.sigmoid, weights.min_max)
    with torch.inference_mode():
        maps = lively_u2netp(torch.from_numpy(normalise(scenes, wrap))).numpy()
    alpha = make_runner(onnx.load_from_string(graph))(scenes)
    assert np.ptp(alpha) == 255
    assert np.abs(alpha.astype(int) - reference_alpha(maps, wrap)).max() <= 1


def test_a_failed_gate_publishes_nothing(tiny_config: ExportConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    build = pipeline.build_serving
    monkeypatch.setattr(
        pipeline, "build_serving", lambda core, wrap: build(core, dataclasses.replace(wrap, mean=(0.0, 0.0, 0.0)))
    )
    with pytest.raises(ParityError, match="FAILED serving ONNX vs reference"):
        export_model(tiny_config)
    assert not tiny_config.model_repository.exists()


def test_weights_that_overflow_publish_nothing(tiny_config: ExportConfig) -> None:
    """Finite weights whose maps are not."""
    state = {name: tensor * 3e38 for name, tensor in torch.load(tiny_config.path, weights_only=True).items()}
    torch.save(state, tiny_config.path)
    weights = dataclasses.replace(tiny_config.weights, mean=(0.5, 0.5, 0.5), std=(1e-3, 1e-3, 1e-3))
    with pytest.raises(ParityError, match=r"FAILED core ONNX vs reference.* nothing was published"):
        export_model(dataclasses.replace(tiny_config, weights=weights))
    assert not tiny_config.model_repository.exists()


@pytest.mark.parametrize("size", [(0, 0), (33, 64), (64, 16), (8192, 8192), (-32, 64)])
def test_unusable_sizes(config: ExportConfig, size: tuple[int, int]) -> None:
    with pytest.raises(ExportError, match="must be multiples of 32, from 32 to 4096"):
        dataclasses.replace(config, size=size)


@pytest.mark.parametrize("batch", [0, 257])
def test_unusable_batches(config: ExportConfig, batch: int) -> None:
    with pytest.raises(ExportError, match="allowed are 1 to 256"):
        dataclasses.replace(config, max_batch_size=batch)


def test_unusable_model_name(config: ExportConfig) -> None:
    with pytest.raises(RepositoryError, match="model name"):
        dataclasses.replace(config, model="../elsewhere")


def test_no_torch_code_for_an_architecture(config: ExportConfig) -> None:
    with pytest.raises(ExportError, match="no torch code for the architecture 'silueta' here; export its ONNX"):
        export_model(dataclasses.replace(config, weights=find_weights("silueta")))


def test_weights_of_another_architecture(config: ExportConfig) -> None:
    with pytest.raises(CheckpointError, match="fit the architecture u2netp"):
        export_model(dataclasses.replace(config, weights=find_weights("u2net")))


def test_known_weights_keep_their_licence(tiny_config: ExportConfig) -> None:
    released = dataclasses.replace(
        tiny_config.weights.sources[0], md5=None, sha256=sha256(tiny_config.path.read_bytes()).hexdigest()
    )
    weights = dataclasses.replace(tiny_config.weights, sources=(released,))
    result = export_model(dataclasses.replace(tiny_config, weights=weights, max_batch_size=1))
    assert result.contract.weights_licence == "Apache-2.0"
    assert len(result.parity) == 2  # a batch of 1 has no rows to compare


def test_export_command_from_a_checkpoint(run: Callable[..., Result], checkpoint: Path, tmp_path: Path) -> None:
    result = run("export", "u2netp", "--weights", checkpoint, "--size", "32x64", "--max-batch-size", 2, "--name", "me")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0] == "model    me: 32x64, max_batch_size 2"
    assert sum(line.startswith("PASSED ") for line in lines) == 3
    assert lines[-1] == "serve it: matteserve serve --model-repository model_repository --model me"
    assert (tmp_path / "model_repository" / "me_onnx_fp32" / "1" / "model.onnx").is_file()
    assert "u2netp was trained at 320x320; at 32x64 it sees objects at another scale" in result.stderr
    assert "365 nodes: Conv 119" in result.stderr


@pytest.mark.parametrize(("baked", "batch"), [(False, 8), (True, 1)])
def test_export_command_from_a_public_onnx(
    run: Callable[..., Result], public_onnx: Callable[..., Path], tmp_path: Path, baked: bool, batch: int
) -> None:
    result = run("export", "u2netp", "--onnx", public_onnx(baked_batch=baked), "--json", "--model-repository", "r")
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert (printed["model"], printed["engine"]) == ("u2netp", "u2netp_onnx_fp32")
    assert printed["contract"]["max_batch_size"] == batch
    assert all(gate["passed"] for gate in printed["parity"])
    assert (tmp_path / "r" / "u2netp" / "config.pbtxt").is_file()


def test_export_command_takes_the_cache(
    run: Callable[..., Result], public_onnx: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "cache" / "weights").mkdir(parents=True)
    (tmp_path / "cache" / "weights" / "u2netp.onnx").write_bytes(public_onnx().read_bytes())
    result = run("export", "u2netp", "--json")
    assert result.exit_code == 0, result.output
    assert "is not the released u2netp: its licence is recorded as unknown" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["u3net"], "Error: no weights are called 'u3net'; known are: u2net, "),
        (["u2netp"], "no u2netp.pth or u2netp.onnx in "),
        (["u2netp"], "run `matteserve pull u2netp`, or give the file with --weights or --onnx"),
        (["demo"], "no u2netp_demo.safetensors in "),
        (["u2netp", "--weights", "a.pth", "--onnx", "a.onnx"], "--weights and --onnx exclude each other"),
        (["u2netp", "--weights", "a.pth"], "Error: a.pth: no such file"),
        (["u2netp", "--onnx", "a.onnx"], "Error: a.onnx: no such file"),
        (["u2netp", "--weights", "a.pth", "--size", "big"], "'big' is not a size; write 320, or height x width"),
        (["u2netp", "--weights", "a.pth", "--size", "100"], "size 100x100 is not usable for u2netp"),
        (["u2netp", "--weights", "a.pth", "--name", "../x"], "model name '../x' is not usable"),
        (["u2netp", "--weights", "a.pth", "--max-batch-size", "0"], "--max-batch-size"),
    ],
)
def test_export_command_refuses(run: Callable[..., Result], arguments: list[str], message: str) -> None:
    result = run("export", *arguments)
    assert result.exit_code in (1, 2)
    assert message in result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr


def test_pull_command_without_an_address(run: Callable[..., Result]) -> None:
    result = run("pull", "demo")
    assert result.exit_code == 1
    assert "demo has no stable download address. By hand:" in result.stderr
    assert result.stdout == ""


def test_pull_command_prints_the_path(
    run: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is in the cache and verified is only named."""
    content = b"the released file"
    entry = find_weights("u2netp")
    source = dataclasses.replace(
        entry.sources[1], size_bytes=len(content), md5=None, sha256=sha256(content).hexdigest()
    )
    known = {**REGISTRY, "u2netp": dataclasses.replace(entry, sources=(source,))}
    monkeypatch.setattr("matteserve_export.weights.REGISTRY", known)
    path = tmp_path / "here" / "u2netp.onnx"
    path.parent.mkdir()
    path.write_bytes(content)
    result = run("pull", "u2netp", "--directory", "here")
    assert (result.exit_code, result.stdout) == (0, "here/u2netp.onnx\n")
    assert "licence of the weights: Apache-2.0" in result.stderr
    assert json.loads(run("pull", "u2netp", "--directory", "here", "--json").stdout)["path"] == "here/u2netp.onnx"


def test_weights_command(run: Callable[..., Result]) -> None:
    lines = run("weights").stdout.splitlines()
    assert lines[0].split() == ["name", "architecture", "size", "files", "pull", "licence", "note"]
    assert [line.split()[0] for line in lines[1:]] == list(REGISTRY)
    rows = json.loads(run("weights", "--json").stdout)
    assert [row["name"] for row in rows] == list(REGISTRY)
    assert rows[1]["sources"][1]["md5"] == "8e83ca70e441ab06c318d82300c84806"


@pytest.mark.parametrize("command", ["export", "pull", "weights"])
def test_help_has_an_example(run: Callable[..., Result], command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"      matteserve {command}" in result.stdout


def test_the_commands_import_neither_torch_nor_onnx() -> None:
    code = (
        "import sys, matteserve_export.cli as c\n"
        "c.weights(['--json'], standalone_mode=False)\n"
        "sys.exit(sorted({'torch', 'onnx', 'onnxruntime'} & set(sys.modules)) or 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_without_the_extra_the_message_names_it(run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "matteserve_export.pipeline")
    monkeypatch.setitem(sys.modules, "onnxslim", None)
    monkeypatch.delitem(sys.modules, "matteserve_export.serving")
    monkeypatch.delitem(sys.modules, "matteserve_export.to_onnx", raising=False)
    result = run("export", "u2netp", "--weights", "a.pth")
    assert "the exporter needs onnxslim, which is not installed: pip install 'matteserve[export]'" in result.stderr
