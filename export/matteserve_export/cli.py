"""The commands `matteserve export`, `matteserve pull` and `matteserve weights`.

Results go to stdout, progress and logs to stderr. torch and onnx are imported by the command that needs them.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from matteserve_client import MatteserveError
from matteserve_client._contract import Numerics
from matteserve_export._errors import ExportError
from matteserve_export.pull import PullConfig, cache_directory, find_cached
from matteserve_export.pull import pull as pull_weights
from matteserve_export.weights import REGISTRY, PatchOrder, SourceKind, Weights, find_weights

if TYPE_CHECKING:
    from matteserve_export.pipeline import InputKind

__all__ = ["export", "pull", "weights"]

_DEMO_WEIGHTS = Path(__file__).resolve().parents[1] / "demo_weights"
_FILE = click.Path(dir_okay=False, path_type=Path)
_FOLDER = click.Path(file_okay=False, path_type=Path)
_ACCEPT = click.option(
    "--accept-non-commercial", is_flag=True, help="Take weights whose licence forbids commercial use."
)
_HEADER = ("name", "architecture", "size", "pull", "licence", "patch order", "note")
_MARKDOWN_HEADER = ("Weights", "Architecture", "Input", "`matteserve pull`", "Licence", "Patch order", "Note")
_OPERATORS_SHOWN = 6


def _parse_size(_context: click.Context, _parameter: click.Parameter, value: str | None) -> tuple[int, int] | None:
    """`320`, or height x width as `320x512`."""
    if value is None:
        return None
    height, _, width = value.partition("x")
    try:
        return int(height), int(width or height)
    except ValueError as exc:
        raise click.BadParameter(f"{value!r} is not a size; write 320, or height x width: 320x512") from exc


@click.command()
@click.argument("name")
@click.option("--weights", "checkpoint", type=_FILE, help="A .pth, .pt or .safetensors of these weights.")
@click.option("--onnx", "onnx_path", type=_FILE, help="A float32 .onnx instead, e.g. one of rembg's assets.")
@click.option(
    "--init",
    type=click.Choice(["conformance"]),
    help="No file: weights that follow from the entries' names. Its masks mean nothing; its speed is real.",
)
@click.option(
    "--model-repository", type=_FOLDER, default=Path("model_repository"), show_default=True, help="Where to write."
)
@click.option("--name", "model", metavar="NAME", help="Name that clients will call.  [default: the weights' name]")
@click.option(
    "--size",
    callback=_parse_size,
    metavar="SIZE",
    help="Input size: 320, or height x width: 320x512.  [default: what the weights expect]",
)
@click.option(
    "--max-batch-size",
    type=click.IntRange(1, 256),
    help="Largest batch.  [default: by the cost of a picture, at most 8]",
)
@click.option(
    "--max-queue-size",
    type=click.IntRange(0, 65_536),
    default=0,
    help="Refuse requests beyond so many waiting ones; costs throughput, see docs/serving.md.  [default: no bound]",
)
@click.option(
    "--patch-order",
    type=click.Choice(["current", "legacy"]),
    help="BiRefNet: the order of image patches that the checkpoint expects.  [default: what is recorded]",
)
@click.option(
    "--numerics",
    type=click.Choice(["reference", "rembg"]),
    default="reference",
    show_default=True,
    help="Whose pre- and post-processing: the weights' authors', or rembg's, for the masks that rembg gives.",
)
@_ACCEPT
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def export(
    name: str,
    checkpoint: Path | None,
    onnx_path: Path | None,
    init: str | None,
    model_repository: Path,
    model: str | None,
    size: tuple[int, int] | None,
    max_batch_size: int | None,
    max_queue_size: int,
    patch_order: PatchOrder | None,
    numerics: Numerics,
    accept_non_commercial: bool,
    as_json: bool,
) -> None:
    """Make a servable model from weights, and verify it on the way.

    NAME is an entry of `matteserve weights`. Without --weights, --onnx and --init, the file that `matteserve pull NAME`
    fetched is taken. Nothing is written unless the result equals its reference.

    \b
    Examples:
        matteserve pull u2netp && matteserve export u2netp
        matteserve export birefnet_lite --weights BiRefNet_lite.safetensors --size 512
        matteserve export u2netp --onnx u2netp.onnx --name my-model
        matteserve export birefnet --init conformance    # how fast would it be here?
    """
    _log_to_stderr()
    with _errors_for_people():
        entry = find_weights(name)
        kind, path = _locate(entry, checkpoint, onnx_path, init)
        try:
            from matteserve_export.pipeline import ExportConfig, export_model
        except ModuleNotFoundError as exc:
            raise ExportError(
                f"the exporter needs {exc.name}, which is not installed: pip install 'matteserve[export]'"
            ) from exc
        result = export_model(
            ExportConfig(
                weights=entry,
                kind=kind,
                path=path,
                model_repository=model_repository,
                model=model or entry.name,
                size=size,
                max_batch_size=max_batch_size,
                max_queue_size=max_queue_size,
                patch_order=patch_order,
                numerics=numerics,
                accept_non_commercial=accept_non_commercial,
            )
        )
    if as_json:
        click.echo(json.dumps(result.to_dict(), indent=2))
        return
    contract = result.contract
    click.echo(f"model    {result.model}: {contract.height}x{contract.width}, max_batch_size {contract.max_batch_size}")
    click.echo(f"engine   {result.engine}: {result.onnx_bytes / 2**20:.1f} MiB, {result.engine_path}")
    click.echo(f"graph    {_nodes(result.nodes)}; {result.giga_macs:g} giga-MACs a picture")
    digest = f", sha256 {contract.weights_sha256}" if contract.weights_sha256 else ""
    click.echo(f"weights  {contract.weights}: licence {contract.weights_licence}{digest}")
    for comparison in result.parity:
        click.echo(comparison.line())
    click.echo(f"serve it: matteserve serve --model-repository {model_repository} --model {result.model}")


@click.command()
@click.argument("name")
@click.option("--directory", type=_FOLDER, help="Where to put the file.  [default: the cache]")
@click.option("--onnx", "want_onnx", is_flag=True, help="The published ONNX, even where there is a checkpoint.")
@_ACCEPT
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def pull(name: str, directory: Path | None, want_onnx: bool, accept_non_commercial: bool, as_json: bool) -> None:
    """Fetch released weights, check them, and keep them in the cache.

    NAME is an entry of `matteserve weights`. An interrupted download is continued. The cache is $MATTESERVE_CACHE, or
    the user's XDG cache.

    \b
    Examples:
        matteserve pull birefnet_lite
        matteserve pull u2netp --onnx
    """
    _log_to_stderr()
    with _errors_for_people():
        entry = find_weights(name)
        click.echo(f"{entry.name}: licence of the weights: {entry.weights_licence}. {entry.note}", err=True)
        kind: SourceKind | None = "onnx" if want_onnx else None
        wanted = entry.source(kind) if kind is not None else entry.downloadable
        with click.progressbar(length=(wanted and wanted.size_bytes) or 0, label=entry.name, file=sys.stderr) as bar:

            def progress(done: int, total: int | None) -> None:
                bar.length = total or 0
                bar.update(done - bar.pos)

            config = PullConfig(accept_non_commercial=accept_non_commercial)
            source, path = pull_weights(entry, directory or cache_directory(), progress, config, kind=kind)
    if as_json:
        click.echo(json.dumps({"name": entry.name, "path": str(path), **asdict(source)}, indent=2))
    else:
        click.echo(path)


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print everything that is known, as JSON.")
@click.option("--markdown", "as_markdown", is_flag=True, help="Print the table of docs/models.md.")
def weights(as_json: bool, as_markdown: bool) -> None:
    """List the known weights: size, sources, licences.

    \b
    Example:
        matteserve weights --json
    """
    if as_json:
        click.echo(json.dumps([_plain(entry) for entry in REGISTRY.values()], indent=2, ensure_ascii=False))
        return
    if as_markdown:
        rows = [_MARKDOWN_HEADER, ("---",) * len(_MARKDOWN_HEADER), *map(_markdown_row, REGISTRY.values())]
        click.echo("\n".join(f"| {' | '.join(row)} |" for row in rows))
        return
    table = [_HEADER, *(_row(entry) for entry in REGISTRY.values())]
    widths = [max(len(row[column]) for row in table) for column in range(len(_HEADER) - 1)]
    for row in table:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        click.echo("  ".join([*cells, row[-1]]).rstrip())


def _plain(entry: Weights) -> dict[str, object]:
    """An entry as plain data."""
    plain = {name: getattr(entry, name) for name in entry.__dataclass_fields__}
    sources = [asdict(source) for source in entry.sources]
    return {**plain, "options": dict(entry.options), "sources": sources}


def _row(entry: Weights) -> tuple[str, ...]:
    height, width = entry.input_size
    source = entry.downloadable
    if source is None:
        size = "by hand" if entry.sources else "none"
    else:
        size = f"{source.size_bytes / 1e6:.1f} MB" if source.size_bytes else "yes"
    return (
        entry.name,
        entry.architecture,
        f"{height}x{width}",
        size,
        entry.weights_licence + (" (non-commercial)" if entry.non_commercial else ""),
        (entry.patch_order or "unknown") if entry.has_patch_order else "",
        entry.note,
    )


def _markdown_row(entry: Weights) -> tuple[str, ...]:
    _, architecture, size, pulled, licence, order, note = _row(entry)
    pages = dict.fromkeys(source.page for source in entry.sources if source.page.startswith("https://"))
    links = " ".join(f"[{number}]({page})" for number, page in enumerate(pages, start=1))
    aliases = f"<br>{', '.join(f'`{alias}`' for alias in entry.aliases)}" if entry.aliases else ""
    return f"`{entry.name}`{aliases}", architecture, size, f"{pulled} {links}".rstrip(), licence, order, note


def _locate(
    entry: Weights, checkpoint: Path | None, onnx_path: Path | None, init: str | None
) -> tuple[InputKind, Path | None]:
    """The file to export: named by an option, bundled with the source tree, or in the cache; or none."""
    if sum(option is not None for option in (checkpoint, onnx_path, init)) > 1:
        raise ExportError("--weights, --onnx and --init exclude each other; give one of them")
    if checkpoint is not None:
        return "checkpoint", checkpoint
    if onnx_path is not None:
        return "onnx", onnx_path
    if init is not None:
        return "conformance", None
    folders = (_DEMO_WEIGHTS, cache_directory())
    for folder in folders:
        found = find_cached(entry, folder)
        if found is not None:
            return found
    if not entry.sources:
        raise ExportError(f"{entry.name}: no weights are released; give your own with --weights")
    names = " or ".join(source.file_name for source in entry.sources)
    how = f"run `matteserve pull {entry.name}`, or " if entry.downloadable else ""
    raise ExportError(
        f"{entry.name}: no {names} in {' or '.join(map(str, folders))}; {how}give the file with --weights or --onnx"
    )


def _nodes(nodes: Mapping[str, int]) -> str:
    """The number of nodes, and the operators there are most of."""
    shown = [f"{operator} {count}" for operator, count in list(nodes.items())[:_OPERATORS_SHOWN]]
    more = ", …" if len(nodes) > _OPERATORS_SHOWN else ""
    return f"{sum(nodes.values())} nodes: {', '.join(shown)}{more}"


def _log_to_stderr() -> None:
    """Show the exporter's log, and nobody else's, on stderr."""
    logger = logging.getLogger("matteserve_export")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.handlers = [handler]


@contextmanager
def _errors_for_people() -> Iterator[None]:
    """Print our own errors as one message instead of a traceback."""
    try:
        yield
    except MatteserveError as exc:
        raise click.ClickException(str(exc)) from exc
