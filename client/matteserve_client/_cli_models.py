"""`matteserve models`."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import click

from matteserve_client._client import DEFAULT_ADDRESS, Client
from matteserve_client._errors import ContractError


@click.command()
@click.option("--address", default=DEFAULT_ADDRESS, show_default=True, help="host:port of the server's gRPC endpoint.")
@click.option("--timeout-s", type=click.FloatRange(0, min_open=True), default=5.0, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def models(address: str, timeout_s: float, as_json: bool) -> None:
    """List the models of a running server: what is loaded, and what each of them is.

    \b
    Examples:
      matteserve models
      matteserve models --address gpu-box:8001 --json
    """
    try:
        client = Client(address, timeout_s=timeout_s)
    except ValueError as exc:
        raise click.BadParameter(str(exc), param_hint="--address") from exc
    with client:
        rows = [_describe(client, status.name, status.ready, status.reason) for status in client.models()]
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    if not rows:
        click.echo(f"{address} has no models", err=True)
        return
    table = [("MODEL", "STATE", "INPUT", "ENGINE", "PRECISION", "WEIGHTS", "LICENCE")]
    for row in rows:
        contract = row["contract"]
        described = (
            (
                f"{contract['height']}x{contract['width']}",
                contract["engine"],
                contract["precision"],
                contract["weights"],
                contract["weights_licence"],
            )
            if contract
            else ("-",) * 5
        )
        table.append((row["name"], "ready" if row["ready"] else "not ready", *described))
    widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
    for line in table:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    for row in rows:
        if row["reason"]:
            click.echo(f"{row['name']}: {row['reason']}", err=True)


def _describe(client: Client, name: str, ready: bool, reason: str) -> dict[str, Any]:
    contract = None
    if ready:
        try:
            contract = asdict(client.contract(name))
        except ContractError as exc:
            reason = str(exc)
    return {"name": name, "ready": ready, "reason": reason, "contract": contract}
