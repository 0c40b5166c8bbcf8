"""`matteserve bench ab`, `compare` and `perf-analyzer`: one figure against another."""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from matteserve_bench.cli_options import (
    INTERRUPTED,
    LOAD_OPTIONS,
    RECORD_OPTIONS,
    TARGET_OPTIONS,
    load_values,
    measuring,
    options,
    setup_of,
)
from matteserve_bench.compare import compare, format_comparisons, interleave
from matteserve_bench.metrics import summarise
from matteserve_bench.records import Load, RecordWriter, Run, read_records
from matteserve_bench.report import finite
from matteserve_bench.session import Session, Setup, default_records_path, stop_on_signals

_SIDE_KEYS = {
    "address": str, "model": str, "what": str, "transport": str, "rows": int, "channels": int, "concurrency": int,
    "rate": float, "arrivals": str,
}  # fmt: skip


@click.command("ab")
@click.option("--a", "side_a", required=True, metavar="KEY=VALUE,...", help="Side A.")
@click.option("--b", "side_b", required=True, metavar="KEY=VALUE,...", help="Side B.")
@click.option("--turns", default=8, show_default=True, type=click.IntRange(min=1), help="Turns of A and B.")
@click.option("--duration-s", default=6.0, show_default=True, help="Seconds measured of each side in each turn.")
@click.option("--warmup-s", default=1.0, show_default=True, help="Seconds before, not counted.")
@click.option("--records-a", type=click.Path(path_type=Path, dir_okay=False), help="  [default: new in out/bench]")
@click.option("--records-b", type=click.Path(path_type=Path, dir_okay=False), help="  [default: new in out/bench]")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def ab(
    side_a: str,
    side_b: str,
    turns: int,
    duration_s: float,
    warmup_s: float,
    records_a: Path | None,
    records_b: Path | None,
    as_json: bool,
) -> None:
    """Run A and B in turn and say what changed, and whether it is outside the noise.

    Each side is a list of address, model, what, transport, rows, channels, and concurrency or rate with arrivals.
    What B leaves out is as in A.

    \b
    Examples:
      matteserve bench ab --a model=demo,concurrency=4 --b transport=shm
      matteserve bench ab --a model=u2netp_onnx_fp32,concurrency=8 --b model=u2netp_onnx_fp16 --turns 12
    """
    keys = parse_side(side_a, "--a")
    sides = [keys, {**keys, **parse_side(side_b, "--b")}]
    if "rate" in sides[1] and "rate" not in keys:
        sides[1].pop("concurrency", None)
    if "concurrency" in parse_side(side_b, "--b"):
        sides[1].pop("rate", None)
    common = {"duration_s": duration_s, "warmup_s": warmup_s}
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(stop_on_signals())
        ready: list[tuple[Session, Load, RecordWriter]] = []
        for name, values, path in (("a", sides[0], records_a), ("b", sides[1], records_b)):
            setup, load = _side(values, common)
            session = stack.enter_context(Session(setup, stop=stop, progress=lambda line: click.echo(line, err=True)))
            path = path or default_records_path(f"ab-{name}-{setup.model}")
            ready.append((session, load, stack.enter_context(RecordWriter(path, session.header()))))
        runs_a, runs_b = interleave(ready, turns)
        for name, (_, _, writer) in zip("ab", ready, strict=True):
            click.echo(f"records of {name.upper()}: {writer.path}", err=True)
        interrupted = stop.is_set()
    if runs_a and runs_b:
        _show(runs_a, runs_b, as_json)
    if interrupted:
        raise SystemExit(INTERRUPTED)


@click.command("compare")
@click.argument("a", type=click.Path(path_type=Path, dir_okay=False), metavar="A")
@click.argument("b", type=click.Path(path_type=Path, dir_okay=False), metavar="B")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def compare_command(a: Path, b: Path, as_json: bool) -> None:
    """Compare two files of records: what changed, by how much, and whether it is outside the noise.

    Records of `bench ab` are paired by their turn; of others each window is a sample, and drift is in the figures.

    \b
    Example:
      matteserve bench compare before.jsonl after.jsonl
    """
    _show([run for run in read_records(a) if run.records], [run for run in read_records(b) if run.records], as_json)


@click.command("perf-analyzer")
@options(TARGET_OPTIONS)
@click.option("--concurrency", default=4, show_default=True, type=click.IntRange(min=1), help="Requests on their way.")
@click.option(
    "--library-path", type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Folder with libb64 and libcudart.  [default: those of the embedded server]",
)  # fmt: skip
@options(LOAD_OPTIONS, RECORD_OPTIONS)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def perf_analyzer_command(
    concurrency: int,
    library_path: Path | None,
    workers: int,
    records_path: Path | None,
    as_json: bool,
    **values: Any,
) -> None:
    """Ask NVIDIA's perf_analyzer for a second opinion: same model, same inputs, side by side.

    Runs ours, perf_analyzer, and ours again, so that drift of the machine shows. Downloads the binary on first use.

    \b
    Example:
      matteserve bench perf-analyzer --model demo --concurrency 4 --duration-s 15
    """
    from matteserve_bench import perf_analyzer

    setup = setup_of(values)
    if setup.what != "tensors":
        raise click.UsageError("perf_analyzer sends tensors; leave out --what images")
    try:
        load = setup.load(mode="closed", concurrency=concurrency, **load_values(values))
    except ValueError as exc:
        raise click.UsageError(str(exc)) from exc
    binary = perf_analyzer.obtain()
    with measuring(setup, records_path) as (session, writer):
        libraries = perf_analyzer.library_directory(binary, session.observer.listener, library_path)
        runs = [session.measure(load, writer)]
        if not session.stop.is_set():
            theirs = perf_analyzer.ask(session, load, binary, libraries)
        if not session.stop.is_set():
            runs.append(session.measure(load, writer))
        interrupted = session.stop.is_set()
    if interrupted:
        raise SystemExit(INTERRUPTED)
    ours = [summarise(run) for run in runs]
    agreement = perf_analyzer.compare_opinions(ours, theirs)
    if as_json:
        report = {"matteserve": ours, "perf_analyzer": theirs, "agreement": agreement, "environment": runs[0].header}
        click.echo(json.dumps({name: _plain(value) for name, value in report.items()}, indent=2))
    else:
        click.echo(perf_analyzer.format_opinions(ours, theirs, agreement))


def parse_side(text: str, option: str) -> dict[str, Any]:
    """Read `KEY=VALUE,...`.

    Raises:
        click.UsageError: A key is not known, or its value does not fit.
    """
    side: dict[str, Any] = {}
    for part in filter(None, text.split(",")):
        key, equals, value = part.partition("=")
        if not equals or key not in _SIDE_KEYS:
            raise click.UsageError(f"{option}: {part!r} is not KEY=VALUE with one of {', '.join(_SIDE_KEYS)}")
        try:
            side[key] = _SIDE_KEYS[key](value)
        except ValueError as exc:
            raise click.UsageError(f"{option}: {key} is {value!r}, must be {_SIDE_KEYS[key].__name__}") from exc
    return side


def _side(values: dict[str, Any], common: dict[str, Any]) -> tuple[Setup, Load]:
    values = dict(values)
    pace = {name: values.pop(name) for name in ("concurrency", "rate", "arrivals") if name in values}
    if "model" not in values or ("concurrency" in pace) == ("rate" in pace):
        raise click.UsageError("a side needs model=..., and either concurrency=... or rate=...")
    try:
        setup = Setup(**values)
        return setup, setup.load(mode="closed" if "concurrency" in pace else "open", **pace, **common)
    except ValueError as exc:
        raise click.UsageError(str(exc)) from exc


def _show(runs_a: list[Run], runs_b: list[Run], as_json: bool) -> None:
    comparisons = compare(runs_a, runs_b)
    if as_json:
        click.echo(json.dumps(_plain(comparisons), indent=2))
    else:
        click.echo(format_comparisons(runs_a, runs_b, comparisons))


def _plain(value: Any) -> Any:
    """Dataclasses, and lists of them, as JSON has them."""
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return finite(asdict(value) if hasattr(value, "__dataclass_fields__") else value)
