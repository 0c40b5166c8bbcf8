"""`matteserve bench` on the real server: what it must not hide, and what it must not lose."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from matteserve_bench import Load, Record, RecordsError, RecordWriter, read_records
from matteserve_bench.cli import bench
from matteserve_bench.compare import compare
from matteserve_client import ServerUnavailableError
from matteserve_server import EmbeddedServer


def invoke(*arguments: str) -> str:
    result = CliRunner().invoke(bench, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def run_json(server: EmbeddedServer, path: Path, *arguments: str, seconds: float = 1.0) -> list[dict[str, Any]]:
    common = ["--address", server.address, "--records", str(path), "--duration-s", str(seconds), "--warmup-s", "0"]
    results: list[dict[str, Any]] = json.loads(invoke("run", *common, "--json", *arguments))["results"]
    return results


@pytest.mark.triton
@pytest.mark.parametrize("transport", ["grpc", "shm"])
def test_run_measures_the_real_server(bench_server: EmbeddedServer, tmp_path: Path, transport: str) -> None:
    before = bench_server.control.statistics("tiny_onnx_fp32").inferences
    path = tmp_path / "records.jsonl"
    arguments = ["--model", "tiny", "--concurrency", "2", "--rate", "40", "--transport", transport, "--rows", "2"]
    closed, opened = run_json(bench_server, path, *arguments, "--max-windows", "3")
    served = bench_server.control.statistics("tiny_onnx_fp32").inferences - before
    runs = read_records(path)
    assert [run.load.pace for run in runs] == ["concurrency 2", "40/s poisson"]
    assert served == 2 * (sum(len(run.records) for run in runs) + 1)  # and the trial before
    assert closed["errors"] == opened["errors"] == {}
    assert closed["images_per_s"] > 0
    assert opened["rate"] == pytest.approx(80, rel=0.6)
    assert sum(int(size) * count for size, count in opened["batches"].items()) <= served
    assert closed["server_cpu"] > 0


@pytest.mark.triton
def test_a_server_that_is_too_slow_is_reported_so(bench_server: EmbeddedServer, tmp_path: Path) -> None:
    """No coordinated omission: asked for five times what it can do, nearly everyone waits, and the report says so."""
    arguments = ["--model", "slow", "--max-windows", "3"]
    (closed,) = run_json(bench_server, tmp_path / "closed.jsonl", *arguments, "--concurrency", "1")
    capacity = 2000 / closed["latency_ms"]["min"]  # it takes two requests at a time
    (opened,) = run_json(bench_server, tmp_path / "open.jsonl", *arguments, "--rate", f"{5 * capacity + 1:.1f}")
    # After a second four of five requests still wait: the median one waits for about two seconds.
    assert opened["latency_ms"]["p50"] > max(10 * closed["latency_ms"]["min"], 500)
    assert opened["images_per_s"] < 0.7 * opened["rate"]
    assert opened["success"] == 1.0  # all of them were answered in the end, and counted
    assert not opened["verdict"]["valid"]


@pytest.mark.triton
def test_a_server_that_fails_is_reported_so(bench_server: EmbeddedServer, tmp_path: Path) -> None:
    """Its queue holds one request: some of those that arrive together are refused."""
    (result,) = run_json(
        bench_server, tmp_path / "r.jsonl", "--model", "full", "--concurrency", "16", "--max-windows", "3"
    )
    assert list(result["errors"]) == ["ServerOverloadedError"]
    assert result["success"] == pytest.approx(1 - result["errors"]["ServerOverloadedError"] / result["requests"])
    assert not result["verdict"]["valid"]
    assert any("of requests failed: ServerOverloadedError" in reason for reason in result["verdict"]["reasons"])
    text = invoke("report", str(tmp_path / "r.jsonl"))
    assert "Errors: ServerOverloadedError" in text
    assert "INVALID" in text


@pytest.mark.triton
def test_pictures_end_to_end(bench_server: EmbeddedServer, tmp_path: Path) -> None:
    from matteserve_bench.payloads import generate_jpeg

    for seed in range(2):
        (tmp_path / f"{seed}.jpg").write_bytes(generate_jpeg(seed, (60, 90)))
    arguments = ["--model", "tiny", "--what", "images", "--images", str(tmp_path), "--concurrency", "2"]
    (result,) = run_json(bench_server, tmp_path / "r.jsonl", *arguments, "--max-windows", "3")
    assert list(result["stages_ms"]) == ["decode", "preprocess", "request", "postprocess", "encode"]
    assert result["errors"] == {}


@pytest.mark.triton
def test_sweep_ab_compare_and_reports(bench_server: EmbeddedServer, tmp_path: Path) -> None:
    common = ["--address", bench_server.address, "--model", "tiny", "--duration-s", "0.3", "--warmup-s", "0"]
    records = str(tmp_path / "sweep.jsonl")
    text = invoke(
        "sweep", *common, "--max-windows", "3", "--max-concurrency", "4", "--slo-ms", "1000", "--records", records
    )  # fmt: skip
    assert "Knee of tiny: concurrency" in text
    assert "Highest rate of tiny with p99 <= 1000 ms:" in text
    assert invoke("report", records, "--csv").count("\n") >= 5
    page = tmp_path / "report.html"
    assert invoke("report", records, "--html", str(page)) == ""
    assert page.read_text().startswith("<!doctype html>")

    a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    side = f"address={bench_server.address},model=tiny,concurrency=2"
    text = invoke(
        "ab", "--a", side, "--b", "transport=shm", "--turns", "2", "--duration-s", "0.3", "--warmup-s", "0",
        "--records-a", str(a), "--records-b", str(b),
    )  # fmt: skip
    assert "Changed: load.transport: grpc -> shm" in text
    assert "concurrency 2 (2 turns, paired)" in text
    assert invoke("compare", str(a), str(b)) == text
    (comparison,) = json.loads(invoke("compare", str(a), str(b), "--json"))
    assert comparison["paired"] is True
    assert compare(read_records(a), read_records(b))[0].changes[0].samples == 2


@pytest.mark.triton
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_run_keeps_its_records(
    bench_server: EmbeddedServer, tmp_path: Path, number: signal.Signals
) -> None:
    path = tmp_path / "records.jsonl"
    command = [
        sys.executable, "-m", "matteserve_client._cli", "bench", "run", "--address", bench_server.address,
        "--model", "tiny", "--concurrency", "2", "--duration-s", "300", "--records", str(path),
    ]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not (path.exists() and '"type":"request"' in path.read_text()):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(number)
        output, progress = process.communicate(timeout=30)
    (run,) = read_records(path)
    assert run.end == "interrupted"
    assert run.records
    if number is signal.SIGKILL:
        assert process.returncode == -number
    else:
        assert process.returncode == 130, progress
        assert "INVALID (interrupted" in output
        assert f"records: {path}" in progress


@pytest.mark.triton
def test_loadgen_can_be_interrupted(bench_server: EmbeddedServer, tmp_path: Path) -> None:
    pytest.importorskip("mlperf_loadgen", reason="mlcommons-loadgen is not installed")
    path = tmp_path / "records.jsonl"
    command = [
        sys.executable, "-m", "matteserve_client._cli", "bench", "run", "--address", bench_server.address,
        "--model", "tiny", "--scenario", "SingleStream", "--duration-s", "300", "--records", str(path),
    ]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not (path.exists() and '"type":"request"' in path.read_text()):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        output, progress = process.communicate(timeout=30)
    assert process.returncode == 130, progress
    assert "INVALID (interrupted" in output
    assert read_records(path)[0].end == "interrupted"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--model", "m", "--rate", "0"], "rate is 0.0, must be above 0"),
        (["run", "--model", "m", "--what", "images", "--transport", "shm"], "whole pictures go one by one"),
        (["run", "--model", "m", "--scenario", "Offline"], "--scenario Offline needs --target-qps"),
        (["run", "--model", "m", "--scenario", "Server", "--target-qps", "1"], "--scenario Server needs --slo-ms"),
        (["run", "--model", "m", "--scenario", "SingleStream", "--duration-s", "0"], "must be above 0"),
        (["sweep", "--model", "m", "--load", "open"], "--load open needs --first-rate"),
        (["report", "r.jsonl", "--csv", "--json"], "--csv and --json exclude each other"),
        (["ab", "--a", "modle=x", "--b", ""], "--a: 'modle=x' is not KEY=VALUE with one of address, model"),
        (["ab", "--a", "model=x,rows=two", "--b", ""], "--a: rows is 'two', must be int"),
        (["ab", "--a", "model=x", "--b", ""], "either concurrency=... or rate=..."),
        (["ab", "--a", "model=x,concurrency=0", "--b", ""], "concurrency is 0"),
        (["perf-analyzer", "--model", "m", "--duration-s", "0"], "duration_s is 0.0"),
    ],
)
def test_usage_errors(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(bench, arguments)
    assert result.exit_code == 2, result.output
    assert message in result.output


def test_files_without_records_are_left_out_of_a_report(tmp_path: Path) -> None:
    empty, good, began = (tmp_path / f"{name}.jsonl" for name in ("empty", "good", "began"))
    RecordWriter(empty, {}).close()
    for path in (good, began):
        with RecordWriter(path, {}) as writer:
            writer.load(Load(model="m", concurrency=1), "now")
            writer.requests([Record(0.0, 0.0, 1.0)] if path == good else [])
    result = CliRunner().invoke(bench, ["report", str(empty), str(good)])
    assert result.exit_code == 0, result.output
    assert "holds no run" in result.stderr
    assert "INVALID (interrupted" in result.stdout
    with pytest.raises(RecordsError, match="holds no run"):
        CliRunner().invoke(bench, ["report", str(empty)], catch_exceptions=False)
    with pytest.raises(RecordsError, match="nothing to report: no request was recorded"):
        CliRunner().invoke(bench, ["report", str(began)], catch_exceptions=False)


def test_no_server() -> None:
    with pytest.raises(ServerUnavailableError, match="is `matteserve serve` running there"):
        CliRunner().invoke(
            bench, ["run", "--address", "127.0.0.1:1", "--model", "tiny"], catch_exceptions=False
        )  # fmt: skip


@pytest.mark.triton
def test_records_go_to_out_bench_by_default(
    bench_server: EmbeddedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    invoke(
        "run", "--address", bench_server.address, "--model", "tiny", "--concurrency", "1", "--duration-s", "0.3",
        "--warmup-s", "0", "--max-windows", "3",
    )  # fmt: skip
    (path,) = (tmp_path / "out" / "bench").iterdir()
    assert path.name.startswith("tiny-")
    assert path.suffix == ".jsonl"
    assert os.path.getsize(path) > 1000
