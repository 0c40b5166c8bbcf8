"""`matteserve eval`."""

from __future__ import annotations

import csv
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click

from matteserve_bench._errors import EvaluationError
from matteserve_bench.cli_options import INTERRUPTED
from matteserve_bench.environment import describe_environment, format_environment
from matteserve_bench.evaluation import MEASURES, Pairing, Row, evaluate, find_pairs, summarise
from matteserve_bench.evaluation.run import DEFAULT_WORKERS
from matteserve_bench.evaluation.sheet import Worst, write_contact_sheet
from matteserve_bench.evaluation.summary import Summary, format_summary
from matteserve_bench.session import stop_on_signals
from matteserve_bench.triton import TritonServer
from matteserve_client import Client

_FOLDER = click.Path(path_type=Path, exists=True, file_okay=False)
_CAPTIONS = ("mae", "s_measure", "weighted_f", "biou", "sad")
_SCHEMA = 1


@click.command("eval")
@click.option("--images", type=_FOLDER, required=True, help="Folder with pictures.")
@click.option("--masks", type=_FOLDER, required=True, help="Folder with their masks or mattes, under the same names.")
@click.option("--trimaps", type=_FOLDER, help="Folder with trimaps: mattes are then compared where these are grey.")
@click.option("--model", "models", multiple=True, required=True, help="Alias or engine. May be repeated.")
@click.option("--address", default="127.0.0.1:8001", show_default=True, help="The server's gRPC address.")
@click.option("--timeout-s", type=click.FloatRange(0, min_open=True), default=60.0, show_default=True)
@click.option("--in-flight", type=click.IntRange(1), default=8, show_default=True, help="Most requests at once.")
@click.option("--workers", type=click.IntRange(1), default=DEFAULT_WORKERS, help="Processes that compute the measures.")
@click.option("--hce", is_flag=True, help="Human correction effort too; it takes longer than all the others.")
@click.option("--worst", "worst_count", type=click.IntRange(0), default=8, show_default=True, help="Rows of the sheet.")
@click.option(
    "--worst-by", type=click.Choice([m.key for m in MEASURES if not m.optional]), default="mad", show_default=True,
    metavar="MEASURE", help="Which pictures are the worst.",
)  # fmt: skip
@click.option("--allow-missing", is_flag=True, help="Leave out pictures without a mask, and masks without a picture.")
@click.option("--allow-failures", is_flag=True, help="Exit with 0 although pictures failed.")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path, file_okay=False),
    help="Folder for per_image.csv, summary.json and worst.png.  [default: a new one in out/eval]",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def evaluate_command(
    images: Path,
    masks: Path,
    trimaps: Path | None,
    models: tuple[str, ...],
    address: str,
    timeout_s: float,
    in_flight: int,
    workers: int,
    hce: bool,
    worst_count: int,
    worst_by: str,
    allow_missing: bool,
    allow_failures: bool,
    output: Path | None,
    as_json: bool,
) -> None:
    """Score the alphas of a running server against masks.

    Prints the field's measures, mean over pictures: MAE, S-, E- and F-measures, IoU and Boundary IoU by pysodmetrics;
    SAD, MSE, MAD, gradient and connectivity error for mattes. Of several models each is compared with the first, over
    the same pictures. A picture that fails does not stop the others: the exit code is then 1. Ctrl-C keeps what is
    done.

    \b
    Examples:
      matteserve eval --images im/ --masks gt/ --model demo
      matteserve eval --images im/ --masks gt/ --model birefnet_onnx_fp32 --model birefnet_onnx_fp16 -o fp16/
      matteserve eval --images im/ --masks alpha/ --trimaps trimap/ --model birefnet --worst-by sad
    """
    if len(set(models)) < len(models):
        raise click.UsageError("--model names a model twice; an alias and the engine behind it may stand side by side")
    pairing = find_pairs(images, masks, trimaps)
    if pairing.incomplete:
        found = "; ".join(pairing.incomplete)
        if not allow_missing:
            raise EvaluationError(f"{found}; add them, or leave out what has no partner with --allow-missing")
        click.echo(f"left out: {found}", err=True)
    try:
        client = Client(address, timeout_s=timeout_s)
    except ValueError as exc:
        raise click.BadParameter(str(exc), param_hint="--address") from exc
    worst = Worst(worst_count, next(m for m in MEASURES if m.key == worst_by))
    with client:
        headers = _describe(client, address, models)
        folder = output or Path("out") / "eval" / f"{models[0].replace('/', '_')}-{time.strftime('%Y%m%d-%H%M%S')}"
        with stop_on_signals() as stop, _csv_file(folder, hce=hce) as write, _progress(pairing, models) as bar:
            rows = []
            limits = {"in_flight": in_flight, "workers": workers}
            for row in evaluate(client, pairing.pairs, models, **limits, hce=hce, stop=stop):
                write(row)
                worst.offer(row)
                rows.append(replace(row, tiles=None))
                bar.update(1)
            interrupted = stop.is_set()
    if interrupted and not rows:
        click.echo("interrupted before the first picture was scored", err=True)
        raise SystemExit(INTERRUPTED)
    summary = summarise(rows, models)
    report = {
        "schema": _SCHEMA,
        "images": str(images), "masks": str(masks), "trimaps": None if trimaps is None else str(trimaps),
        "pairs": len(pairing.pairs), "interrupted": interrupted, "pysodmetrics": version("pysodmetrics"),
        **summary.to_json(),
        "environment": headers,
    }  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    if worst_count:
        write_contact_sheet(folder / "worst.png", worst, [m for m in MEASURES if m.key in _CAPTIONS])
    _show(summary, report, folder, as_json=as_json)
    if interrupted:
        done = summary.pictures + summary.left_out
        click.echo(f"interrupted after {done} of {len(pairing.pairs)} pictures", err=True)
        raise SystemExit(INTERRUPTED)
    if summary.errors and not allow_failures:
        raise SystemExit(1)


def _describe(client: Client, address: str, models: Sequence[str]) -> dict[str, Any]:
    """The environment by model; fails before any picture is sent if one is not there."""
    server = TritonServer(address)
    try:
        return {model: describe_environment(server, model, client.contract(model)) for model in models}
    finally:
        server.close()


@contextmanager
def _csv_file(folder: Path, *, hce: bool) -> Iterator[Any]:
    """Open per_image.csv; gives a function that writes a row at once, so that whatever ends the run loses nothing."""
    columns = [m.key for m in MEASURES if hce or not m.optional]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        stream = (folder / "per_image.csv").open("w", newline="", encoding="utf-8")
    except OSError as exc:
        raise EvaluationError(f"{folder}: cannot be written: {exc.strerror}; name another folder with -o") from exc
    with stream:
        table = csv.writer(stream)
        table.writerow(["image", "mask", "model", "height", "width", *columns, "error"])

        def write(row: Row) -> None:
            figures = [f"{row.figures[key]:.6g}" if key in row.figures else "" for key in columns]
            size = row.size or ("", "")
            table.writerow([row.pair.name, row.pair.mask.name, row.model, *size, *figures, row.error or ""])
            stream.flush()

        yield write


def _progress(pairing: Pairing, models: Sequence[str]) -> Any:
    return click.progressbar(length=len(pairing.pairs) * len(models), label="Scoring", file=sys.stderr)


def _show(summary: Summary, report: dict[str, Any], folder: Path, *, as_json: bool) -> None:
    for model, image, text in summary.errors:
        click.echo(f"{model}, {image}: {text}", err=True)
    if as_json:
        click.echo(json.dumps(report, indent=2, ensure_ascii=False))
    else:
        click.echo(format_summary(summary))
        first, *others = report["environment"].values()
        click.echo(f"Environment: {format_environment(first)}")
        for model in (header["model"] for header in others):  # what they share is said
            click.echo(f"{model['name']}: {model['engine_name']}, {model['architecture']} {model['precision']}")
    click.echo(f"wrote {folder}", err=True)
