"""MLPerf's own LoadGen, end to end on the real server."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from matteserve_bench import Session, Setup, ToolError, read_records, summarise
from matteserve_bench.loadgen import SCENARIOS, LoadGenSettings, Scenario, invalid_of, read_summary, run_loadgen
from matteserve_bench.records import RecordWriter
from matteserve_server import EmbeddedServer

# Shortened from what LoadGen 6.0.17 wrote.
SUMMARY = """\
================================================
MLPerf Results Summary
================================================
SUT name : PySUT
Scenario : Server
Mode     : PerformanceOnly
Completed samples per second    : 90.08
Result is : INVALID
  Performance constraints satisfied : NO
  Min duration satisfied : Yes
  Early stopping satisfied: NO
Recommendations:
 * Reduce target QPS to improve latency.
 * Processed 93 queries,

================================================
Additional Stats
================================================
Min latency (ns)                : 1285343

================================================
Test Parameters Used
================================================
samples_per_query : 1
"""


def test_summary_is_read(tmp_path: Path) -> None:
    path = tmp_path / "mlperf_log_summary.txt"
    path.write_text(SUMMARY)
    summary = read_summary(path)
    assert summary == {
        "SUT name": "PySUT",
        "Scenario": "Server",
        "Mode": "PerformanceOnly",
        "Completed samples per second": "90.08",
        "Result is": "INVALID",
        "Performance constraints satisfied": "NO",
        "Min duration satisfied": "Yes",
        "Early stopping satisfied": "NO",
        "Min latency (ns)": "1285343",
        "Recommendations": "Reduce target QPS to improve latency; Processed 93 queries",
    }
    assert invalid_of(summary) == [
        "LoadGen calls it INVALID: Performance constraints satisfied: no; Early stopping satisfied: no; "
        "Reduce target QPS to improve latency; Processed 93 queries"
    ]
    assert invalid_of({**summary, "Result is": "VALID"}) == invalid_of({}) == []


def test_a_summary_without_a_result(tmp_path: Path) -> None:
    path = tmp_path / "mlperf_log_summary.txt"
    with pytest.raises(ToolError, match="left no summary"):
        read_summary(path)
    path.write_text("ERROR\n")
    with pytest.raises(ToolError, match="has no result"):
        read_summary(path)


def test_impossible_settings() -> None:
    with pytest.raises(ValueError, match="scenario is 'Burst', must be one of SingleStream, MultiStream"):
        LoadGenSettings("Burst")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="server_target_qps is 0, must be above 0"):
        LoadGenSettings("Server", server_target_qps=0)
    with pytest.raises(ValueError, match="multi_stream_samples_per_query is 0"):
        LoadGenSettings("MultiStream", multi_stream_samples_per_query=0)


@pytest.mark.triton
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_every_scenario_end_to_end(bench_server: EmbeddedServer, tmp_path: Path, scenario: Scenario) -> None:
    pytest.importorskip("mlperf_loadgen", reason="mlcommons-loadgen is not installed")
    settings = LoadGenSettings(
        scenario,
        min_duration_ms=1000,
        server_target_qps=50,
        server_target_latency_ms=5000,
        multi_stream_samples_per_query=4,
        offline_expected_qps=100,
    )
    with (
        Session(Setup(bench_server.address, "tiny")) as session,
        RecordWriter(tmp_path / "records.jsonl", session.header()) as writer,
    ):
        before = session.server.statistics("tiny_onnx_fp32").inferences
        run = run_loadgen(session, settings, writer)
        served = session.server.statistics("tiny_onnx_fp32").inferences - before
    assert read_records(writer.path)[0].records
    assert len(run.records) == served - 1  # all but the trial before
    assert {record.error for record in run.records} == {""}
    told = run.extra["loadgen"]
    assert told["Scenario"] == scenario
    assert told["Result is"] in ("VALID", "INVALID")
    assert (told["Result is"] == "VALID") == (not run.extra["invalid_reasons"])
    summary = summarise(run)
    assert summary.latency_ms["p50"] > 0
    if scenario == "Offline":
        assert len(run.records) == 110  # 1 s of the guess, and a tenth more
        assert summary.images_per_s == pytest.approx(float(told["Samples per second"]), rel=0.25)
    if scenario == "SingleStream":
        concurrent = sum(a.done_s > b.sent_s for a, b in zip(run.records, run.records[1:], strict=False))
        assert concurrent == 0
    if scenario == "MultiStream":
        assert len(run.records) % 4 == 0
        assert told["99.0th percentile latency (ns)"]


def test_without_loadgen(monkeypatch: pytest.MonkeyPatch) -> None:
    from matteserve_bench.loadgen import _import_loadgen

    monkeypatch.setitem(sys.modules, "mlperf_loadgen", None)
    with pytest.raises(ToolError, match=r"pip install 'matteserve\[bench\]'"):
        _import_loadgen()
