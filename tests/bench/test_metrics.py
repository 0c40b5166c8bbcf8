"""Figures from synthetic records, with exact expectations."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from matteserve_bench import ClosedLoop, Record, Summary, summarise
from matteserve_bench.cli import bench, format_table
from matteserve_bench.metrics import percentile
from matteserve_server import EmbeddedServer


def test_summary_of_known_records() -> None:
    records = [Record(0.0, 1.0), Record(0.5, 1.0), Record(1.0, 4.0), Record(1.0, 5.0, "InferenceError")]
    assert summarise(records) == Summary(
        requests=4,
        errors={"InferenceError": 1},
        seconds=5.0,
        images_per_s=3 / 5,
        latency_ms={"mean": 1500.0, "p50": 1000.0, "p90": 3000.0, "p95": 3000.0, "p99": 3000.0, "max": 3000.0},
    )


def test_only_failures_have_no_latency_and_no_throughput() -> None:
    summary = summarise([Record(0.0, 2.0, "ServerUnavailableError")])
    assert (summary.images_per_s, summary.latency_ms) == (0.0, {})
    assert "ServerUnavailableError 1" in format_table([(1, summary)], {})


@pytest.mark.parametrize(("percent", "expected"), [(50, 50), (90, 90), (99, 99), (99.5, 100), (0, 1), (100, 100)])
def test_percentile_is_a_value_that_occurred(percent: float, expected: float) -> None:
    assert percentile(list(range(1, 101)), percent) == expected


def test_nothing_measured() -> None:
    with pytest.raises(ValueError, match="no records"):
        summarise([])


def test_impossible_loads() -> None:
    with pytest.raises(ValueError, match="concurrency is 0"):
        ClosedLoop(concurrency=0)
    with pytest.raises(ValueError, match="duration_s is 0"):
        ClosedLoop(duration_s=0)


@pytest.mark.triton
def test_run_measures_the_real_server(demo_server: EmbeddedServer) -> None:
    arguments = ["--address", demo_server.address, "--model", "demo", "--concurrency", "2"]
    arguments += ["--duration-s", "2", "--warmup-s", "0.5", "--json"]
    before = demo_server.control.statistics("demo_onnx_fp32").inferences
    result = CliRunner().invoke(bench, ["run", *arguments], catch_exceptions=False)
    served = demo_server.control.statistics("demo_onnx_fp32").inferences - before
    (row,) = json.loads(result.stdout)["results"]
    assert row["errors"] == {}
    assert 1 <= row["requests"] <= served
    assert row["images_per_s"] == pytest.approx(row["requests"] / row["seconds"])
