"""The `matteserve` command: one group, whose subcommands are imported when they are called."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from typing import Any

import click

from matteserve_client._errors import MatteserveError
from matteserve_client._version import __version__


@dataclass(frozen=True)
class _Entry:
    """A subcommand that is not imported yet."""

    target: str  # "module:attribute"
    help: str
    extra: str = ""
    needs: tuple[str, ...] = ()  # modules that the extra brings

    @property
    def missing(self) -> str | None:
        """The first module of the extra that is not installed; looked up, not imported."""
        return next((name for name in self.needs if importlib.util.find_spec(name) is None), None)


_ENTRIES = {
    "remove": _Entry("matteserve_client._cli_remove:remove", "Cut out pictures on a running server."),
    "models": _Entry("matteserve_client._cli_models:models", "List what a running server has."),
    "demo": _Entry(
        "matteserve_server.cli:demo",
        "Start a server and cut out a picture.",
        "server",
        ("onnxruntime",),
    ),
    "serve": _Entry("matteserve_server.cli:serve", "Serve a model repository.", "server", ("onnxruntime",)),
    "swap": _Entry("matteserve_server.cli_swap:swap", "Move a model to another engine while it serves."),
    "rollback": _Entry("matteserve_server.cli_swap:rollback", "Move a model back to the engine before."),
    "doctor": _Entry("matteserve_server.cli_doctor:doctor", "Say what this machine can serve, and what not."),
    "install-triton": _Entry("matteserve_server.cli:install_triton", "Fetch the Triton server binary."),
    "pull": _Entry("matteserve_export.cli:pull", "Download known weights."),
    "weights": _Entry("matteserve_export.cli:weights", "List known weights and their licences."),
    "export": _Entry(
        "matteserve_export.cli:export", "Turn weights into a served model.", "export", ("onnx", "onnxruntime", "torch")
    ),
    "build": _Entry(
        "matteserve_export.cli_build:build",
        "Make another precision, or a TensorRT plan.",
        "export",
        ("onnx", "onnxruntime"),
    ),
    "verify": _Entry(
        "matteserve_export.cli_verify:verify",
        "Compare a model's engines with its FP32 one.",
        "export",
        ("onnx", "onnxruntime", "onnxslim"),
    ),
    "bench": _Entry("matteserve_bench.cli:bench", "Measure a running server.", "bench", ("psutil",)),
    "tune": _Entry("matteserve_bench.cli_tune:tune", "Find an engine's best settings.", "bench", ("psutil",)),
    "eval": _Entry(
        "matteserve_bench.cli_eval:evaluate_command",
        "Score a server's alphas against masks.",
        "eval",
        ("psutil", "py_sod_metrics"),
    ),
}


class LazyGroup(click.Group):
    """Knows its subcommands by name and one line each; turns what goes wrong into one line, never a traceback."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order in which a newcomer needs them."""
        return list(_ENTRIES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one subcommand."""
        entry = _ENTRIES.get(cmd_name)
        if entry is None:
            return None
        module, _, attribute = entry.target.partition(":")
        try:
            command: click.Command = getattr(importlib.import_module(module), attribute)
        except ModuleNotFoundError as exc:
            raise _missing_module(cmd_name, entry, exc) from exc
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list without importing any subcommand."""
        rows = []
        for name, entry in _ENTRIES.items():
            note = f" (needs matteserve[{entry.extra}])" if entry.missing else ""
            rows.append((name, entry.help + note))
        with formatter.section("Commands"):
            formatter.write_dl(rows)

    def invoke(self, ctx: click.Context) -> Any:
        """Run, and report expected failures in one line with exit code 1."""
        try:
            return super().invoke(ctx)
        except MatteserveError as exc:
            raise click.ClickException(str(exc)) from exc
        except ModuleNotFoundError as exc:
            name = ctx.invoked_subcommand or ""
            entry = _ENTRIES.get(name)
            if entry is None or not _is_optional(entry, exc):
                raise
            raise _missing_module(name, entry, exc) from exc


def _is_optional(entry: _Entry, exc: ModuleNotFoundError) -> bool:
    root = (exc.name or "").partition(".")[0]
    return root.startswith("matteserve_") or bool(entry.extra)


def _missing_module(name: str, entry: _Entry, exc: ModuleNotFoundError) -> click.ClickException:
    if (exc.name or "").startswith("matteserve_"):
        return click.ClickException(f"`matteserve {name}` is not part of this installation ({exc.name} is missing)")
    if not entry.extra:
        return click.ClickException(f"`matteserve {name}` needs the module {exc.name!r}, which is not installed")
    return click.ClickException(
        f"`matteserve {name}` needs the extra [{entry.extra}], module {exc.name!r} is not installed: "
        f"pip install 'matteserve[{entry.extra}]'"
    )


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="matteserve")
def cli() -> None:
    """Background removal as a service: a Triton server, its models, and a thin client.

    \b
    Examples:
      matteserve demo
      matteserve serve
      matteserve remove photo.jpg -o cutout.png
    """


def main() -> None:
    """Entry point of the `matteserve` command."""
    cli(prog_name="matteserve")


if __name__ == "__main__":
    main()
