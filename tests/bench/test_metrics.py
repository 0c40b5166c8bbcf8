"""Figures from synthetic records, with exact expectations."""

from __future__ import annotations

import dataclasses

import pytest

from matteserve_bench import Load, Record, Run, Window, summarise
from matteserve_bench.figures import due_in_period, percentile, period_of, window_figures
from matteserve_bench.hardware import gmac_per_image, peak_tops_of, roofline_of
from matteserve_bench.records import GpuUse
from support.bench_runs import HEADER, failing, steady


@pytest.mark.parametrize(("percent", "expected"), [(50, 50), (90, 90), (99, 99), (99.5, 100), (0, 1), (100, 100)])
def test_percentile_is_a_value_that_occurred(percent: float, expected: float) -> None:
    assert percentile(list(range(1, 101)), percent) == expected


def test_summary_of_a_steady_run() -> None:
    summary = summarise(steady())
    assert (summary.requests, summary.images, summary.seconds) == (300, 300, 30.0)
    assert (summary.rate, summary.success, summary.errors) == (10.0, 1.0, {})
    assert summary.images_per_s == pytest.approx(299 / 30)  # the last answer comes when the period is over
    assert summary.latency_ms == pytest.approx(dict.fromkeys(("min", "mean", "p50", "p90", "p95", "p99", "max"), 100.0))
    assert summary.server_ms == pytest.approx(
        {"queue": 20.0, "compute_input": 1.0, "compute_infer": 70.0, "compute_output": 2.0}
    )
    assert (summary.mean_batch, summary.batches) == (2.0, {2: 150})
    assert (summary.client_cpu, summary.server_cpu, summary.server_rss_mib) == pytest.approx((0.1, 0.8, 100.0))
    assert summary.verdict.valid
    assert summary.images_per_s_per_gpu is summary.roofline is summary.cost_per_1000_images is None


def test_percentiles_of_a_run_with_a_tail() -> None:
    """Every hundredth request takes 2 s instead of 0.1 s: it is beyond p99 and not beyond the maximum."""
    run = steady(change=lambda n, r: r._replace(done_s=r.due_s + 2.0) if n % 100 == 0 else r)
    latency = summarise(run).latency_ms
    assert (latency["p50"], latency["p99"], latency["max"]) == pytest.approx((100.0, 100.0, 2000.0))
    assert latency["mean"] == pytest.approx(119.0)


def test_failures_are_neither_throughput_nor_latency() -> None:
    summary = summarise(steady(change=failing(10, "ServerOverloadedError")))
    assert summary.errors == {"ServerOverloadedError": 30}
    assert summary.success == pytest.approx(0.9)
    assert summary.rate == 10.0
    assert summary.images_per_s == pytest.approx(269 / 30)
    assert summary.verdict.reasons == ("10.0% of requests failed: ServerOverloadedError 30",)


def test_only_failures() -> None:
    summary = summarise(steady(change=failing(1, "ServerUnavailableError")))
    assert (summary.images_per_s, summary.latency_ms, summary.success) == (0.0, {}, 0.0)


def test_the_last_three_windows_count_and_the_drain_too() -> None:
    run = steady(windows=5, change=lambda n, r: r._replace(done_s=r.due_s + 60.0) if n == 499 else r)
    assert period_of(run) == (20.0, 50.0)
    assert {record.due_s >= 20.0 for record in due_in_period(run)} == {True}
    summary = summarise(run)
    assert summary.requests == 300
    assert summary.latency_ms["max"] == pytest.approx(60_000.0)  # answered long after the period, counted all the same


def test_rows_are_images() -> None:
    run = steady(change=lambda n, r: r._replace(rows=4))
    assert summarise(run).images == 1200
    assert summarise(run).images_per_s == pytest.approx(4 * 299 / 30)


def test_figures_of_a_window() -> None:
    records = [Record(0.0, 0.0, 1.0), Record(0.0, 0.0, 2.0, rows=3), Record(0.0, 0.0, 3.0, "Error"), Record(0, 0, 4.0)]
    figures = window_figures(records, Window(1.0, 4.0))
    assert (figures.answered, figures.images_per_s, figures.latency_ms) == (2, 4 / 3, 1000.0)


def test_without_windows_everything_counts() -> None:
    records = (Record(0.0, 0.0, 1.0), Record(1.0, 1.0, 5.0))
    summary = summarise(Run({}, Load(mode="loadgen", scenario="Offline"), records, ()))
    assert (summary.requests, summary.seconds, summary.images_per_s) == (2, 5.0, 0.4)


def test_nothing_measured() -> None:
    with pytest.raises(ValueError, match="no records"):
        summarise(Run({}, Load(concurrency=1), (), ()))


def test_stages_of_pictures() -> None:
    run = steady(change=lambda n, r: r._replace(stages={"decode": 0.01, "encode": 0.01 * (n % 2)}))
    assert summarise(run).stages_ms == pytest.approx({"decode": 10.0, "encode": 5.0})


def test_gpu_energy_price_and_roofline() -> None:
    header = {**HEADER, "server": {**HEADER["server"], "gpus": [{"name": "NVIDIA H100 80GB HBM3"}]}}
    header["model"] = {**HEADER["model"], "precision": "fp16"}
    run = steady(gpu=GpuUse(2, 0.5, 4 * 2**30, 300.0, 1500.0))
    summary = summarise(dataclasses.replace(run, header=header), price_per_hour=3.6)
    images_per_s = 299 / 30
    assert summary.images_per_s_per_gpu == pytest.approx(images_per_s / 2)
    assert (summary.gpu_utilisation, summary.gpu_memory_mib, summary.power_w) == (0.5, 4096.0, 300.0)
    assert summary.images_per_joule == pytest.approx(299 / 4500)
    assert summary.cost_per_1000_images == pytest.approx(1.0 / images_per_s)
    assert summary.roofline is not None
    assert summary.roofline.share == pytest.approx(images_per_s / 2 * 19.76e9 * 2 / 989e12)
    assert summary.roofline.source.startswith("NVIDIA H100 SXM")


def test_work_of_an_image() -> None:
    model = HEADER["model"]
    assert gmac_per_image(model) == 19.76
    assert gmac_per_image({**model, "height": 160}) == pytest.approx(9.88)
    assert gmac_per_image({**model, "manifest": {"giga_macs": 7.0}}) == 7.0
    assert gmac_per_image({**model, "architecture": "other"}) is None


@pytest.mark.parametrize(
    ("device", "precision", "peak"),
    [
        ("NVIDIA H200", "bf16", 989.0),
        ("NVIDIA H100 PCIe", "fp16", 756.0),
        ("NVIDIA H100 80GB HBM3", "fp32", 67.0),
        ("NVIDIA A100-SXM4-40GB", "int8", 624.0),
        ("NVIDIA L4", "fp16", 121.0),
        ("NVIDIA L40S", "fp16", 362.0),
        ("Tesla T4", "fp16", 65.0),
    ],
)
def test_known_cards(device: str, precision: str, peak: float) -> None:
    found = peak_tops_of(device, precision)
    assert found is not None
    assert found[0] == peak


def test_unknown_peaks_give_no_roofline() -> None:
    assert peak_tops_of("Some GPU", "fp16") is peak_tops_of("NVIDIA H100", "fp8") is None
    assert roofline_of(HEADER, 10.0) is None
    given = roofline_of(HEADER, 10.0, peak_tops=1.0)
    assert given is not None
    assert given.share == pytest.approx(10 * 19.76e9 * 2 / 1e12)


def test_work_without_a_manifest_is_what_the_exporter_writes_into_manifests() -> None:
    from matteserve_bench.hardware import _WORK
    from matteserve_export.sizing import giga_macs

    assert {name: giga_macs(name, *size) for name, (_, size) in _WORK.items()} == {
        name: work for name, (work, _) in _WORK.items()
    }
