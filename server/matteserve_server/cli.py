"""`matteserve serve`, `demo` and `install-triton`."""

from __future__ import annotations

import logging
import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import NoReturn

import click

from matteserve_client import ContractError, ModelContract
from matteserve_server import binary, bundled
from matteserve_server.demo import run_demo
from matteserve_server.embedded import EmbeddedServer
from matteserve_server.options import ServerOptions


@click.command()
@click.argument("extra_arguments", nargs=-1, metavar="[-- TRITONSERVER_FLAGS]")
@click.option(
    "--model-repository",
    type=click.Path(path_type=Path, file_okay=False),
    help="Directory with the models.  [default: ./model_repository, else the bundled demonstration model]",
)
@click.option("--model", "models", multiple=True, metavar="NAME", help="Load only this model; may be repeated.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 for all.")
@click.option("--grpc-port", default=8001, show_default=True, help="0 takes a free one.")
@click.option("--metrics-port", default=8002, show_default=True, help="Prometheus metrics; 0 takes a free one.")
@click.option("--http-port", type=int, help="Also listen for HTTP; off by default, it can delay a clean exit.")
@click.option("--threads", type=click.IntRange(min=1), help="ONNX Runtime threads per model instance.")
@click.option("--exit-timeout-s", default=30.0, show_default=True, help="Seconds for requests in flight at the end.")
@click.option("--probe-interval-s", default=2.0, show_default=True, help="Between probes of an idle model; 0: never.")
@click.option("--tritonserver", type=click.Path(path_type=Path), help="The program to run, if not the one found.")
@click.option("-v", "--verbose", is_flag=True, help="Show all of Triton's log, not only warnings and errors.")
def serve(
    model_repository: Path | None,
    models: tuple[str, ...],
    host: str,
    grpc_port: int,
    metrics_port: int,
    http_port: int | None,
    threads: int | None,
    exit_timeout_s: float,
    probe_interval_s: float,
    tritonserver: Path | None,
    verbose: bool,
    extra_arguments: tuple[str, ...],
) -> None:
    """Serve a model repository with a real Triton Inference Server.

    Prints one line when every model is ready. SIGTERM and Ctrl-C let requests in flight finish; a second one does not.
    A model whose process dies is brought back.

    \b
    Examples:
      matteserve serve
      matteserve serve --model u2netp --host 0.0.0.0 --threads 4
      matteserve serve -- --log-verbose=1 --rate-limit=execution_count
    """
    _log_to_stderr(logging.DEBUG if verbose else logging.INFO)
    try:
        options = ServerOptions(
            model_repository=model_repository or bundled.default_repository(),
            models=models,
            host=host,
            grpc_port=grpc_port,
            metrics_port=metrics_port,
            http_port=http_port,
            threads=threads,
            exit_timeout_s=exit_timeout_s,
            probe_interval_s=probe_interval_s,
            tritonserver=tritonserver,
            verbose=verbose,
            extra_arguments=extra_arguments,
        )
    except ValueError as exc:
        raise click.UsageError(str(exc)) from exc
    server = EmbeddedServer(options)
    stop_asked = _stop_on_signals(server)
    with server:
        click.echo(ready_line(server))
        code = server.wait(stop_asked)
        if code is not None:
            words = "\n  ".join(server.process.last_log_lines())
            raise click.ClickException(
                f"tritonserver ended by itself with exit code {code}; its last words:\n  {words}"
            )
        click.echo("stopping: requests in flight may finish", err=True)
        if server.stop() != 0:
            raise click.ClickException("the server was killed or ran out of time; requests were cut off")


@click.command()
@click.argument("image", required=False, type=click.Path(path_type=Path, dir_okay=False))
@click.option(
    "-o",
    "--output-directory",
    default=Path("out"),
    show_default=True,
    type=click.Path(path_type=Path, file_okay=False),
    help="Where the pictures are written.",
)
@click.option("--json", "as_json", is_flag=True, help="Print files and timings as JSON.")
def demo(image: Path | None, output_directory: Path, as_json: bool) -> None:
    """Cut out one picture: start a real Triton on this machine, send the picture over gRPC, write the result.

    Uses the bundled demonstration model, which is small and trained on generated scenes; installs the Triton binary
    first if there is none.

    \b
    Examples:
      matteserve demo
      matteserve demo photo.jpg -o results
    """
    _log_to_stderr(logging.WARNING)
    run_demo(image or bundled.bundled_image(), output_directory, as_json=as_json)


@click.command("install-triton")
@click.option("--reinstall", is_flag=True, help="Install even if it is there.")
def install_triton(reinstall: bool) -> None:
    """Install the Triton Inference Server binary into this environment.

    The wheel `nvidia-pytriton` is taken from your package index with a pinned hash, without its dependencies. On a
    machine where `tritonserver` is on PATH, as in NVIDIA's container, this is not needed.

    \b
    Example:
      matteserve install-triton
    """
    click.echo(f"installing Triton ({binary.WHEEL} {binary.WHEEL_VERSION}, {binary.WHEEL_MEGABYTES} MB) ...", err=True)
    click.echo(binary.install_triton(reinstall=reinstall))


def ready_line(server: EmbeddedServer) -> str:
    """One line that says what is served, where and by what."""
    options = server.options
    also = "".join(
        f", {name} on port {port}"
        for name, port in (("metrics", options.metrics_port), ("HTTP", options.http_port))
        if port is not None
    )
    models = ", ".join(_describe(server, name) for name in server.models)
    return f"matteserve is ready: gRPC on {server.address}{also}; {models}"


def _describe(server: EmbeddedServer, name: str) -> str:
    try:
        contract = ModelContract.from_config(server.control.config(name))
    except ContractError:
        return name  # somebody's own model; it is served all the same
    return f"{name} ({contract.engine} {contract.precision}, {contract.width}x{contract.height})"


def _stop_on_signals(server: EmbeddedServer) -> threading.Event:
    """An event that the first SIGTERM or SIGINT sets; the second kills the server."""
    stop_asked = threading.Event()

    def handle(number: int, _frame: FrameType | None) -> None:
        if stop_asked.is_set():
            server.process.kill()
        elif not server.models:  # still starting: leave at once, the context manager cleans up
            _exit(number)
        stop_asked.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handle)
    return stop_asked


def _exit(number: int) -> NoReturn:
    sys.exit(128 + number)


def _log_to_stderr(level: int) -> None:
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("matteserve").setLevel(level)
