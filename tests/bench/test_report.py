"""Reports of known runs, word for word where people read them."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
from xml.etree import ElementTree

import pytest

from matteserve_bench import Load, Run, summarise
from matteserve_bench.html import to_html
from matteserve_bench.records import GpuUse
from matteserve_bench.report import format_text, to_csv, to_json
from matteserve_bench.svg import Series, grouped_bars, line_plot, stacked_bars
from support.bench_runs import HEADER, failing, steady

LOAD = Load(model="u2netp", concurrency=1, duration_s=30.0)

# What a reader sees of one run; spaces at the ends of lines and before values do not count.
TEXT = """\
Load            u2netp, concurrency 1, tensors over grpc
Images        [total, rate, throughput, per GPU]   300, 10.00/s, 9.97/s, -
Latency ms    [min, mean, 50, 90, 95, 99, max]     100.00, 100.00, 100.00, 100.00, 100.00, 100.00, 100.00
Server ms     [queue, compute in, infer, out]      20.00, 1.00, 70.00, 2.00   mean batch 2.00
Batches       [size: executions]                   2: 150
CPU           [client, server]                     0.10 cores, 0.80 cores, 100 MiB
Success       [ratio]                              100.00%   Errors: none
Result          VALID (3 windows within 10%, the worst 0.7% off; client 10% of a core)
Environment   AMD EPYC, 2 cores, kernel 6.1; client and server on one machine; Triton 2.51.0; ONNX Runtime 1.32.0; \
u2netp -> u2netp_onnx_fp32; u2netp onnx fp32, 320x320; batch <= 8, batcher delay 2000 us; instances 1 CPU; \
matteserve 0.1.0 (0123456789ab); Python 3.11.7; 2026-11-24 05:00:00 UTC"""


def several() -> list[Run]:
    fp16 = {**HEADER, "model": {**HEADER["model"], "precision": "fp16", "name": "u2netp_onnx_fp16"}}
    return [
        steady(load=LOAD),
        steady(interval_s=0.05, load=dataclasses.replace(LOAD, concurrency=2)),
        steady(interval_s=0.05, latency_s=0.2, load=dataclasses.replace(LOAD, concurrency=4)),
        dataclasses.replace(
            steady(load=dataclasses.replace(LOAD, model="u2netp_onnx_fp16"), change=failing(10, "InferenceError")),
            header=fp16,
        ),
        steady(load=Load(mode="open", model="u2netp", rate=10.0, duration_s=30.0)),
    ]


def test_text_of_one_run() -> None:
    run = steady(load=LOAD)
    text = format_text([run], [summarise(run)])
    assert [line.split() for line in text.splitlines()] == [line.split() for line in TEXT.splitlines()]


def test_text_says_what_else_there_is() -> None:
    run = steady(
        load=dataclasses.replace(LOAD, what="images", rows=1, label="warm"),
        gpu=GpuUse(1, 0.5, 2**30, 300.0, 3000.0),
        change=lambda n, r: r._replace(stages={"decode": 0.01, "request": 0.05}),
    )
    text = format_text([run], [summarise(run, price_per_hour=3.6, peak_tops=10.0)])
    assert "GPU           [utilisation, memory, power]         50%, 1024 MiB, 300 W" in text
    assert "Picture ms    [decode, request]                    10.00, 50.00" in text
    assert "0.0332 images/J, 3.9% of the roofline (19.76 GMAC an image, peak 10 TOPS: --peak-tops)" in text
    assert "0.1 per 1,000 images at the given price" in text
    assert "images over grpc, warm" in text


def test_loadgen_is_quoted() -> None:
    load = Load(mode="loadgen", model="u2netp", scenario="Server")
    extra = {"loadgen": {"Result is": "VALID", "Completed samples per second": "90.08"}, "invalid_reasons": []}
    run = dataclasses.replace(steady(windows=1, load=load), extra=extra)
    text = format_text([run], [summarise(run)])
    assert "LoadGen       [its own words]" in text
    assert "  Completed samples per second: 90.08" in text


def test_a_table_of_several_runs() -> None:
    runs = several()
    text = format_text(runs, [summarise(run) for run in runs])
    rows = [line for line in text.splitlines() if re.match(r" +\d u2netp", line)]
    assert [row.split()[1:4] for row in rows] == [
        ["u2netp", "concurrency", "1"],
        ["u2netp", "concurrency", "2"],
        ["u2netp", "concurrency", "4"],
        ["u2netp_onnx_fp16", "concurrency", "1"],
        ["u2netp", "10/s", "poisson"],
    ]
    assert [row.split()[-1] for row in rows] == ["VALID", "VALID", "VALID", "INVALID", "VALID"]
    assert "  4 INVALID: 10.0% of requests failed: InferenceError 30" in text
    assert "  4 errors: InferenceError 30" in text
    assert text.count("Environment ") == 2


def test_json_has_everything_and_no_nan() -> None:
    runs = [*several(), steady(change=failing(1, "InferenceError"))]
    report = json.loads(json.dumps(to_json(runs, [summarise(run) for run in runs]), allow_nan=False))
    assert len(report["environments"]) == 2
    assert [result["environment"] for result in report["results"]] == [0, 0, 0, 1, 0, 0]
    first = report["results"][0]
    assert (first["concurrency"], first["requests"], first["verdict"]["valid"]) == (1, 300, True)
    assert first["latency_ms"]["p99"] == pytest.approx(100.0)
    assert first["batches"] == {"2": 150}
    assert report["results"][5]["latency_ms"] == {}


def test_csv_has_a_line_for_each_run() -> None:
    runs = several()
    rows = list(csv.DictReader(to_csv(runs, [summarise(run) for run in runs]).splitlines()))
    assert [row["pace"] for row in rows] == [run.load.pace for run in runs]
    assert [row["precision"] for row in rows] == ["fp32", "fp32", "fp32", "fp16", "fp32"]
    assert float(rows[0]["latency_p99_ms"]) == pytest.approx(100.0)
    assert rows[3]["valid"] == "False"
    assert rows[3]["reasons"] == "10.0% of requests failed: InferenceError 30"


def test_the_page_stands_alone() -> None:
    runs = several()
    page = to_html(runs, [summarise(run) for run in runs], slo_ms=150.0)
    assert not re.search(r"<script|<link|<img|@import|url\(", page)
    assert set(re.findall(r'https?://[^"\s<]+', page)) <= {"http://www.w3.org/2000/svg"}
    plots = [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]
    assert [plot.get("aria-label") for plot in plots] == [
        "p99 latency, ms over images per second",
        "share of requests over latency, ms",
        "milliseconds per request",
        "share of executions by batch size",
    ]
    assert "Knee of u2netp: concurrency 2" in page
    assert "u2netp_onnx_fp16 (onnx fp16)" in page
    assert "10.0% of requests failed" in page
    assert "bound 150 ms" in page
    assert "u2netp -&gt; u2netp_onnx_fp32" in page


def test_the_page_of_a_run_without_answers() -> None:
    run = steady(change=failing(1, "InferenceError"), server=None)
    page = to_html([run], [summarise(run)])
    assert "<svg" not in page
    assert "100.0% of requests failed" in page


def test_names_cannot_break_the_page() -> None:
    run = steady(load=dataclasses.replace(LOAD, label="<script>alert(1)</script>"))
    page = to_html([run], [summarise(run)])
    assert "<script" not in page
    assert "&lt;script&gt;" in page


def circles(svg: str) -> list[tuple[float, float]]:
    root = ElementTree.fromstring(svg)
    return [(float(c.get("cx") or 0), float(c.get("cy") or 0)) for c in root.iter("{http://www.w3.org/2000/svg}circle")]


def test_points_are_where_they_belong() -> None:
    """Axes from 0 to 100 and from 1 to 100, logarithmic: each point has its place by hand."""
    svg = line_plot(
        [Series("a", [(0.0, 1.0), (50.0, 10.0), (100.0, 100.0), (10.0, 0.0)])], x_title="x", y_title="y", log_y=True
    )
    left, right, top, bottom = 62, 640 - 26, 16, 340 - 46
    assert circles(svg) == [(left, bottom), ((left + right) / 2, (top + bottom) / 2), (right, top)]


def test_plots_of_nothing_are_left_out() -> None:
    assert line_plot([], x_title="x", y_title="y") == ""
    assert line_plot([Series("a", [(0.0, float("nan"))])], x_title="x", y_title="y") == ""
    assert stacked_bars(["a"], [("p", [0.0])], title="t") == ""
    assert grouped_bars([], [], x_title="x", y_title="y") == ""
