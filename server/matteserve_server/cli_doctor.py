"""`matteserve doctor`."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import click

from matteserve_server import bundled
from matteserve_server.doctor import examine

_MARKS = {"ok": "ok", "note": "--", "problem": "!!"}


@click.command()
@click.option(
    "--model-repository",
    type=click.Path(path_type=Path, file_okay=False),
    help="Directory with the models.  [default: ./model_repository, else the bundled demonstration model]",
)
@click.option("--port", "ports", type=int, multiple=True, help="Port that must be free; may be repeated.  [8001, 8002]")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(model_repository: Path | None, ports: tuple[int, ...], as_json: bool) -> None:
    """Say what this machine can serve: GPU, libraries, ports, shared memory, and which engines fit.

    "!!" marks what would stop `matteserve serve`; the exit code is 1 then. "--" is missing and not needed.

    \b
    Examples:
      matteserve doctor
      matteserve doctor --model-repository /srv/models --json
    """
    findings = examine(model_repository or bundled.default_repository(), ports=ports or (8001, 8002))
    problems = sum(finding.state == "problem" for finding in findings)
    if as_json:
        click.echo(json.dumps({"problems": problems, "findings": [asdict(finding) for finding in findings]}, indent=2))
    else:
        for finding in findings:
            click.echo(f"{_MARKS[finding.state]} {finding.area:12} {finding.text}")
    sys.exit(1 if problems else 0)
