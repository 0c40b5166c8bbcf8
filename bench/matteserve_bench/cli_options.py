"""Options that the commands of `matteserve bench` share, and what they become."""

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
from matteserve_bench.records import WINDOWS, RecordWriter, Run
from matteserve_bench.report import format_text, to_json
from matteserve_bench.session import Session, Setup, default_records_path, stop_on_signals
from matteserve_bench.sweep import format_findings

INTERRUPTED = 130
F = TypeVar("F", bound=Callable[..., Any])

TARGET_OPTIONS = [
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
    click.option("--metrics-url", help="The server's metrics, for its GPUs.  [default: http://HOST:8002/metrics]"),
    click.option("--timeout-s", default=60.0, show_default=True, help="Limit of each request."),
]
LOAD_OPTIONS = [
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
RECORD_OPTIONS = [
    click.option(
        "--records",
        "records_path",
        type=click.Path(path_type=Path, dir_okay=False),
        help="File to append records to.  [default: a new one in out/bench]",
    ),
]
REPORT_OPTIONS = [
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
