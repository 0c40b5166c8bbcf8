"""`python -m matteserve_bench.comparisons`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import click

from matteserve_bench.comparisons import client_cost, encoders
from matteserve_bench.comparisons.models import REMBG_NAMES
from matteserve_bench.comparisons.vs_rembg import Plan, compare, table
from matteserve_export.pull import cache_directory

_OUTPUT = click.option("-o", "--output", type=click.Path(path_type=Path), help="Also write FILE.json and FILE.md.")


@click.group()
def main() -> None:
    """Comparisons with others, all sides in one run on the same pictures."""


@main.command()
@click.option("--model", "models", multiple=True, type=click.Choice(list(REMBG_NAMES)), help="May be repeated.")
@click.option("--quick", is_flag=True, help="Fewer pictures, one part each: a look, no figure to quote.")
@click.option("--rembg-python", default=sys.executable, help="Python that has rembg.  [default: this one]")
@click.option("--no-rembg-server", is_flag=True, help="Leave `rembg s` out, which needs rembg's [cli] extra.")
@click.option(
    "--cache",
    type=click.Path(path_type=Path, file_okay=False),
    default=None,
    help="For pictures and models.  [default: comparisons/ in matteserve's cache]",
)
@_OUTPUT
def vs_rembg(
    models: tuple[str, ...],
    quick: bool,
    rembg_python: str,
    no_rembg_server: bool,
    cache: Path | None,
    output: Path | None,
) -> None:
    r"""Encoded pictures in, PNG cut-outs out: rembg's remove(), its HTTP server, and matteserve.

    \b
    Example:
      python -m matteserve_bench.comparisons vs-rembg --model u2netp --model u2net --model isnet -o results/vs-rembg
    """
    began = time.monotonic()
    before = environment()
    results = compare(
        models or ("u2netp", "u2net", "isnet"),
        Plan.quick() if quick else Plan(),
        cache or cache_directory() / "comparisons",
        rembg_python,
        http=not no_rembg_server,
    )
    before["seconds"] = f"{time.monotonic() - began:.0f}"
    _report(table(results), before, results, output)


@main.command()
@_OUTPUT
def client(output: Path | None) -> None:
    """CPU time of the client's steps per megapixel: libjpeg-turbo's decode as the floor, ours, rembg's."""
    rows = client_cost.measure()
    _report(client_cost.table(rows), environment(), rows, output)


@main.command(name="encoders")
@_OUTPUT
def encoders_command(output: Path | None) -> None:
    """CPU time and size of every way to encode a cut-out that is installed."""
    rows = encoders.measure()
    _report(encoders.table(rows), environment(), rows, output)


def environment() -> dict[str, str]:
    """What the figures were measured on."""
    packages = ("matteserve", "numpy", "pillow", "onnxruntime", "rembg", "isal", "grpcio", "tritonclient")
    cpu = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "")
    revision = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return {
        "date": time.strftime("%Y-%m-%d"),
        "command": "python -m matteserve_bench.comparisons " + " ".join(sys.argv[1:]),
        "cpu": f"{cpu.partition(':')[2].strip()}, {len(os.sched_getaffinity(0))} cores",
        "load before": f"{os.getloadavg()[0]:.1f}",
        "python": sys.version.split()[0],
        "revision": revision.stdout.strip() or "unknown",
        **{name: _version(name) for name in packages},
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _report(text: str, described: dict[str, str], results: object, output: Path | None) -> None:
    text = text.rstrip() + "\n\n" + "\n".join(f"{name}: {value}" for name, value in described.items())
    click.echo(text)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.with_suffix(".md").write_text(text + "\n")
        output.with_suffix(".json").write_text(json.dumps({"environment": described, "results": results}, indent=1))


if __name__ == "__main__":
    main()
