"""`matteserve tune`."""

from __future__ import annotations

import contextlib
import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from matteserve_bench._errors import TuningError
from matteserve_bench.cli_options import INTERRUPTED, options
from matteserve_bench.compare import FEWEST_TURNS
from matteserve_bench.records import WINDOWS, Load, RecordWriter, TransportName
from matteserve_bench.session import Session, Setup, default_records_path, stop_on_signals
from matteserve_bench.tuned_engine import TunedEngine, changed, config_path, read_config
from matteserve_bench.tuning import Figures, Interrupted, Outcome, Setting, plan, search
from matteserve_bench.tuning_report import TuningReport, to_pbtxt, unified_diff
from matteserve_bench.validity import FEWEST_ANSWERS
from matteserve_client import MatteserveError
from matteserve_server import EmbeddedServer, ServerOptions, bundled
from matteserve_server.alias import replace_file

_RELOAD_S = 1.0  # a guess of a reload, for the time that is said beforehand

_SERVER_OPTIONS = [
    click.option("--address", help="gRPC address of a running server to tune on.  [default: one of its own]"),
    click.option(
        "--model-repository", type=click.Path(path_type=Path, exists=True, file_okay=False),
        help="The server's repository.  [default: ./model_repository, else the bundled one; with --address, what its "
        "command line says]",
    ),
    click.option(
        "--control-key", metavar="NAME=VALUE", envvar="MATTESERVE_CONTROL_KEY",
        help="Key of a restricted server, as in its --grpc-restricted-protocol.  [also: $MATTESERVE_CONTROL_KEY]",
    ),
    click.option("--cores", type=click.IntRange(min=1), help="Cores for the engine.  [default: the server's]"),
]  # fmt: skip
_LOAD_OPTIONS = [
    click.option("--concurrency", type=click.IntRange(min=1), help="Closed load: requests on their way.  [default: 8]"),
    click.option("--rate", type=float, help="Open load instead: requests per second."),
    click.option(
        "--transport", type=click.Choice(["grpc", "shm"]), default="grpc", show_default=True,
        help="Tensors inside the request, or in system shared memory (server on this machine).",
    ),
    click.option(
        "--images", type=click.Path(path_type=Path, exists=True, file_okay=False),
        help="Folder with pictures to send.  [default: generated ones]",
    ),
    click.option("--duration-s", default=4.0, show_default=True, help="Seconds of a measurement; more if it is slow."),
    click.option("--warmup-s", default=1.0, show_default=True, help="Seconds before, not counted."),
    click.option("--timeout-s", default=60.0, show_default=True, help="Limit of each request."),
]  # fmt: skip


@click.command()
@click.argument("model")
@click.option("--slo-ms", type=click.FloatRange(min=0, min_open=True), help="Bound of p99 in milliseconds.")
@options(_LOAD_OPTIONS)
@click.option("--max-trials", default=12, show_default=True, type=click.IntRange(min=1), help="Most settings to try.")
@click.option(
    "--turns", default=FEWEST_TURNS, show_default=True, type=click.IntRange(min=2),
    help="Paired turns in which the best one is confirmed.",
)  # fmt: skip
@options(_SERVER_OPTIONS)
@click.option("--write", is_flag=True, help="Write the proposal into config.pbtxt, and load it.")
@click.option("-o", "--output", type=click.Path(path_type=Path, dir_okay=False), help="Write all figures as JSON.")
@click.option(
    "--records", "records_path", type=click.Path(path_type=Path, dir_okay=False),
    help="File to append records to.  [default: a new one in out/bench]",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def tune(
    model: str,
    slo_ms: float | None,
    concurrency: int | None,
    rate: float | None,
    transport: TransportName,
    images: Path | None,
    duration_s: float,
    warmup_s: float,
    timeout_s: float,
    max_trials: int,
    turns: int,
    address: str | None,
    model_repository: Path | None,
    control_key: str | None,
    cores: int | None,
    write: bool,
    output: Path | None,
    records_path: Path | None,
    as_json: bool,
) -> None:
    """Find the batcher's delay, batch sizes, instances and threads that serve MODEL best, and propose them.

    Tries settings on a real server under load, on one that it starts or on a running one (--address). The best has the
    highest throughput whose p99 is within --slo-ms; it is proposed if its gain over the present setting is outside the
    noise. No file is changed without --write, and the engine is put back as it was, also after Ctrl-C.

    \b
    Examples:
      matteserve tune demo --slo-ms 900
      matteserve tune birefnet --concurrency 16 --address gpu-box:8001 -o tuning.json
      matteserve tune u2netp --rate 4 --write
    """
    if rate is not None and concurrency is not None:
        raise click.UsageError("--rate is open load, --concurrency closed load: give one of them")
    closed = {"mode": "closed", "concurrency": concurrency or 8}
    pace: dict[str, Any] = closed if rate is None else {"mode": "open", "rate": rate}
    headers = _headers(control_key)
    try:
        load = Load(
            model=model, transport=transport, duration_s=duration_s, warmup_s=warmup_s, timeout_s=timeout_s,
            max_windows=WINDOWS, **pace,
        )  # fmt: skip
    except ValueError as exc:
        raise click.UsageError(str(exc)) from exc
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(stop_on_signals())
        metrics_url = None
        if address is None:
            model_repository = model_repository or bundled.default_repository()
            server = stack.enter_context(_own_server(model_repository, model))
            address = server.address
            metrics_url = f"http://{server.options.host}:{server.options.metrics_port}/metrics"
        setup = Setup(
            address, model, transport=load.transport, images=images, metrics_url=metrics_url, timeout_s=timeout_s
        )
        session = stack.enter_context(Session(setup, stop=stop))
        path = config_path(session, model_repository)
        if path is not None:
            read_config(path)  # now, not when all is measured
        if write:
            _check_writable(path, session)
        header = session.header()
        writer = stack.enter_context(RecordWriter(records_path or default_records_path(f"tune-{model}"), header))
        engine = stack.enter_context(TunedEngine(session, headers=headers, cores=cores))
        outcome, load = _search(engine, load, writer, slo_ms=slo_ms, max_trials=max_trials, turns=turns)
        engine.restore()
        before, after = _texts(engine, path, outcome)
        diff = unified_diff(before, after, path, engine.name)
        written = False
        if write and path is not None and outcome.proposal is not None:
            written = True
            _write(engine, path, before, after)
        click.echo(f"records: {writer.path}", err=True)
    found = TuningReport(outcome, load, header, slo_ms=slo_ms, notes=engine.notes, diff=diff)
    report = found.to_dict(written=written)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(report, indent=2) + "\n")
    if as_json:
        click.echo(json.dumps(report, indent=2))
    else:
        click.echo(found.text())
        if outcome.proposal is not None:
            click.echo(f"Written to {path}" if written else "Nothing was written; --write does that")
    if outcome.interrupted:
        raise SystemExit(INTERRUPTED)


def _search(
    engine: TunedEngine, load: Load, writer: RecordWriter, *, slo_ms: float | None, max_trials: int, turns: int
) -> tuple[Outcome, Load]:
    """Look at the present setting once, say what the search will take, and search; the load as it was really sent."""
    for note in engine.notes:
        click.echo(f"note: {note}", err=True)
    click.echo(f"{engine.name}: {engine.present} (present) at {load.pace} ...", err=True)
    try:
        first = engine.measure(engine.present, load, writer)
    except Interrupted:
        return Outcome(engine.present, (), None, "interrupted", interrupted=True), load
    # Fewer answers in a window than the bench's rules ask for say little.
    least_s = WINDOWS * 1.25 * FEWEST_ANSWERS / first.images_per_s
    if least_s > load.duration_s:
        load = replace(load, duration_s=math.ceil(10 * least_s) / 10)
        click.echo(f"  {first.images_per_s:.2f} images/s: measurements of {load.duration_s:g} s", err=True)
    space = engine.space(most_waiting=load.concurrency or 0)
    trials, count = plan(engine.present, space, max_trials=max_trials, turns=turns)
    minutes = count * (load.warmup_s + load.duration_s + _RELOAD_S) / 60
    click.echo(f"  up to {trials} settings in {count} measurements, about {minutes:.0f} min", err=True)
    done = 0

    def measure(setting: Setting) -> Figures:
        nonlocal done
        done += 1
        click.echo(f"  [{done}/{count}] {setting} ...", err=True)
        return engine.measure(setting, replace(load, label=str(setting)), writer)

    return search(engine.present, space, measure, slo_ms=slo_ms, max_trials=max_trials, turns=turns), load


def _own_server(repository: Path, model: str) -> EmbeddedServer:
    """A server for this model alone. No supervisor: its probes and reloads would come in between."""
    return EmbeddedServer(ServerOptions(repository, (model,), grpc_port=0, metrics_port=0, probe_interval_s=0))


def _texts(engine: TunedEngine, path: Path | None, outcome: Outcome) -> tuple[str, str]:
    """`config.pbtxt` as it is and as it is proposed; the server's own configuration if the file is not to be seen."""
    before = to_pbtxt(engine.config) if path is None else path.read_text(encoding="utf-8")
    if outcome.proposal is None:
        return before, before
    config = engine.config if path is None else read_config(path)
    return before, to_pbtxt(changed(config, engine.present, outcome.proposal))


def _check_writable(path: Path | None, session: Session) -> None:
    """Say before anything is measured that the result could not be written."""
    if path is None:
        raise TuningError(
            f"--write: the repository of {session.setup.address} is not to be seen from here; name it with "
            "--model-repository, or leave out --write and take the proposal there"
        )
    if not os.access(path.parent, os.W_OK):
        raise TuningError(f"--write: {path.parent} cannot be written to; run as a user who may, or leave it out")


def _write(engine: TunedEngine, path: Path, before: str, after: str) -> None:
    """Write the proposal, and load it; a file that does not load is taken back."""
    replace_file(path, after)
    try:
        engine.load_from_disk()
    except MatteserveError:
        replace_file(path, before)
        raise


def _headers(control_key: str | None) -> dict[str, str]:
    if control_key is None:
        return {}
    name, _, value = control_key.partition("=")
    if not (name and value):
        raise click.UsageError("--control-key must be NAME=VALUE, as after the colon of --grpc-restricted-protocol")
    return {f"triton-grpc-protocol-{name}": value}
