"""`matteserve bench`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import click

from matteserve_bench._errors import RecordsError
from matteserve_bench.cli_compare import ab, compare_command, perf_analyzer_command
from matteserve_bench.cli_options import (
    INTERRUPTED,
    LOAD_OPTIONS,
    RECORD_OPTIONS,
    REPORT_OPTIONS,
    TARGET_OPTIONS,
    load_values,
    measuring,
    options,
    report_of,
    setup_of,
)
from matteserve_bench.loadgen import SCENARIOS, LoadGenSettings, Scenario, run_loadgen
from matteserve_bench.records import Arrivals, Run, read_records
from matteserve_bench.report import to_csv
from matteserve_bench.sweep import ConcurrencySearch, RateSearch, sweep


@click.group()
def bench() -> None:
    """Measure a running server: records first, reports from records.

    \b
    Examples:
      matteserve bench run --model demo --concurrency 1 --concurrency 8
      matteserve bench sweep --model demo --slo-ms 500
      matteserve bench report out/bench/*.jsonl --html report.html
    """


bench.add_command(ab)
bench.add_command(compare_command)
bench.add_command(perf_analyzer_command)

_ARRIVALS = click.option(
    "--arrivals", type=click.Choice(["poisson", "constant"]), default="poisson", show_default=True,
    help="Intervals of open load.",
)  # fmt: skip


@bench.command()
@options(TARGET_OPTIONS)
@click.option(
    "--concurrency", "concurrencies", multiple=True, type=click.IntRange(min=1),
    help="Closed load: requests on their way. May be repeated.",
)  # fmt: skip
@click.option("--rate", "rates", multiple=True, type=float, help="Open load: requests per second. May be repeated.")
@_ARRIVALS
@click.option(
    "--scenario", "scenarios", multiple=True, type=click.Choice(SCENARIOS),
    help="MLPerf's scenario, by its LoadGen. May be repeated.",
)  # fmt: skip
@click.option("--target-qps", type=float, help="Server: queries per second. Offline: a guess of the throughput.")
@click.option("--slo-ms", type=float, help="Server: bound of p99.")
@click.option("--samples-per-query", default=8, show_default=True, help="MultiStream: images in a query.")
@click.option("--min-query-count", default=0, help="Of a scenario.  [default: left to LoadGen's early stopping]")
@options(LOAD_OPTIONS, RECORD_OPTIONS, REPORT_OPTIONS)
def run(
    concurrencies: tuple[int, ...],
    rates: tuple[float, ...],
    arrivals: Arrivals,
    scenarios: tuple[Scenario, ...],
    target_qps: float | None,
    slo_ms: float | None,
    samples_per_query: int,
    min_query_count: int,
    workers: int,
    records_path: Path | None,
    **values: Any,
) -> None:
    """Load on one model: images per second, latency, where the time goes, VALID or INVALID.

    Closed load (--concurrency) keeps requests on their way and says what the server can do. Open load (--rate) sends
    at a pace of its own; latency counts from the moment a request was due. --scenario leaves the pace to MLPerf's
    LoadGen for --duration-s or longer. Without any of them: concurrency 1, 4 and 8.

    \b
    Examples:
      matteserve bench run --model demo --concurrency 1 --concurrency 8
      matteserve bench run --model demo --rate 5 --duration-s 60
      matteserve bench run --model demo --concurrency 4 --what images --images photos/
      matteserve bench run --model demo --concurrency 16 --transport shm --records shm.jsonl
      matteserve bench run --model demo --scenario Server --target-qps 5 --slo-ms 500 --duration-s 60
    """
    setup, report, common = setup_of(values), report_of(values), load_values(values)
    for scenario in scenarios:
        if scenario in ("Server", "Offline") and target_qps is None:
            raise click.UsageError(f"--scenario {scenario} needs --target-qps")
        if scenario == "Server" and slo_ms is None:
            raise click.UsageError("--scenario Server needs --slo-ms, the bound of its latency")
    try:
        loads = [setup.load(mode="closed", concurrency=concurrency, **common) for concurrency in concurrencies]
        loads += [setup.load(mode="open", rate=rate, arrivals=arrivals, **common) for rate in rates]
        settings = [
            LoadGenSettings(
                scenario,
                min_duration_ms=round(1000 * common["duration_s"]),
                min_query_count=min_query_count,
                server_target_qps=target_qps or 1.0,
                server_target_latency_ms=slo_ms or 1000.0,
                multi_stream_samples_per_query=samples_per_query,
                offline_expected_qps=target_qps or 1.0,
            )
            for scenario in scenarios
        ]
        if not loads and not settings:
            loads = [setup.load(mode="closed", concurrency=concurrency, **common) for concurrency in (1, 4, 8)]
    except ValueError as exc:
        raise click.UsageError(str(exc)) from exc
    runs = []
    with measuring(setup, records_path) as (session, writer):
        for load in loads:
            if not session.stop.is_set():
                runs.append(session.measure(load, writer, workers=workers))
        for setting in settings:
            if not session.stop.is_set():
                runs.append(run_loadgen(session, setting, writer))
        interrupted = session.stop.is_set()
    report.show(runs, slo_ms=slo_ms)
    if interrupted and settings:
        sys.stdout.flush()
        os._exit(INTERRUPTED)  # LoadGen has no way to be stopped: its thread would wait for its last answer
    if interrupted:
        raise SystemExit(INTERRUPTED)


@bench.command("sweep")
@options(TARGET_OPTIONS)
@click.option("--slo-ms", type=float, help="Bound of p99 in milliseconds, for the highest rate.")
@click.option("--max-concurrency", default=64, show_default=True, type=click.IntRange(min=1))
@click.option(
    "--load", "kind", type=click.Choice(["both", "closed", "open"]), default="both", show_default=True,
    help="Closed load over concurrency, open load over rate, or one after the other.",
)  # fmt: skip
@_ARRIVALS
@click.option("--first-rate", type=float, help="Rate to begin with.  [default: half of the closed load's throughput]")
@options(LOAD_OPTIONS, RECORD_OPTIONS, REPORT_OPTIONS)
def sweep_command(
    slo_ms: float | None,
    max_concurrency: int,
    kind: str,
    arrivals: Arrivals,
    first_rate: float | None,
    workers: int,
    records_path: Path | None,
    **values: Any,
) -> None:
    """Raise the load until the server is saturated: the knee, and the highest rate that keeps p99 within --slo-ms.

    \b
    Example:
      matteserve bench sweep --model demo --slo-ms 500
    """
    setup, report, common = setup_of(values), report_of(values), load_values(values)
    if kind == "open" and first_rate is None:
        raise click.UsageError("--load open needs --first-rate: there is no closed load to take it from")
    try:
        template = setup.load(mode="closed", concurrency=1, arrivals=arrivals, **common)
        concurrencies = None if kind == "open" else ConcurrencySearch(last=max_concurrency)
    except ValueError as exc:
        raise click.UsageError(str(exc)) from exc
    with measuring(setup, records_path) as (session, writer):
        runs = sweep(
            session,
            writer,
            concurrencies=concurrencies,
            rates=None if kind == "closed" else lambda best: RateSearch(first_rate or best / 2, slo_ms=slo_ms),
            template=template,
            workers=workers,
        )
        interrupted = session.stop.is_set()
    report.show(runs, slo_ms=slo_ms)
    if interrupted:
        raise SystemExit(INTERRUPTED)


@bench.command("report")
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path, dir_okay=False), metavar="RECORDS...")
@options(REPORT_OPTIONS)
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV.")
@click.option("--html", "html_path", type=click.Path(path_type=Path, dir_okay=False), help="Write a page with plots.")
@click.option("--slo-ms", type=float, help="Bound of p99 in milliseconds, for the highest rate.")
def report_command(
    paths: tuple[Path, ...], as_csv: bool, html_path: Path | None, slo_ms: float | None, **values: Any
) -> None:
    """Report on records: text, JSON, CSV, or a self-contained HTML page with plots.

    \b
    Examples:
      matteserve bench report out/bench/demo.jsonl
      matteserve bench report fp32.jsonl fp16.jsonl --html report.html --price-per-hour 2.5
    """
    report = report_of(values)
    if as_csv and report.as_json:
        raise click.UsageError("--csv and --json exclude each other")
    runs: list[Run] = []
    for path in paths:
        try:
            runs += [run for run in read_records(path) if run.records]
        except RecordsError as exc:
            if len(paths) == 1:
                raise
            click.echo(f"left out: {exc}", err=True)
    if not runs:
        raise RecordsError(f"nothing to report: no request was recorded in {', '.join(map(str, paths))}")
    if html_path is not None:
        from matteserve_bench.html import to_html

        html_path.write_text(to_html(runs, report.summaries(runs), slo_ms=slo_ms))
        click.echo(f"wrote {html_path}", err=True)
    if as_csv:
        click.echo(to_csv(runs, report.summaries(runs)), nl=False)
    elif html_path is None or report.as_json:
        report.show(runs, slo_ms=slo_ms)
