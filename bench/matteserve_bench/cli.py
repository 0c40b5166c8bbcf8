"""`matteserve bench`."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

from matteserve_bench.closed_loop import ClosedLoop, run_closed_loop
from matteserve_bench.environment import describe_environment
from matteserve_bench.metrics import PERCENTILES, Summary, summarise
from matteserve_client import Client, GrpcTransport

_COLUMNS = ("mean", *(f"p{percent}" for percent in PERCENTILES), "max")


@click.group()
def bench() -> None:
    """Measure a running server."""


@bench.command()
@click.option("--address", default="127.0.0.1:8001", show_default=True, help="The server's gRPC address.")
@click.option("--model", required=True, help="Model to call, an alias or an engine.")
@click.option("--concurrency", "concurrencies", multiple=True, type=click.IntRange(min=1), help="May be repeated.")
@click.option("--duration-s", default=10.0, show_default=True, help="Seconds measured at each concurrency.")
@click.option("--warmup-s", default=2.0, show_default=True, help="Seconds before, not counted.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def run(
    address: str,
    model: str,
    concurrencies: tuple[int, ...],
    duration_s: float,
    warmup_s: float,
    as_json: bool,
) -> None:
    r"""Closed load on one model: images per second and latency, tensors only.

    No decoding, resizing or encoding takes part. Client and server share the machine unless --address is elsewhere.

    \b
    Example:
      matteserve bench run --model demo --concurrency 1 --concurrency 8
    """
    with Client(address) as client:
        contract = client.contract(model)
    rows = []
    transport = GrpcTransport(address)
    try:
        for concurrency in concurrencies or (1, 4, 8):
            click.echo(f"{model}: concurrency {concurrency}, {warmup_s + duration_s:.0f} s ...", err=True)
            load = ClosedLoop(concurrency, duration_s, warmup_s)
            rows.append((concurrency, summarise(run_closed_loop(transport, model, contract, load))))
    finally:
        transport.close()
    environment = describe_environment(model, contract)
    if as_json:
        results = [{"concurrency": concurrency, **asdict(summary)} for concurrency, summary in rows]
        click.echo(json.dumps({"environment": environment, "results": results}, indent=2))
    else:
        click.echo(format_table(rows, environment))


def format_table(rows: list[tuple[int, Summary]], environment: dict[str, str]) -> str:
    """One line for each concurrency, and the environment below."""
    head = f"{'concurrency':>11} {'images/s':>9} " + " ".join(f"{name:>8}" for name in _COLUMNS) + "  errors"
    lines = [f"{'':21} latency in ms", head]
    for concurrency, summary in rows:
        latency = " ".join(f"{summary.latency_ms.get(name, float('nan')):8.1f}" for name in _COLUMNS)
        errors = ", ".join(f"{name} {count}" for name, count in summary.errors.items()) or "none"
        lines.append(f"{concurrency:>11} {summary.images_per_s:9.2f} {latency}  {errors}")
    lines += [f"{name}: {value}" for name, value in environment.items()]
    return "\n".join(lines)
