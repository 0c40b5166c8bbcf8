"""`matteserve swap` and `matteserve rollback`."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from matteserve_server import bundled
from matteserve_server.alias import is_writable
from matteserve_server.swapping import STEPS, Swap, SwapOptions, SwapResult

_WORDS = {
    "check": "checking what is there",
    "load": "loading {target}",
    "verify": "comparing it with {source}",
    "write": "writing the alias",
    "switch": "switching the server",
    "watch": "watching it",
    "unload": "unloading {source}",
}


def _common_options(command: Callable[..., None]) -> Callable[..., None]:
    options = (
        click.option("--address", default="127.0.0.1:8001", show_default=True, help="host:port of the server's gRPC."),
        click.option(
            "--model-repository",
            type=click.Path(path_type=Path, file_okay=False),
            help="The server's repository, as seen from here.  [default: ./model_repository, else the bundled one]",
        ),
        click.option("--server-only", is_flag=True, help="Change the running server, not its disk: lost at a restart."),
        click.option(
            "--control-key",
            metavar="NAME=VALUE",
            envvar="MATTESERVE_CONTROL_KEY",
            help="Key of a restricted server, as in its --grpc-restricted-protocol.  [also: $MATTESERVE_CONTROL_KEY]",
        ),
        click.option("--keep-old", is_flag=True, help="Leave the old engine loaded."),
        click.option("--json", "as_json", is_flag=True, help="Print the result as JSON."),
    )
    for option in reversed(options):
        command = option(command)
    return command


@click.command()
@click.argument("model")
@click.option("--to", "engine", required=True, metavar="ENGINE", help="<engine>_<precision>, e.g. onnx_fp16, trt_fp16.")
@click.option("--dry-run", is_flag=True, help="Check, and say what would be done.")
@click.option(
    "--images",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    help="Pictures to compare the engines on.  [default: a few drawn ones]",
)
@click.option("--watch-s", type=click.FloatRange(0), default=30.0, show_default=True, help="Watch it for so long.")
@click.option(
    "--max-error-rate",
    type=click.FloatRange(0, 1),
    default=0.01,
    show_default=True,
    help="Share of failed requests above which it is rolled back.",
)
@_common_options
def swap(
    model: str,
    engine: str,
    dry_run: bool,
    images: Path | None,
    watch_s: float,
    max_error_rate: float,
    address: str,
    model_repository: Path | None,
    server_only: bool,
    control_key: str | None,
    keep_old: bool,
    as_json: bool,
) -> None:
    """Move MODEL to another of its engines while it serves, without losing a request.

    The new engine is loaded beside the old one, compared with it on the server, put behind the name that clients call,
    on disk and in the server, and watched. If anything fails, the old one goes on serving.

    \b
    Examples:
      matteserve swap birefnet --to trt_fp16
      matteserve swap birefnet --to onnx_fp16 --images samples/ --watch-s 300
      matteserve swap birefnet --to trt_fp16 --address gpu-box:8001 --server-only
    """
    options = _options(
        model,
        model_repository,
        server_only,
        address=address,
        control_key=control_key,
        images=images,
        watch_s=watch_s,
        max_error_rate=max_error_rate,
        keep_old=keep_old,
    )
    if dry_run:
        with Swap(model, options) as operation:
            _print(operation.check(engine), as_json=as_json, dry_run=True)
        return
    _run(model, options, lambda operation: operation.to(engine), as_json=as_json)


@click.command()
@click.argument("model")
@_common_options
def rollback(
    model: str,
    address: str,
    model_repository: Path | None,
    server_only: bool,
    control_key: str | None,
    keep_old: bool,
    as_json: bool,
) -> None:
    """Move MODEL back to the engine before its last swap, without losing a request.

    The engine that serves is not asked for its opinion: it may be the broken one. Repeated, it goes back further.

    \b
    Examples:
      matteserve rollback birefnet
      matteserve rollback birefnet --address gpu-box:8001 --server-only
    """
    options = _options(
        model, model_repository, server_only, address=address, control_key=control_key, keep_old=keep_old
    )
    _run(model, options, Swap.back, as_json=as_json)


def _options(model: str, repository: Path | None, server_only: bool, **others: Any) -> SwapOptions:
    if repository is None and not server_only:
        repository = bundled.default_repository()
        if not is_writable(repository, model):
            click.echo(
                f"{repository} has no {model!r} that can be changed from here: only the running server is changed, and "
                "a restart undoes it. Name its repository with --model-repository to make it last",
                err=True,
            )
            server_only = True
    try:
        return SwapOptions(model_repository=None if server_only else repository, **others)
    except ValueError as exc:
        raise click.UsageError(str(exc)) from exc


def _run(model: str, options: SwapOptions, run: Callable[[Swap], SwapResult], *, as_json: bool) -> None:
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(message)s")
    with Swap(model, options, on_step=lambda step: click.echo(f"{step} ...", err=True)) as operation:
        _print(run(operation), as_json=as_json)


def _print(result: SwapResult, *, as_json: bool, dry_run: bool = False) -> None:
    if as_json:
        click.echo(json.dumps({**result.to_dict(), "dry_run": dry_run}, indent=2))
        return
    for note in result.notes:
        click.echo(f"note: {note}", err=True)
    if not result.changed:
        click.echo(f"{result.model} points at {result.target} already")
        return
    if dry_run:
        click.echo(f"{result.model} points at {result.source}; a swap to {result.target} would go through")
        for step in STEPS[1:]:
            if step != "write" or result.persistent:
                click.echo(f"  {step:7} {_WORDS[step].format(source=result.source, target=result.target)}")
        return
    lasting = "" if result.persistent else ", until the server restarts"
    click.echo(f"{result.model} now points at {result.target} (before: {result.source}){lasting}")
    if result.difference is not None:
        click.echo(
            f"  answers differ by max {255 * result.difference.max_abs:.0f}/255, mean "
            f"{255 * result.difference.mean_abs:.3f}/255, IoU {result.difference.iou:.4f} on "
            f"{result.difference.images} images"
        )
        click.echo(f"  {result.requests} requests while it was watched, {result.failures} of them failed")
    seconds = ", ".join(f"{step} {value:.1f}" for step, value in result.seconds.items())
    click.echo(f"  {sum(result.seconds.values()):.1f} s: {seconds}")
