"""The whole way, and the commands: from a checkpoint or a public ONNX to a repository, or to a clear refusal."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
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
from matteserve_export.compare import make_scenes, normalise, reference_alpha
from matteserve_export.models import build_model
from matteserve_export.pipeline import ExportConfig, export_model
from matteserve_export.serving import ServingConfig
from matteserve_export.weights import REGISTRY, PatchOrder, find_weights
from support.conformance import fill, pixel_values


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
    engine = text_format.Parse((result.engine_path / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())
    assert engine.parameters["enable_mem_pattern"].string_value == "0"

    # The published file, not what the pipeline had in memory, equals torch.
    weights = config.weights
    wrap = ServingConfig(weights.mean, weights.std, weights.sigmoid, weights.min_max)
    with torch.inference_mode():
        maps = lively_u2netp(torch.from_numpy(normalise(scenes, wrap))).numpy()
    alpha = make_runner(onnx.load_from_string(graph))(scenes)
    assert np.ptp(alpha) == 255
    assert np.abs(alpha.astype(int) - reference_alpha(maps, wrap)).max() <= 1


def test_rembgs_numerics_stand_in_contract_manifest_and_card(tiny_config: ExportConfig) -> None:
    result = export_model(dataclasses.replace(tiny_config, numerics="rembg"))
    parsed = text_format.Parse((result.alias_path / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())
    contract = ModelContract.from_config(parsed)
    assert (contract.numerics, contract.resample, contract.alpha_resample) == ("rembg", "lanczos", "lanczos")
    manifest = json.loads((result.engine_path / "1" / "manifest.json").read_text(encoding="utf-8"))
    assert (manifest["input"]["numerics"], manifest["input"]["min_max"]) == ("rembg", True)
    card = (result.engine_path / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert "division by its largest sample, as rembg does," in card
    assert "(lanczos)" in card


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


def test_random_weights_say_so(config: ExportConfig) -> None:
    result = export_model(dataclasses.replace(config, kind="conformance", path=None, max_batch_size=1))
    manifest = json.loads((result.engine_path / "1" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["weights"]["random"] is True
    assert manifest["weights"]["file"] is None
    assert (result.contract.weights, result.contract.weights_sha256) == ("random", "")
    assert result.contract.weights_licence == manifest["weights"]["licence"] == "none"
    assert "its masks mean nothing" in (result.engine_path / "MODEL_CARD.md").read_text(encoding="utf-8")


def test_a_kind_and_its_path_go_together(config: ExportConfig) -> None:
    for wrong in ({"path": None}, {"kind": "conformance"}):
        with pytest.raises(ExportError, match="do not go together"):
            dataclasses.replace(config, **wrong)


def test_a_checkpoint_stored_in_half_precision_becomes_float32(tiny_config: ExportConfig) -> None:
    state = torch.load(tiny_config.path, weights_only=True)
    torch.save({name: tensor.half() for name, tensor in state.items()}, tiny_config.path)
    result = export_model(tiny_config)
    graph = onnx.load(result.engine_path / "1" / "model.onnx").graph
    types = {tensor.data_type for tensor in graph.initializer}
    assert onnx.TensorProto.FLOAT in types
    assert onnx.TensorProto.FLOAT16 not in types


def test_the_model_card_says_where_it_comes_from(tiny_config: ExportConfig) -> None:
    result = export_model(tiny_config)
    card = (result.engine_path / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert card.startswith("# small\n")
    for part in (
        "tiny at 64x64, fp32",
        f"tiny.pth, SHA-256 {result.contract.weights_sha256}",
        "licence of the weights: unknown; of the architecture's code: Apache-2.0",
        "published at https://github.com/xuebinqin/U-2-Net",
        "UINT8 [B, 64, 64, 3], RGB, B up to 2",
        "stretching each map to 0..1",
        "| serving ONNX vs reference | ",
        "https://arxiv.org/abs/2005.09007",
        f"torch {torch.__version__}",
    ):
        assert part in card


def test_no_room_is_said_before_the_work_starts(tiny_config: ExportConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    full = type("Usage", (), {"free": 100})
    monkeypatch.setattr(pipeline.shutil, "disk_usage", lambda path: full)
    monkeypatch.setattr(pipeline, "export_core", lambda *_: pytest.fail("the work has started"))
    with pytest.raises(
        RepositoryError, match=r"no room for the model: it needs about \d+ MiB, free are 0 MiB; make room"
    ):
        export_model(tiny_config)
    assert not tiny_config.model_repository.exists()


def test_room_that_runs_out_on_the_way_leaves_nothing(config: ExportConfig) -> None:
    """The kernel lets no file grow beyond 1 MB; the graph has 4.5."""
    code = (
        "import resource, sys\n"
        "from matteserve_export import cli\n"
        "import matteserve_export.repository as r\n"
        "write = r.write_model\n"
        "def limited(*a):\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, resource.RLIM_INFINITY))\n"
        "    return write(*a)\n"
        "r.write_model = limited\n"
        "cli.export(sys.argv[1:])\n"
    )
    arguments = ["u2netp", "--weights", str(config.path), "--size", "32", "--max-batch-size", "1"]
    repository = ["--model-repository", str(config.model_repository)]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments, *repository], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 1
    assert "cannot write model 'u2netp': File too large; the repository is as it was. Needed are 4 MiB" in done.stderr
    assert [path for path in config.model_repository.parent.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("u2net", (320, 320), ""),
        ("u2net", (352, 320), ""),
        ("u2net", (512, 512), "u2net was trained at 320x320; at 512x512 it sees objects at another scale"),
        ("birefnet_hr", (512, 512), ".925 at 2048x2048, .876 at 1024x1024, .540 at 512x512"),
        ("birefnet_lite_2k", (1024, 1024), "trained at 1440x2560"),
        ("birefnet_dynamic", (256, 2304), ""),
        ("birefnet_dynamic", (224, 512), "was trained at sizes from 256 to 2304; at 224x512"),
    ],
)
def test_a_size_far_from_the_training_is_warned_of(
    name: str, size: tuple[int, int], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    pipeline._warn_about_size(find_weights(name), *size)
    assert message in caplog.text
    assert bool(message) == bool(caplog.text)


@pytest.fixture(scope="module")
def legacy_birefnet(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    """BiRefNet lite with the old patch order, and its checkpoint as training leaves it: prefixes, extras, float16."""
    model = build_model("birefnet_lite", patch_order="legacy")
    fill(model, seed=4)
    state = {f"module._orig_mod.{name}": tensor.half() for name, tensor in model.state_dict().items()}
    state["module._orig_mod.decoder.conv_ms_spvn_4.weight"] = torch.zeros(1, 384, 1, 1)
    path = tmp_path_factory.mktemp("legacy") / "birefnet_lite.pth"
    torch.save(state, path)
    model.load_state_dict({name: tensor.half() for name, tensor in model.state_dict().items()})
    return model, path


@pytest.mark.parametrize(("chosen", "equal"), [(None, True), ("legacy", True), ("current", False)])
def test_a_legacy_checkpoint_is_converted_when_it_is_read(
    config: ExportConfig, legacy_birefnet: tuple[nn.Module, Path], chosen: PatchOrder | None, equal: bool
) -> None:
    expected, path = legacy_birefnet
    asked = dataclasses.replace(config, weights=find_weights("birefnet_lite"), path=path, patch_order=chosen)
    loaded = pipeline._load(asked)
    pictures = pixel_values(1, (1, 3, 64, 64))
    with torch.inference_mode():
        difference = (loaded(pictures) - expected(pictures)).abs().max().item()
    assert (difference < 1e-3) == equal
    assert equal or difference > 0.1
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}


@pytest.mark.slow
def test_the_manifest_says_which_order_was_assumed(
    config: ExportConfig, legacy_birefnet: tuple[nn.Module, Path]
) -> None:
    expected, path = legacy_birefnet
    result = export_model(dataclasses.replace(config, weights=find_weights("birefnet_lite"), path=path))
    manifest = json.loads((result.engine_path / "1" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["weights"]["patch_order"] == "legacy"
    assert "before the change" in manifest["weights"]["patch_order_basis"]
    assert manifest["onnx"]["nodes_by_type"]["DeformConv"] == 20
    assert "patch order of the checkpoint: legacy" in (result.engine_path / "MODEL_CARD.md").read_text(encoding="utf-8")
    wrap = ServingConfig(config.weights.mean, config.weights.std, sigmoid=True)
    images = make_scenes(2, 64, 64, seed=9)
    with torch.inference_mode():
        alpha = reference_alpha(expected(torch.from_numpy(normalise(images, wrap))).numpy(), wrap)
    served = make_runner((result.engine_path / "1" / "model.onnx").read_bytes())(images)
    assert np.abs(served.astype(int) - alpha).max() <= 1


def test_an_unknown_patch_order_must_be_chosen(config: ExportConfig) -> None:
    with pytest.raises(ExportError, match=r"not known \(no date .*\); choose with --patch-order current or .* legacy"):
        export_model(dataclasses.replace(config, weights=find_weights("birefnet_lite_matting")))


def test_a_checkpoint_that_is_no_birefnet_at_all(config: ExportConfig) -> None:
    with pytest.raises(CheckpointError, match=r"missing: .* unexpected: .* fit the architecture u2netp$"):
        export_model(dataclasses.replace(config, weights=find_weights("birefnet_lite")))


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
    assert re.fullmatch(r"graph    \d+ nodes: Conv 119, .*, …; 0.4 giga-MACs a picture", lines[2])
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
    assert printed["nodes"]["Conv"] == 2
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
        (["u3net"], "Error: no weights are called 'u3net'; did you mean u2net"),
        (["u2netp"], "no u2netp.pth or u2netp.onnx in "),
        (["u2netp"], "run `matteserve pull u2netp`, or give the file with --weights or --onnx"),
        (["birefnet_swin_b"], "birefnet_swin_b: no weights are released; give your own with --weights"),
        (["demo"], "no u2netp_demo.safetensors in "),
        (["u2netp", "--weights", "a.pth", "--onnx", "a.onnx"], "--weights, --onnx and --init exclude each other"),
        (["u2netp", "--init", "conformance", "--onnx", "a.onnx"], "exclude each other; give one of them"),
        (["u2netp", "--init", "zeros"], "'zeros' is not 'conformance'"),
        (["silueta", "--init", "conformance"], "there is no torch code for the architecture 'silueta' here"),
        (["u2netp", "--weights", "a.pth", "--patch-order", "legacy"], "only BiRefNet has one"),
        (["birefnet", "--onnx", "a.onnx", "--patch-order", "legacy"], "no patch order can be chosen here: an ONNX has"),
        (["birefnet", "--weights", "a.pth", "--patch-order", "old"], "'old' is not one of"),
        (["bria-rmbg", "--onnx", "a.onnx"], "CC-BY-NC-4.0, which forbids commercial use"),
        (["birefnet", "--weights", "a.pth", "--size", "1000"], "multiples of 32, from 32 to 4096"),
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
    assert " ".join(lines[0].split()) == "name architecture size pull licence patch order note"
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
