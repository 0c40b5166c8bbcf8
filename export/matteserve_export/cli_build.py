"""The command `matteserve build`.

Results go to stdout, progress and logs to stderr. onnx and the compilers are imported when the command runs.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import click

from matteserve_export._errors import ExportError
from matteserve_export.cli import _errors_for_people, _log_to_stderr

__all__ = ["build"]

_FOLDER = click.Path(file_okay=False, path_type=Path)
_FILE = click.Path(dir_okay=False, path_type=Path)


@click.command()
@click.argument("model")
@click.option("--engine", required=True, type=click.Choice(["onnx", "trt", "rtx"]), help="What will run the model.")
@click.option(
    "--precision",
    type=click.Choice(["fp32", "fp16", "bf16", "int8"]),
    default="fp16",
    show_default=True,
    help="What it computes in.",
)
@click.option("--model-repository", type=_FOLDER, default=Path("model_repository"), show_default=True)
@click.option("--max-batch-size", type=click.IntRange(1, 256), help="[default: the FP32 engine's]")
@click.option("--opt-batch-size", type=click.IntRange(1, 256), help="Batch that kernels are chosen for.  [default: 4]")
@click.option(
    "--compute-capability",
    "compute_capabilities",
    multiple=True,
    metavar="X.Y",
    help="rtx: a GPU to compile for, e.g. 8.9; may be repeated.  [default: all from 8.0 on]",
)
@click.option("--timing-cache", type=_FILE, help="trt: file that makes later builds on this GPU faster.")
@click.option("--version-compatible", is_flag=True, help="trt: let newer TensorRT load the plan.")
@click.option(
    "--hardware-compatibility",
    type=click.Choice(["none", "ampere_plus", "same_compute_capability"]),
    default="none",
    show_default=True,
    help="trt: let other GPUs load the plan.",
)
@click.option("--tf32", is_flag=True, help="Let float32 products round their inputs to 10 bits.")
@click.option("--optimization-level", type=click.IntRange(0, 5), help="0: fast build; 5: fast plan.")
@click.option("--native-deform-conv", is_flag=True, help="trt: keep DeformConv in place of GridSample.")
@click.option(
    "--max-queue-size",
    type=click.IntRange(0, 65_536),
    default=0,
    help="Refuse requests beyond so many waiting ones; costs throughput, see docs/serving.md.  [default: no bound]",
)
@click.option("--instances", type=click.IntRange(1), default=1, show_default=True, help="Copies of the engine.")
@click.option("--no-cuda-graphs", is_flag=True, help="Launch every kernel by itself.")
@click.option("--images", type=_FOLDER, help="Pictures for the comparison.  [default: made-up ones]")
@click.option("--calibration", type=_FOLDER, help="int8: pictures that show the range of every activation.")
@click.option("--dry-run", is_flag=True, help="Check everything that takes no time, say what would be built.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def build(model: str, as_json: bool, dry_run: bool, **arguments: Any) -> None:
    """Make another engine of an exported model: another precision, or a plan for an NVIDIA GPU.

    MODEL is the name that clients call; its FP32 ONNX must be in the repository. Nothing is published unless the result
    equals it within the precision's tolerance. Clients keep their engine until `matteserve swap` switches it.

    \b
    Examples:
        matteserve build u2netp --engine onnx --precision fp16
        matteserve build u2netp --engine rtx --precision fp16 --compute-capability 8.9
        matteserve build u2netp --engine trt --precision fp16 --timing-cache timing.cache --dry-run
    """
    _log_to_stderr()
    with _errors_for_people():
        try:
            from matteserve_export.build import BuildConfig, build_engine, preflight
            from matteserve_export.engine import CompilerOptions
            from matteserve_export.repository import GpuOptions
        except ModuleNotFoundError as exc:
            raise ExportError(
                f"the builder needs {exc.name}, which is not installed: pip install 'matteserve[export]'"
            ) from exc
        options = {name: arguments.pop(name) for name in CompilerOptions.__dataclass_fields__}
        config = BuildConfig(
            model=model,
            options=CompilerOptions(**options),
            gpu=GpuOptions(cuda_graphs=not arguments.pop("no_cuda_graphs")),
            lower_deform_conv=not arguments.pop("native_deform_conv"),
            **arguments,
        )
        if dry_run:
            planned = preflight(config).to_dict()
            if as_json:
                click.echo(json.dumps(planned, indent=2))
            else:
                click.echo(f"would build {planned['engine']} from {planned['source']}")
                _print(planned["compiler"] or {})
            return
        progress = _Progress()
        try:
            result = build_engine(config, progress)
        finally:
            progress.close()
    if as_json:
        click.echo(json.dumps(result.to_dict(), indent=2))
        return
    click.echo(f"engine   {result.engine}: {result.size / 2**20:.1f} MiB, {result.engine_path}")
    _print(result.manifest["builder"] or {})
    for gate in result.parity:
        click.echo(gate.line())
    for hazard in result.hazards:
        click.echo(f"look out {hazard}")
    suffix = result.engine.removeprefix(f"{model}_")
    if result.manifest["builder"]:
        click.echo(
            "The plan itself has not run yet; the swap compares it on the server, on its GPU, before it switches:"
        )
    click.echo(f"serve it: matteserve swap {model} --to {suffix}")


def _print(settings: dict[str, Any], indent: str = "  ") -> None:
    for key, value in settings.items():
        if isinstance(value, dict) and key != "profile":
            _print(value, indent)
            continue
        shown = value
        if isinstance(value, dict):
            shown = ", ".join(f"{name} {item}" for name, item in value.items())
        elif isinstance(value, (list, tuple)):
            shown = ", ".join(map(str, value)) or "none"
        click.echo(f"{indent}{key:<24} {shown}")


class _Progress:
    """The compiler's phases on stderr: one line that changes on a terminal, a line a phase elsewhere."""

    def __init__(self) -> None:
        self.live = sys.stderr.isatty()
        self.seen: set[str] = set()
        self.due = 0.0

    def __call__(self, phase: str, done: int, total: int) -> None:
        if self.live:
            if time.monotonic() >= self.due or done == total:
                self.due = time.monotonic() + 0.1
                click.echo(f"\r\x1b[K{phase} {done}/{total}", nl=False, err=True, color=True)
        elif phase not in self.seen:
            self.seen.add(phase)
            click.echo(phase, err=True)

    def close(self) -> None:
        if self.live and self.due:
            click.echo("\r\x1b[K", nl=False, err=True, color=True)
