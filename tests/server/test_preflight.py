"""Engines that do not fit: refused in one sentence that names both sides and the way out."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from tritonclient.grpc import model_config_pb2 as pb

from matteserve_server import EmbeddedServer, EngineMismatchError, RepositoryError, ServerOptions
from matteserve_server.machine import decode_nvinfer_version, installed_version, parse_smi, this_machine
from matteserve_server.manifest import EngineFile, read_manifest
from matteserve_server.plan_backend.fit import Gpu, Machine
from matteserve_server.repository import Repository, read_model
from support.tiny_model import write_config, write_repository

L4 = Gpu("NVIDIA L4", "8.9", 24 << 30)
A10 = Gpu("NVIDIA A10", "8.6", 24 << 30)
T4 = Gpu("Tesla T4", "7.5", 16 << 30)
HERE = Machine(gpus=(L4,), driver="580.1", tensorrt="10.13.3", tensorrt_rtx="1.7.1.116")
BUILDER = {
    "name": "tensorrt",
    "version": "10.13.3.9",
    "compute_capabilities": ["8.9"],
    "gpu": "NVIDIA L4",
    "profile": {"min": 1, "opt": 4, "max": 8},
    "flags": ["STRONGLY_TYPED"],
    "version_compatible": False,
    "hardware_compatibility": "none",
}


def write_plan(
    repository: Path, *, kind: str = "trt", builder: dict[str, Any] | None = BUILDER, backend: str = "tensorrt"
) -> Path:
    """Write the engine `tiny_<kind>_fp16`, whose plan is a few bytes."""
    folder = repository / f"tiny_{kind}_fp16"
    (folder / "1").mkdir(parents=True)
    config = read_model(repository / "tiny_onnx_fp32").config
    config.name, config.backend, config.default_model_filename = folder.name, backend, "model.plan"
    if backend == "tensorrt":
        config.platform = "tensorrt_plan"
    config.instance_group[0].kind = pb.ModelInstanceGroup.KIND_GPU
    write_config(repository, config)
    plan = b"ptrt" + bytes(100)
    (folder / "1" / "model.plan").write_bytes(plan)
    manifest = {
        "schema_version": 2,
        "model": "tiny",
        "engine": kind,
        "precision": "fp16",
        "file": {"name": "model.plan", "sha256": hashlib.sha256(plan).hexdigest(), "bytes": len(plan)},
        "builder": builder,
    }
    (folder / "1" / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    return write_repository(tmp_path / "repository")


def check(repository: Path, machine: Machine, engine: str = "tiny_trt_fp16") -> None:
    Repository.read(repository).check([engine], machine)


@pytest.mark.parametrize(
    ("changes", "machine"),
    [
        ({}, HERE),
        ({"version_compatible": True, "version": "10.12.0.1"}, HERE),
        ({"version_compatible": True}, Machine((L4,), "580.1", tensorrt="11.4.0")),
        ({"hardware_compatibility": "ampere_plus", "compute_capabilities": ["8.0"]}, HERE),
        ({"hardware_compatibility": "same_compute_capability"}, Machine((T4, L4), "580.1", tensorrt="10.13.3")),
        ({"compute_capabilities": ["8.6", "8.9"], "gpu": None}, HERE),
    ],
)
def test_plan_that_fits(repository: Path, changes: dict[str, Any], machine: Machine) -> None:
    write_plan(repository, builder={**BUILDER, **changes})
    check(repository, machine)


@pytest.mark.parametrize(
    ("changes", "machine", "message"),
    [
        (
            {"version": "10.9.0.34"},
            HERE,
            "was built by TensorRT 10.9.0.34, this machine has TensorRT 10.13.3: build it for this machine with "
            "`matteserve build tiny --engine trt --precision fp16`",
        ),
        ({"version": "10.13.4", "version_compatible": True}, HERE, "by TensorRT 10.13.4, this machine has TensorRT 10"),
        (
            {},
            Machine((A10, T4), "580.1", tensorrt="10.13.3"),
            r"for compute capability 8.9 \(NVIDIA L4\), this machine has NVIDIA A10 \(8.6\), Tesla T4 \(7.5\): build",
        ),
        (
            {"hardware_compatibility": "ampere_plus"},
            Machine((T4,), "580.1", tensorrt="10.13.3"),
            r"this machine has Tesla T4 \(7.5\)",
        ),
        ({}, Machine(tensorrt="10.13.3"), "this machine has no NVIDIA GPU that its driver shows"),
        ({}, Machine((L4,), "580.1"), r"this machine has no TensorRT \(pip install 'matteserve\[server,gpu\]'\)"),
        (
            {"name": "tensorrt_rtx"},
            HERE,
            "by TensorRT for RTX 10.13.3.9, its config.pbtxt asks for TensorRT, which can",
        ),
    ],
)
def test_plan_that_does_not_fit(repository: Path, changes: dict[str, Any], machine: Machine, message: str) -> None:
    write_plan(repository, builder={**BUILDER, **changes})
    with pytest.raises(EngineMismatchError, match=f"engine 'tiny_trt_fp16' .*{message}"):
        check(repository, machine)


def test_rtx_plan_needs_the_rtx_library(repository: Path) -> None:
    builder = {**BUILDER, "name": "tensorrt_rtx", "version": "1.7.1.116", "gpu": None}
    write_plan(repository, kind="rtx", builder=builder, backend="tensorrt_rtx")
    check(repository, HERE, "tiny_rtx_fp16")
    with pytest.raises(
        EngineMismatchError, match=r"has TensorRT for RTX 1\.6\.0: .*build tiny --engine rtx --precision fp16"
    ):
        check(repository, Machine((L4,), "580.1", "10.13.3", tensorrt_rtx="1.6.0"), "tiny_rtx_fp16")


def test_plans_for_other_gpus_of_a_fleet_count(repository: Path) -> None:
    config = read_model(write_plan(repository)).config
    config.cc_model_filenames["8.6"] = "model_8_6.plan"
    write_config(repository, config)
    check(repository, Machine((A10,), "580.1", tensorrt="10.13.3"))


def test_plan_without_a_manifest_is_left_to_triton(repository: Path, caplog: pytest.LogCaptureFixture) -> None:
    (write_plan(repository) / "1" / "manifest.json").unlink()
    check(repository, Machine())
    assert "no manifest that says what it was built for" in caplog.text


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda plan: plan.write_bytes(plan.read_bytes()[:50]), "has 50 bytes, its manifest says 104: it was cut off"),
        (lambda plan: plan.write_bytes(bytes(104)), r"is not the file that was built: its sha256 is .*copy it again"),
    ],
)
def test_plan_that_is_not_the_file_that_was_built(repository: Path, damage: Any, message: str) -> None:
    damage(write_plan(repository) / "1" / "model.plan")
    with pytest.raises(EngineMismatchError, match=message):
        check(repository, HERE)


def test_missing_file_of_the_manifest(repository: Path) -> None:
    folder = write_plan(repository)
    (folder / "1" / "model.plan").rename(folder / "1" / "other.plan")
    with pytest.raises(RepositoryError, match=r"has no model\.plan"):
        check(repository, HERE)


@pytest.mark.triton
def test_server_refuses_a_plan_before_triton_sees_it(repository: Path) -> None:
    write_plan(repository)
    if this_machine().gpus:
        pytest.skip("here is a GPU; another sentence would be right")
    options = ServerOptions(repository, ("tiny_trt_fp16",), grpc_port=0, metrics_port=None)
    with pytest.raises(EngineMismatchError, match=r"this machine has no NVIDIA GPU.*matteserve build tiny"):
        EmbeddedServer(options).start()


def test_old_manifest_describes_the_onnx_file(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(
        json.dumps(
            {
                "schema_version": 1,
                "engine": "onnx",
                "precision": "fp32",
                "onnx": {"sha256": "ab", "bytes": 7, "opset": 17},
            }
        )
    )
    manifest = read_manifest(tmp_path)
    assert manifest is not None
    assert manifest.file == EngineFile("model.onnx", "ab", 7)
    assert (manifest.builder, manifest.tolerance) == (None, None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not a manifest"),
        ('{"schema_version": 2, "engine": "onnx"}', "KeyError: 'precision'"),
        ('{"schema_version": 3}', "has schema version 3, this matteserve reads up to 2; upgrade it"),
    ],
)
def test_manifest_that_cannot_be_read(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(RepositoryError, match=message):
        read_manifest(tmp_path)


def test_what_nvidia_smi_prints_is_read() -> None:
    assert parse_smi("NVIDIA L4, 8.9, 23034, 580.95.05\nTesla T4, 7.5, 15360, 580.95.05\n") == Machine(
        (Gpu("NVIDIA L4", "8.9", 23034 << 20), Gpu("Tesla T4", "7.5", 15360 << 20)), driver="580.95.05"
    )
    assert parse_smi("No devices were found\n") is None


def test_version_number_of_the_library() -> None:
    assert decode_nvinfer_version(101303) == "10.13.3"
    assert decode_nvinfer_version(110400) == "11.4.0"


def test_this_machine_can_be_looked_at() -> None:
    machine = this_machine()
    assert machine.tensorrt == installed_version("tensorrt")
    assert bool(machine.gpus) == bool(machine.driver)
    assert this_machine(native_backends=True).gpus == machine.gpus
