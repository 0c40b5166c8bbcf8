"""The second opinion: parsing, agreement, and once the real binary."""

from __future__ import annotations

import base64
import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from matteserve_bench import Load, ServerStatistics, Summary, ToolError, summarise
from matteserve_bench import perf_analyzer as pa
from matteserve_bench.cli import bench
from matteserve_server import EmbeddedServer
from support.bench_runs import failing, steady

LOAD = Load(model="u2netp", concurrency=1, duration_s=30.0)
# As 2.51.0 writes it.
REPORT = """\
Concurrency,Inferences/Second,Client Send,Network+Server Send/Recv,Server Queue,Server Compute Input,\
Server Compute Infer,Server Compute Output,Client Recv,p50 latency,p90 latency,p95 latency,p99 latency
4,223.297,3,16552,0,58,854,249,0,2840,6145,9618,503914
"""


def opinion(**values: Any) -> pa.Opinion:
    known: dict[str, Any] = {
        "settled": True,
        "images_per_s": 10.0,
        "latency_ms": {"p50": 100.0, "p90": 101.0, "p95": 102.0, "p99": 103.0},
        "client_cpu": 0.1,
        "server": ServerStatistics(inferences=20, executions=10),
    }
    return pa.Opinion(**{**known, **values})


def ours(**values: Any) -> list[Summary]:
    return [summarise(steady(load=LOAD, **values))] * 2


def test_its_report_is_read() -> None:
    figures = pa.read_report(REPORT)
    assert (figures["Inferences/Second"], figures["p99 latency"]) == (223.297, 503914.0)
    with pytest.raises(ToolError, match="has no row"):
        pa.read_report(REPORT.splitlines()[0])
    with pytest.raises(ToolError, match="lacks p50 latency, p90 latency"):
        pa.read_report("Inferences/Second\n10\n")


def test_its_input_is_ours(tmp_path: Path) -> None:
    tensor = np.arange(24, dtype=np.uint8).reshape(1, 2, 4, 3)
    pa.write_input(tmp_path / "input.json", [tensor, tensor + 1])
    first, second = json.loads((tmp_path / "input.json").read_text())["data"]
    assert first["image"]["shape"] == [2, 4, 3]
    assert base64.b64decode(first["image"]["b64"]) == tensor.tobytes()
    assert base64.b64decode(second["image"]["b64"]) == (tensor + 1).tobytes()


def test_they_agree() -> None:
    agreement = pa.compare_opinions(ours(), opinion(images_per_s=10.5))
    assert agreement.agrees
    assert agreement.throughput == pytest.approx(10.5 / (299 / 30) - 1)
    text = pa.format_opinions(ours(), opinion(), agreement)
    assert "AGREE within 10%: throughput +5.4%, p50 -0.0% against the mean of ours" in text
    assert [line.split()[0] for line in text.splitlines()[2:5]] == ["matteserve,", "perf_analyzer", "matteserve,"]


@pytest.mark.parametrize(
    ("theirs", "reason"),
    [
        (opinion(images_per_s=20.0), "no reason found"),
        (opinion(images_per_s=20.0, settled=False), "perf_analyzer did not settle"),
        (
            opinion(images_per_s=20.0, server=ServerStatistics(inferences=80, executions=10)),
            "the server batched differently: 8.00 rows for perf_analyzer, 2.00 for us",
        ),
        (opinion(images_per_s=20.0, client_cpu=0.9), "the load generators took 0.10 cores (ours) and 0.90"),
    ],
)
def test_they_disagree_and_it_is_said_why(theirs: pa.Opinion, reason: str) -> None:
    agreement = pa.compare_opinions(ours(), theirs)
    assert not agreement.agrees
    assert agreement.reasons == (reason,)
    text = pa.format_opinions(ours(), theirs, agreement)
    assert "DISAGREE by more than 10%: throughput +100.7%" in text
    assert f"  because: {reason}" in text


def test_our_own_runs_may_be_the_reason() -> None:
    slow = summarise(steady(load=LOAD, interval_s=0.2, latency_s=0.2))
    agreement = pa.compare_opinions([ours()[0], slow], opinion())
    assert agreement.reasons[0].startswith("our own runs before and after it differ by 101%")
    invalid = ours(client_cpu=0.9, server_cpu=None)
    assert any("our run: the client" in r for r in pa.compare_opinions(invalid, opinion(images_per_s=5.0)).reasons)


def test_nothing_was_answered() -> None:
    with pytest.raises(ToolError, match=r"none of our requests was answered .*InferenceError"):
        pa.compare_opinions(ours(change=failing(1, "InferenceError")), opinion())


def test_latency_counts_too() -> None:
    agreement = pa.compare_opinions(ours(), opinion(latency_ms={"p50": 120.0}))
    assert (agreement.agrees, agreement.latency) == (False, pytest.approx(0.2))


def run_result(code: int, error: str = "") -> Any:
    def run(command: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, code, "", error)

    return run


def test_it_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(pa.platform, "machine", lambda: "aarch64")
    with pytest.raises(ToolError, match="for Linux x86_64, this is linux aarch64"):
        pa.obtain()
    monkeypatch.setattr(pa.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(pa.subprocess, "run", run_result(1, "WARNING: slow\nERROR: no such wheel\n"))
    with pytest.raises(ToolError, match=r"could not download tritonclient==2\.51\.0 .*: ERROR: no such wheel"):
        pa.obtain()
    monkeypatch.setattr(pa.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ToolError, match="python -m ensurepip"):
        pa.obtain()


def test_libraries_under_the_names_of_a_repaired_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    libraries = tmp_path / "nvidia_pytriton.libs"
    libraries.mkdir()
    for name in ("libb64-98cb6333.so.0d", "libcudart-09529672.so.12.6.77"):
        (libraries / name).write_bytes(b"")
    binary = tmp_path / "cache" / "perf_analyzer"
    binary.parent.mkdir()
    monkeypatch.setattr(pa, "_starts", lambda binary, found: found is not None)
    found = pa.library_directory(binary, None, libraries)
    assert found == tmp_path / "cache" / "lib"
    assert (found / "libb64.so.0d").resolve() == (libraries / "libb64-98cb6333.so.0d").resolve()
    assert (found / "libcudart.so.12").resolve() == (libraries / "libcudart-09529672.so.12.6.77").resolve()
    monkeypatch.setattr(pa, "_starts", lambda binary, found: True)
    assert pa.library_directory(binary, None) is None
    monkeypatch.setattr(pa, "_starts", lambda binary, found: False)
    with pytest.raises(ToolError, match=r"needs libb64\.so\.0d and libcudart\.so\.12.*--library-path"):
        pa.library_directory(binary, None)


@pytest.mark.triton
@pytest.mark.slow
@pytest.mark.parametrize("transport", ["grpc", "shm"])
def test_the_real_one(bench_server: EmbeddedServer, tmp_path: Path, transport: str) -> None:
    """Downloads 14 MB once. Both ask the same of the server, so they find the same, or it is said why not."""
    try:
        pa.obtain()
    except ToolError as exc:
        pytest.skip(f"perf_analyzer cannot be had: {exc}")
    arguments = ["--address", bench_server.address, "--model", "slow", "--concurrency", "2", "--duration-s", "4"]
    arguments += ["--transport", transport, "--records", str(tmp_path / "records.jsonl"), "--json"]
    result = CliRunner().invoke(bench, ["perf-analyzer", *arguments], catch_exceptions=False)
    report = json.loads(result.stdout)
    assert len(report["matteserve"]) == 2
    assert report["perf_analyzer"]["images_per_s"] > 0
    assert report["perf_analyzer"]["latency_ms"]["p99"] >= report["perf_analyzer"]["latency_ms"]["p50"]
    assert report["perf_analyzer"]["server"]["inferences"] > 0
    agreement = report["agreement"]
    assert agreement["agrees"] or agreement["reasons"]
    # Not the 10 % of a quiet machine: what must hold on one that runs other tests.
    assert -0.6 < agreement["throughput"] < 1.5


@pytest.mark.triton
def test_it_sends_tensors_only(bench_server: EmbeddedServer) -> None:
    arguments = ["--address", bench_server.address, "--model", "tiny", "--what", "images"]
    result = CliRunner().invoke(bench, ["perf-analyzer", *arguments])
    assert result.exit_code == 2
    assert "perf_analyzer sends tensors" in result.output
