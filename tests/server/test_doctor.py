"""What `matteserve doctor` says: about this machine, damaged repositories, and machines that are not here."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
from tritonclient.grpc import model_config_pb2 as pb

from matteserve_server import binary
from matteserve_server.doctor import Finding, examine
from matteserve_server.plan_backend.fit import Gpu, Machine
from matteserve_server.repository import read_model
from support.commands import command
from support.engines import add_engine
from support.tiny_model import write_config, write_repository

L4 = Machine((Gpu("NVIDIA L4", "8.9", 24 << 30),), driver="580.1", cuda="13.0", tensorrt="10.13.3")


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    return write_repository(tmp_path / "repository")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def of(findings: list[Finding], area: str) -> list[tuple[str, str]]:
    return [(finding.state, finding.text) for finding in findings if finding.area == area]


def look(repository: Path, machine: Machine | None = None) -> list[Finding]:
    return examine(repository, ports=(), machine=machine)


@pytest.mark.triton
def test_command_reports_this_machine_and_that_nothing_is_in_the_way(repository: Path) -> None:
    arguments = ["doctor", "--model-repository", str(repository), "--port", str(free_port())]
    result = command(*arguments, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    found = {finding["area"]: finding for finding in report["findings"]}
    assert report["problems"] == 0
    assert f"numpy {np.__version__}" in found["python"]["text"]
    assert found["triton"]["text"].startswith("2.")
    assert "CPUExecutionProvider" in found["onnxruntime"]["text"]
    assert set(found) == {
        "python", "triton", "gpu", "onnxruntime", "tensorrt", "tensorrt_rtx", "port", "shm", "models"
    }  # fmt: skip
    text = command(*arguments)
    assert (
        "ok models       tiny points at tiny_onnx_fp32\nok models       tiny_onnx_fp32 can be served here"
        in text.stdout
    )


def test_taken_port_is_a_problem(repository: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        arguments = ["doctor", "--model-repository", str(repository), "--port", str(port)]
        result = command(*arguments)
    assert result.exit_code == 1
    assert f"!! port         {port} is taken" in result.stdout


def test_gpu_that_is_there_is_described(repository: Path) -> None:
    findings = look(repository, L4)
    assert of(findings, "gpu") == [("ok", "NVIDIA L4, compute capability 8.9, 24 GiB, driver 580.1, CUDA up to 13.0")]


def test_engine_that_nobody_needs_is_a_note_and_one_behind_an_alias_a_problem(repository: Path) -> None:
    folder = add_engine(repository, "onnx_fp16")
    config = read_model(folder).config
    config.instance_group[0].kind = pb.ModelInstanceGroup.KIND_GPU
    write_config(repository, config)
    (note,) = [finding for finding in look(repository) if "tiny_onnx_fp16" in finding.text]
    assert (note.state, note.text.partition(";")[0]) == (
        "note",
        f"engine 'tiny_onnx_fp16' asks for KIND_GPU, this onnxruntime has {', '.join(providers())}",
    )
    alias = read_model(repository / "tiny").config
    alias.ensemble_scheduling.step[0].model_name = folder.name
    write_config(repository, alias)
    (problem,) = [finding for finding in look(repository) if "asks for KIND_GPU" in finding.text]
    assert problem.state == "problem"


def providers() -> list[str]:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    return list(onnxruntime.get_available_providers())


def test_plan_is_held_against_the_machine(repository: Path) -> None:
    folder = add_engine(
        repository,
        "trt_fp16",
        manifest={"builder": {"name": "tensorrt", "version": "10.9.0", "compute_capabilities": ["8.9"]}},
    )
    config = read_model(folder).config
    config.backend = "tensorrt"
    write_config(repository, config)
    (finding,) = [finding for finding in look(repository, L4) if "tiny_trt_fp16" in finding.text]
    assert finding.state == "note"
    assert "was built by TensorRT 10.9.0, this machine has TensorRT 10.13.3: build it for this" in finding.text


def test_repository_that_cannot_be_served(repository: Path, tmp_path: Path) -> None:
    shutil.rmtree(repository / "tiny_onnx_fp32")
    ((state, text),) = of(look(repository), "models")
    assert (state, "points at tiny_onnx_fp32, which is not there" in text) == ("problem", True)
    ((state, text),) = of(look(tmp_path / "nowhere"), "models")
    assert (state, "is not a directory" in text) == ("problem", True)


def test_missing_triton_is_a_problem(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MATTESERVE_TRITON_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(binary, "_site_packages_root", lambda: None)
    ((state, text),) = of(look(repository), "triton")
    assert (state, "run `matteserve install-triton`" in text) == ("problem", True)


def test_tritonserver_of_a_container_brings_its_own_backends(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "opt" / "bin" / "tritonserver"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    (tmp_path / "opt" / "TRITON_VERSION").write_text("2.70.0\n")
    monkeypatch.setenv("PATH", str(program.parent))
    findings = look(repository)
    assert of(findings, "triton") == [("ok", f"2.70.0 at {program} (PATH)")]
    assert of(findings, "onnxruntime") == [("ok", "Triton's own backend")]
