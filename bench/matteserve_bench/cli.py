"""`matteserve bench`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click

from matteserve_bench._errors import TargetError
from matteserve_bench.metrics import Summary, summarise
from matteserve_bench.records import WINDOWS, Arrivals, RecordWriter, Run, read_records
from matteserve_bench.report import format_text, to_csv, to_json
from matteserve_bench.session import Session, Setup, default_records_path, stop_on_signals
from matteserve_bench.sweep import ConcurrencySearch, RateSearch, format_findings, sweep

INTERRUPTED = 130
F = TypeVar("F", bound=Callable[..., Any])


@click.group()
def bench() -> None:
    r"""Measure a running server: records first, reports from records.

    \b
    Examples:
      matteserve bench run --model demo --concurrency 1 --concurrency 8
      matteserve bench sweep --model demo --slo-ms 500
      matteserve bench report out/bench/*.jsonl --html report.html
    """


_TARGET_OPTIONS = [
    click.option("--address", default="127.0.0.1:8001", show_default=True, help="The server's gRPC address."),
    click.option("--model", required=True, help="Model to call, an alias or an engine."),
    click.option(
        "--what",
        type=click.Choice(["tensors", "images"]),
        default="tensors",
        show_default=True,
        help="tensors: the server alone. images: JPEG bytes in, PNG bytes out, through the real client.",
    ),
    click.option(
        "--transport",
        type=click.Choice(["grpc", "shm"]),
        default="grpc",
        show_default=True,
        help="Tensors inside the request, or in system shared memory (server on this machine).",
    ),
    click.option("--rows", default=1, show_default=True, type=click.IntRange(min=1), help="Images in a request."),
    click.option("--channels", default=2, show_default=True, type=click.IntRange(min=1), help="gRPC connections."),
    click.option(
        "--images",
        type=click.Path(path_type=Path, exists=True, file_okay=False),
        help="Folder with pictures to send.  [default: generated ones]",
    ),
    click.option("--metrics-url", help="The server's metrics.  [default: http://HOST:8002/metrics]"),
    click.option("--timeout-s", default=60.0, show_default=True, help="Limit of each request."),
]
_LOAD_OPTIONS = [
    click.option("--duration-s", default=10.0, show_default=True, help="Seconds measured: three windows of a third."),
    click.option("--warmup-s", default=2.0, show_default=True, help="Seconds before, not counted."),
    click.option(
        "--max-windows",
        default=10,
        show_default=True,
        type=click.IntRange(min=WINDOWS),
        help="Windows after which a run ends although the last three do not agree.",
    ),
    click.option(
        "--stability-percentage",
        default=10.0,
        show_default=True,
        help="How far one of three windows may be off their mean.",
    ),
    click.option(
        "--workers", default=32, show_default=True, help="Threads for pictures in open load, with --what images."
    ),
]
_RECORD_OPTIONS = [
    click.option(
        "--records",
        "records_path",
        type=click.Path(path_type=Path, dir_okay=False),
        help="File to append records to.  [default: a new one in out/bench]",
    ),
]
_REPORT_OPTIONS = [
    click.option("--price-per-hour", type=float, help="What the server costs, for the cost of 1,000 images."),
    click.option("--peak-tops", type=float, help="The device's peak in TOPS.  [default: known cards are looked up]"),
    click.option("--max-error-percentage", default=1.0, show_default=True, help="Failures above it are INVALID."),
    click.option("--json", "as_json", is_flag=True, help="Print JSON."),
]


def options(*groups: Sequence[Any]) -> Callable[[F], F]:
    """Several options as one decorator."""

    def decorate(function: F) -> F:
        for option in reversed([option for group in groups for option in group]):
            function = option(function)
        return function

    return decorate


@dataclass(frozen=True)
class ReportOptions:
    """What the options of a report say."""

    price_per_hour: float | None
    peak_tops: float | None
    max_error_percentage: float
    as_json: bool

    def summaries(self, runs: Sequence[Run]) -> list[Summary]:
        """The summaries of runs."""
        return [
            summarise(
                run,
                price_per_hour=self.price_per_hour,
                peak_tops=self.peak_tops,
                max_error_share=self.max_error_percentage / 100,
            )
            for run in runs
        ]

    def show(self, runs: Sequence[Run], *, slo_ms: float | None = None) -> None:
        """Print runs as text or JSON."""
        runs = [run for run in runs if run.records]
        if not runs:
            raise TargetError("nothing was measured: no request was answered before the end")
        summaries = self.summaries(runs)
        if self.as_json:
            click.echo(json.dumps(to_json(runs, summaries), indent=2))
            return
        click.echo(format_text(runs, summaries))
        if findings := format_findings(summaries, slo_ms):
            click.echo(findings)


@contextmanager
def measuring(setup: Setup, records_path: Path | None) -> Iterator[tuple[Session, RecordWriter]]:
    """A session whose records go to a file and that ends early, records kept, on SIGINT or SIGTERM."""

    def progress(line: str) -> None:
        click.echo(line, err=True)

    with stop_on_signals() as stop, Session(setup, stop=stop, progress=progress) as session:
        path = records_path or default_records_path(setup.model)
        with RecordWriter(path, session.header()) as writer:
            yield session, writer
        progress(f"records: {path}")


def setup_of(values: dict[str, Any]) -> Setup:
    """Take the options of a target out of all the options of a command."""
    names = ("address", "model", "what", "transport", "rows", "channels", "images", "metrics_url", "timeout_s")
    try:
        return Setup(**{name: values.pop(name) for name in names})
    except ValueError as exc:
        raise click.UsageError(str(exc)) from exc


def report_of(values: dict[str, Any]) -> ReportOptions:
    """Take the options of a report out of all the options of a command."""
    return ReportOptions(
        **{name: values.pop(name) for name in ("price_per_hour", "peak_tops", "max_error_percentage", "as_json")}
    )


def load_values(values: dict[str, Any]) -> dict[str, Any]:
    """Take what every load has out of all the options of a command."""
    taken = {name: values.pop(name) for name in ("duration_s", "warmup_s", "max_windows")}
    return {**taken, "stability": values.pop("stability_percentage") / 100}


@bench.command()
@options(_TARGET_OPTIONS, _LOAD_OPTIONS)
@click.option(
    "--concurrency", "concurrencies", multiple=True, type=click.IntRange(min=1),
    help="Closed load: requests on their way. May be repeated.",
)  # fmt: skip
@click.option("--rate", "rates", multiple=True, type=float, help="Open load: requests per second. May be repeated.")
@click.option(
    "--arrivals", type=click.Choice(["poisson", "constant"]), default="poisson", show_default=True,
    help="Intervals of open load.",
)  # fmt: skip
@options(_RECORD_OPTIONS, _REPORT_OPTIONS)
def run(
    concurrencies: tuple[int, ...],
    rates: tuple[float, ...],
    arrivals: Arrivals,
    workers: int,
    records_path: Path | None,
    **values: Any,
) -> None:
    r"""Closed or open load on one model: images per second, latency, where the time goes, VALID or INVALID.

    Closed load (--concurrency) keeps requests on their way and says what the server can do. Open load (--rate) sends
    at a pace of its own; latency counts from the moment a request was due. Without either: concurrency 1, 4 and 8.

    \b
    Examples:
      matteserve bench run --model demo --concurrency 1 --concurrency 8
      matteserve bench run --model demo --rate 5 --duration-s 60
      matteserve bench run --model demo --concurrency 4 --what images --images photos/
      matteserve bench run --model demo --concurrency 16 --transport shm --records shm.jsonl
    """
    setup, report, common = setup_of(values), report_of(values), load_values(values)
    try:
        loads = [setup.load(mode="closed", concurrency=concurrency, **common) for concurrency in concurrencies]
        loads += [setup.load(mode="open", rate=rate, arrivals=arrivals, **common) for rate in rates]
        loads = loads or [setup.load(mode="closed", concurrency=concurrency, **common) for concurrency in (1, 4, 8)]
    except ValueError as exc:
        raise click.UsageError(str(exc)) from exc
    runs = []
    with measuring(setup, records_path) as (session, writer):
        for load in loads:
            runs.append(session.measure(load, writer, workers=workers))
            if session.stop.is_set():
                break
        interrupted = session.stop.is_set()
    report.show(runs)
    if interrupted:
        raise SystemExit(INTERRUPTED)


@bench.command("sweep")
@options(_TARGET_OPTIONS, _LOAD_OPTIONS)
@click.option("--slo-ms", type=float, help="Bound of p99 in milliseconds, for the highest rate.")
@click.option("--max-concurrency", default=64, show_default=True, type=click.IntRange(min=1))
@click.option(
    "--load", "kind", type=click.Choice(["both", "closed", "open"]), default="both", show_default=True,
    help="Closed load over concurrency, open load over rate, or one after the other.",
)  # fmt: skip
@click.option(
    "--arrivals", type=click.Choice(["poisson", "constant"]), default="poisson", show_default=True,
    help="Intervals of open load.",
)  # fmt: skip
@click.option("--first-rate", type=float, help="Rate to begin with.  [default: half of the closed load's throughput]")
@options(_RECORD_OPTIONS, _REPORT_OPTIONS)
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
    r"""Raise the load until the server is saturated: the knee, and the highest rate that keeps p99 within --slo-ms.

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
@options(_REPORT_OPTIONS)
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV.")
@click.option("--html", "html_path", type=click.Path(path_type=Path, dir_okay=False), help="Write a page with plots.")
@click.option("--slo-ms", type=float, help="Bound of p99 in milliseconds, for the highest rate.")
def report_command(
    paths: tuple[Path, ...], as_csv: bool, html_path: Path | None, slo_ms: float | None, **values: Any
) -> None:
    r"""Report on records: text, JSON, CSV, or a self-contained HTML page with plots.

    \b
    Examples:
      matteserve bench report out/bench/demo.jsonl
      matteserve bench report fp32.jsonl fp16.jsonl --html report.html --price-per-hour 2.5
    """
    report = report_of(values)
    if as_csv and report.as_json:
        raise click.UsageError("--csv and --json exclude each other")
    runs = [run for path in paths for run in read_records(path) if run.records]
    if html_path is not None:
        from matteserve_bench.html import to_html

        html_path.write_text(to_html(runs, report.summaries(runs), slo_ms=slo_ms))
        click.echo(f"wrote {html_path}", err=True)
    if as_csv:
        click.echo(to_csv(runs, report.summaries(runs)), nl=False)
    elif html_path is None or report.as_json:
        report.show(runs, slo_ms=slo_ms)
