"""The repository writer: golden configurations, names, and folders that are never half written."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from matteserve_client import ModelContract
from matteserve_export import RepositoryError
from matteserve_export.repository import (
    DynamicBatching,
    Engine,
    GpuOptions,
    InstanceGroup,
    alias_config,
    check_model_name,
    engine_config,
    to_pbtxt,
    write_model,
)

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def engine() -> Engine:
    contract = ModelContract(
        height=320,
        width=320,
        max_batch_size=8,
        resample="bilinear",
        alpha_resample="lanczos",
        architecture="u2netp",
        weights="u2netp",
        weights_sha256="ab" * 32,
        weights_licence="Apache-2.0",
    )
    return Engine("u2netp", contract, file=b"not really a graph", manifest={"schema_version": 1, "note": "ü"})


def _files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def plan(engine: Engine) -> Engine:
    """A TensorRT engine of the same model, for a mixed fleet."""
    contract = dataclasses.replace(engine.contract, engine="trt", precision="fp16")
    plans = {"8.9": Path("built-on-an-l4.plan"), "12.0": Path("built-on-a-5090.plan")}
    return dataclasses.replace(
        engine, contract=contract, file=b"not really a plan", batch_sizes=(1, 4, 8), other_plans=plans
    )


@pytest.mark.parametrize(
    ("golden", "build"),
    [
        ("engine.pbtxt", lambda engine, plan: engine_config(engine)),
        ("engine_cpu.pbtxt", lambda engine, plan: engine_config(engine, cpu=True)),
        ("engine_trt.pbtxt", lambda engine, plan: engine_config(plan)),
        ("alias.pbtxt", lambda engine, plan: alias_config(engine)),
        ("alias_trt.pbtxt", lambda engine, plan: alias_config(plan)),
        ("alias.pbtxt", lambda engine, plan: alias_config(plan, cpu=True)),  # without a GPU it is the ONNX one again
    ],
)
def test_golden_configuration(
    engine: Engine, plan: Engine, golden: str, build: Callable[[Engine, Engine], Any]
) -> None:
    """After a wanted change: `UPDATE_GOLDEN=1 python -m pytest tests/export/test_repository.py`, then read the diff."""
    text, path = to_pbtxt(build(engine, plan)), GOLDEN / golden
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")
    assert to_pbtxt(text_format.Parse(text, model_config_pb2.ModelConfig())) == text


def test_a_plan_gets_what_a_gpu_needs(plan: Engine) -> None:
    config = engine_config(plan)
    assert (config.backend, config.platform) == ("tensorrt", "tensorrt_plan")
    assert config.default_model_filename == "model.plan"
    assert dict(config.cc_model_filenames) == {"8.9": "model_sm89.plan", "12.0": "model_sm120.plan"}
    assert [group.kind for group in config.instance_group] == [model_config_pb2.ModelInstanceGroup.KIND_GPU]
    cuda = config.optimization.cuda
    graphs = [(graph.batch_size, list(graph.input["image"].dim)) for graph in cuda.graph_spec]
    assert graphs == [(1, [320, 320, 3]), (4, [320, 320, 3]), (8, [320, 320, 3])]
    assert not any(graph.HasField("graph_lower_bound") for graph in cuda.graph_spec)
    assert (cuda.graphs, cuda.output_copy_stream) == (True, True)
    assert config.optimization.input_pinned_memory.enable
    assert config.optimization.output_pinned_memory.enable
    assert [sample.batch_size for sample in config.model_warmup] == [1, 4, 8]


def test_what_a_gpu_needs_can_be_switched_off(plan: Engine) -> None:
    gpu = GpuOptions(cuda_graphs=False, output_copy_stream=False, pinned_memory=False)
    optimization = engine_config(dataclasses.replace(plan, gpu=gpu)).optimization
    assert (optimization.cuda.graphs, optimization.cuda.output_copy_stream) == (False, False)
    assert not optimization.cuda.graph_spec
    # Pinned memory is on where nothing is said, so "off" must be said.
    assert optimization.HasField("input_pinned_memory")
    assert not optimization.input_pinned_memory.enable


def test_an_rtx_plan_is_not_one_of_tensorrt(plan: Engine) -> None:
    contract = dataclasses.replace(plan.contract, engine="rtx")
    config = engine_config(dataclasses.replace(plan, contract=contract, other_plans={}))
    assert (config.backend, config.platform, config.default_model_filename) == ("tensorrt_rtx", "", "model.plan")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_sizes": (1, 9)}, "batch size 9 to warm up is not between 1 and max_batch_size, 8"),
        ({"batch_sizes": (0,)}, "batch size 0 to warm up"),
        ({"other_plans": {"sm89": Path("x")}}, "plan for compute capability 'sm89'"),
        ({"engine": "rtx"}, "'8.9' of engine kind 'rtx': Triton chooses among plans of kind trt only"),
        ({"engine": "ncnn"}, "no backend serves engine kind 'ncnn'; allowed are onnx, trt, rtx"),
    ],
)
def test_unusable_plans(plan: Engine, changes: dict[str, Any], message: str) -> None:
    if "engine" in changes:
        changes = {"contract": dataclasses.replace(plan.contract, **changes)}
    with pytest.raises(RepositoryError, match=message):
        dataclasses.replace(plan, **changes)


def test_the_client_reads_the_contract_back(engine: Engine) -> None:
    for config in (engine_config(engine), alias_config(engine)):
        parsed = text_format.Parse(to_pbtxt(config), model_config_pb2.ModelConfig())
        assert ModelContract.from_config(parsed) == engine.contract


def test_settings_arrive(engine: Engine) -> None:
    config = engine_config(
        dataclasses.replace(
            engine,
            batching=DynamicBatching(max_queue_delay_us=5, max_queue_size=3, default_queue_timeout_us=7),
            instances=InstanceGroup(count=2, kind="KIND_CPU"),
        )
    )
    policy = config.dynamic_batching.default_queue_policy
    assert config.dynamic_batching.max_queue_delay_microseconds == 5
    assert (policy.max_queue_size, policy.default_timeout_microseconds, policy.allow_timeout_override) == (3, 7, True)
    assert policy.timeout_action == model_config_pb2.ModelQueuePolicy.REJECT
    (group,) = config.instance_group
    assert (group.count, group.kind) == (2, model_config_pb2.ModelInstanceGroup.KIND_CPU)


def test_a_queue_without_bounds_has_no_policy(engine: Engine) -> None:
    """Any of a policy's fields makes Triton wait for an idle instance before it gathers the next batch."""
    assert not engine_config(engine).dynamic_batching.HasField("default_queue_policy")
    bounded = engine_config(dataclasses.replace(engine, batching=DynamicBatching(max_queue_size=7)))
    policy = bounded.dynamic_batching.default_queue_policy
    assert (policy.max_queue_size, policy.default_timeout_microseconds, policy.allow_timeout_override) == (7, 0, False)


def test_session_options_arrive_beside_the_contract(engine: Engine) -> None:
    config = engine_config(dataclasses.replace(engine, session_options={"enable_mem_arena": "0"}))
    assert config.parameters["enable_mem_arena"].string_value == "0"
    assert ModelContract.from_config(config) == engine.contract
    assert "enable_mem_arena" not in alias_config(engine).parameters


def test_a_card_is_written_and_replaced(engine: Engine, tmp_path: Path) -> None:
    engine_path, _ = write_model(tmp_path / "r", dataclasses.replace(engine, card="# one\n"))
    assert (engine_path / "MODEL_CARD.md").read_text(encoding="utf-8") == "# one\n"
    write_model(tmp_path / "r", engine)
    assert not (engine_path / "MODEL_CARD.md").exists()


def test_what_is_written(engine: Engine, tmp_path: Path) -> None:
    repository = tmp_path / "deep" / "model_repository"
    engine_path, alias_path = write_model(repository, engine)
    assert (engine_path, alias_path) == (repository / "u2netp_onnx_fp32", repository / "u2netp")
    assert sorted(_files(repository)) == [
        "u2netp/1/.gitkeep",
        "u2netp/config.pbtxt",
        "u2netp/configs/cpu.pbtxt",
        "u2netp_onnx_fp32/1/manifest.json",
        "u2netp_onnx_fp32/1/model.onnx",
        "u2netp_onnx_fp32/config.pbtxt",
        "u2netp_onnx_fp32/configs/cpu.pbtxt",
    ]
    assert (engine_path / "1" / "model.onnx").read_bytes() == engine.file
    assert json.loads((engine_path / "1" / "manifest.json").read_text(encoding="utf-8")) == engine.manifest
    assert [child.name for child in repository.parent.iterdir()] == ["model_repository"]  # no staging left


def _on_disk(plan: Engine, folder: Path) -> Engine:
    """The mixed-fleet engine with its plans as files, and a manifest that describes the first."""
    folder.mkdir()
    paths = [folder / name for name in ("model", "sm89", "sm120")]
    for path in paths:
        path.write_bytes(path.name.encode() * 1000)
    described = {"name": "model.plan", "bytes": 5000, "sha256": sha256(paths[0].read_bytes()).hexdigest()}
    other = {"8.9": paths[1], "12.0": paths[2]}
    return dataclasses.replace(plan, file=paths[0], other_plans=other, manifest={"file": described})


def test_a_plan_is_moved_and_the_alias_left_alone(engine: Engine, plan: Engine, tmp_path: Path) -> None:
    repository = tmp_path / "r"
    _, alias_path = write_model(repository, engine)
    before = _files(alias_path)
    built = _on_disk(plan, tmp_path / "built")
    engine_path, _ = write_model(repository, built, alias=False)
    assert engine_path == repository / "u2netp_trt_fp16"
    files = _files(engine_path)
    assert sorted(files) == [
        "1/manifest.json",
        "1/model.plan",
        "1/model_sm120.plan",
        "1/model_sm89.plan",
        "config.pbtxt",
    ]
    assert files["1/model_sm89.plan"] == b"sm89" * 1000
    assert not list((tmp_path / "built").iterdir())
    assert _files(alias_path) == before
    # A build without an alias makes none.
    write_model(tmp_path / "other", _on_disk(plan, tmp_path / "again"), alias=False)
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["u2netp_trt_fp16"]


@pytest.mark.parametrize("damage", ["cut short", "another engine's", "none"])
def test_a_file_that_is_not_what_the_manifest_says_is_not_published(plan: Engine, tmp_path: Path, damage: str) -> None:
    repository = tmp_path / "r"
    write_model(repository, _on_disk(plan, tmp_path / "first"), alias=False)
    before = _files(repository)
    built = _on_disk(plan, tmp_path / "second")
    assert isinstance(built.file, Path)
    if damage == "cut short":
        built.file.write_bytes(built.file.read_bytes()[:4000])
        message = (
            r"model.plan of u2netp_trt_fp16 is not the file .* found 4000 bytes.*expected 5000 bytes.*; nothing was"
        )
    elif damage == "another engine's":
        built.file.write_bytes(b"other" * 1000)
        message = "or another engine's; nothing was published. Build it again"
    else:
        built.file.unlink()
        message = "cannot write model 'u2netp': No such file or directory; the repository is as it was"
    with pytest.raises(RepositoryError, match=message):
        write_model(repository, built, alias=False)
    assert _files(repository) == before


def test_a_new_export_replaces_and_keeps_what_is_not_ours(engine: Engine, tmp_path: Path) -> None:
    engine_path, alias_path = write_model(tmp_path / "r", engine)
    for path in (engine_path, alias_path):
        (path / "configs" / "cpu.pbtxt").write_text("# mine")
        (path / "NOTES.txt").write_text("mine too")
    write_model(tmp_path / "r", dataclasses.replace(engine, file=b"new"))
    for path in (engine_path, alias_path):
        assert (path / "configs" / "cpu.pbtxt").read_text() == "# mine"
        assert (path / "NOTES.txt").read_text() == "mine too"
    assert (engine_path / "1" / "model.onnx").read_bytes() == b"new"


def test_a_new_export_replaces_the_cpu_variant_that_is_ours(engine: Engine, tmp_path: Path) -> None:
    engine_path, _ = write_model(tmp_path / "r", engine)
    write_model(tmp_path / "r", dataclasses.replace(engine, batching=DynamicBatching(max_queue_size=7)))
    assert "max_queue_size: 7" in (engine_path / "configs" / "cpu.pbtxt").read_text()


def test_a_reader_never_finds_half_a_model(engine: Engine, tmp_path: Path) -> None:
    """A reader that looks all the time finds one whole graph or another, or for an instant no folder."""
    repository = tmp_path / "r"
    write_model(repository, dataclasses.replace(engine, file=b"0" * 100_000, manifest={}))
    mixed: list[str] = []
    seen: set[bytes] = set()
    stop = threading.Event()

    def look() -> None:
        while not stop.is_set():
            try:
                onnx = (repository / engine.name / "1" / "model.onnx").read_bytes()
            except OSError:
                continue
            seen.add(onnx[:1])
            if len(onnx) != 100_000 or len(set(onnx)) != 1:
                mixed.append(f"{len(onnx)} bytes of {set(onnx)}")

    reader = threading.Thread(target=look)
    reader.start()
    try:
        for turn in range(30):
            fill = str(turn % 10)
            write_model(repository, dataclasses.replace(engine, file=fill.encode() * 100_000, manifest={}))
    finally:
        stop.set()
        reader.join()
    assert not mixed
    assert len(seen) > 1


_DISK_FULL = """
import resource, sys
from pathlib import Path
from matteserve_client import ModelContract
from matteserve_export import RepositoryError
from matteserve_export.repository import Engine, write_model
contract = ModelContract(32, 32, 1, "bilinear", "bilinear", "a", "w")
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    write_model(Path(sys.argv[1]), Engine("u2netp", contract, b"x" * 100_000, {}))
except RepositoryError as exc:
    print(exc)
"""


def test_no_room_leaves_the_old_model(engine: Engine, tmp_path: Path) -> None:
    """The kernel refuses the write in the middle of the file, as it does on a full disk."""
    repository = tmp_path / "r"
    write_model(repository, engine)
    before = _files(tmp_path)
    out = subprocess.run(
        [sys.executable, "-c", _DISK_FULL, str(repository)], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    assert "cannot write model 'u2netp': File too large; the repository is as it was" in out
    assert _files(tmp_path) == before


@pytest.mark.parametrize("folder", ["u2netp_onnx_fp32", "u2netp"])
@pytest.mark.parametrize("exists", [True, False])
def test_a_move_that_fails_is_undone(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str, exists: bool
) -> None:
    """Engine and alias change together or not at all."""
    repository = tmp_path / "r"
    if exists:
        write_model(repository, engine)
    before = _files(tmp_path)
    rename = Path.rename

    def fails(self: Path, target: Path) -> Path:
        if Path(target) == repository / folder and self.name == folder:
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(RepositoryError, match="Input/output error; the repository is as it was"):
        write_model(repository, dataclasses.replace(engine, file=b"new"))
    assert _files(tmp_path) == before


def test_a_file_in_place_of_the_repository(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "r").write_text("")
    with pytest.raises(RepositoryError, match=r"cannot write model 'u2netp': File exists"):
        write_model(tmp_path / "r", engine)


@pytest.mark.parametrize("name", ["u2netp", "u2netp_onnx_fp32"])
@pytest.mark.parametrize("config", [None, 'platform: "ensemble"', "not protobuf text {"])
def test_a_foreign_folder_is_not_touched(engine: Engine, tmp_path: Path, name: str, config: str | None) -> None:
    (tmp_path / name).mkdir()
    if config is not None:
        (tmp_path / name / "config.pbtxt").write_text(config)
    before = _files(tmp_path)
    with pytest.raises(RepositoryError, match=r"was not written by `matteserve export`; .* --name"):
        write_model(tmp_path, engine)
    assert _files(tmp_path) == before


def test_a_link_is_not_followed(engine: Engine, tmp_path: Path) -> None:
    write_model(tmp_path / "elsewhere", engine)
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "u2netp").symlink_to(tmp_path / "elsewhere" / "u2netp")
    with pytest.raises(RepositoryError, match="was not written by"):
        write_model(tmp_path / "r", engine)


@pytest.mark.parametrize("name", ["", "..", "../x", "a/b", "/abs", "A", "a b", "-a", "_a", ".a", "ä", "a" * 65, "a\n"])
def test_unusable_names(engine: Engine, name: str) -> None:
    with pytest.raises(RepositoryError, match="allowed are 1 to 64 of a-z, 0-9"):
        check_model_name(name)
    with pytest.raises(RepositoryError):
        dataclasses.replace(engine, model=name)


@pytest.mark.parametrize("name", ["a", "u2netp", "birefnet-lite_2", "0", "a" * 64])
def test_usable_names(name: str) -> None:
    assert check_model_name(name) == name


@pytest.mark.parametrize("field", ["max_queue_delay_us", "max_queue_size", "default_queue_timeout_us"])
def test_negative_batching(field: str) -> None:
    with pytest.raises(RepositoryError, match=f"{field} is -1, must not be negative"):
        DynamicBatching(**{field: -1})


def test_no_instances() -> None:
    with pytest.raises(RepositoryError, match="count is 0, must be at least 1"):
        InstanceGroup(count=0)
