"""`matteserve remove`: files in, cut-outs out."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import click
from PIL import ImageColor

from matteserve_client._client import DEFAULT_ADDRESS, DEFAULT_TIMEOUT_S, Client
from matteserve_client._encode import SUFFIXES
from matteserve_client._errors import MatteserveError
from matteserve_client._images import ImageSource
from matteserve_client._postprocess import Matte
from matteserve_client._preprocess import Parity

_IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif"}
_STDIO = "-"


@dataclass
class _Job:
    """One picture: where it comes from, where it goes, and what became of it."""

    source: str
    target: str
    size: tuple[int, int] | None = None  # (height, width)
    error: str | None = None

    def report(self) -> dict[str, Any]:
        height, width = self.size or (None, None)
        output = None if self.error else self.target
        return {"input": self.source, "output": output, "height": height, "width": width, "error": self.error}


class _Encoded(NamedTuple):
    """A picture that is ready to be written, or why it could not be encoded."""

    size: tuple[int, int]  # (height, width)
    data: bytes
    error: str = ""


@click.command()
@click.argument("inputs", nargs=-1, required=True, metavar="INPUT...")
@click.option("-o", "--output", metavar="FILE|DIR", help="Where to write; by its suffix PNG, WebP, TIFF or JPEG.")
@click.option("--model", help="Model to use; default: the only one that the server has loaded.")
@click.option("--address", default=DEFAULT_ADDRESS, show_default=True, help="host:port of the server's gRPC endpoint.")
@click.option("--timeout-s", type=click.FloatRange(0, min_open=True), default=DEFAULT_TIMEOUT_S, show_default=True)
@click.option("--in-flight", type=click.IntRange(1), default=8, show_default=True, help="Most requests at once.")
@click.option("--parity", type=click.Choice(["rembg"]), help="Follow rembg's numerics (u2net, u2netp).")
@click.option("--alpha-only", is_flag=True, help="Write the alpha as a grey picture instead of the cut-out.")
@click.option("--background", metavar="COLOR", help="Put the cut-out on a colour, e.g. white or '#20a0ff'.")
@click.option("--clear-transparent", is_flag=True, help="Write black where alpha is 0: smaller, nothing to uncover.")
@click.option("--json", "as_json", is_flag=True, help="Print what was written as JSON.")
def remove(
    inputs: tuple[str, ...],
    output: str | None,
    model: str | None,
    address: str,
    timeout_s: float,
    in_flight: int,
    parity: Parity | None,
    alpha_only: bool,
    background: str | None,
    clear_transparent: bool,
    as_json: bool,
) -> None:
    """Cut out pictures on a running server.

    INPUT is a file, a folder (its pictures, not those of its subfolders) or - for standard input. Without -o the
    cut-out of photo.jpg is photo.cutout.png beside it, and that of standard input goes to standard output. Several
    inputs or a folder need a folder as -o, which is made. An input is never overwritten, and a picture that fails
    does not stop the others: the exit code is then 1.

    \b
    Examples:
      matteserve remove photo.jpg
      matteserve remove photo.jpg -o cutout.webp --model u2netp
      matteserve remove shop/ extra.png -o cutouts/
      matteserve remove photo.jpg -o flat.jpg --background white
      cat photo.jpg | matteserve remove - > cutout.png
    """
    if alpha_only and background is not None:
        raise click.UsageError("--alpha-only and --background exclude each other")
    colour = _parse_colour(background)
    jobs = _plan(inputs, output, "alpha" if alpha_only else "cutout", opaque=alpha_only or colour is not None)
    to_stdout = any(job.target == _STDIO for job in jobs)
    if to_stdout and as_json:
        raise click.UsageError("standard output takes either the picture or --json; give -o a file")
    try:
        client = Client(address, model=model, timeout_s=timeout_s, parity=parity)
    except ValueError as exc:
        raise click.BadParameter(str(exc), param_hint="--address") from exc
    todo = [job for job in jobs if job.error is None]
    format_name = SUFFIXES[_suffix(jobs[0].target)]  # several outputs are all PNG

    def encode(matte: Matte) -> _Encoded:
        try:
            data = matte.encode(
                format_name, alpha_only=alpha_only, background=colour, clear_transparent=clear_transparent
            )
            return _Encoded(matte.size, data)
        except ValueError as exc:  # larger than the format can be
            return _Encoded(matte.size, b"", str(exc))

    with client, _progress(todo) as progress:
        results = client.remove_many(map(_source, todo), in_flight=in_flight, alpha_only=alpha_only, output=encode)
        for job, result in zip(progress, results, strict=False):
            _finish(job, result)
    _report(jobs, as_json, to_stdout)


def _progress(jobs: list[_Job]) -> AbstractContextManager[Iterable[_Job]]:
    if len(jobs) < 2:
        return nullcontext(jobs)
    return click.progressbar(jobs, label="Cutting out", file=sys.stderr)


def _report(jobs: list[_Job], as_json: bool, to_stdout: bool) -> None:
    if as_json:
        click.echo(json.dumps([job.report() for job in jobs], indent=2))
    elif not to_stdout:
        for job in jobs:
            if job.error is None:
                click.echo(job.target)
    failed = [job for job in jobs if job.error is not None]
    if len(failed) == 1 == len(jobs):
        raise click.ClickException(str(failed[0].error))
    if failed:
        lines = "".join(f"\n  {job.error}" for job in failed)
        raise click.ClickException(f"{len(failed)} of {len(jobs)} pictures failed:{lines}")


def _parse_colour(background: str | None) -> tuple[int, int, int] | None:
    if background is None:
        return None
    try:
        return ImageColor.getrgb(background)[:3]
    except ValueError as exc:
        raise click.BadParameter(
            f"{background!r} is not a colour; e.g. white, '#20a0ff' or 'rgb(32,160,255)'", param_hint="--background"
        ) from exc


def _plan(inputs: tuple[str, ...], output: str | None, kind: str, *, opaque: bool) -> list[_Job]:
    """Pair every input with its output; a pair that cannot be carries its error."""
    if inputs.count(_STDIO) > 1:
        raise click.UsageError("standard input can be read once only")
    sources = list(_expand(inputs))
    if not sources:
        raise click.UsageError(f"no pictures in {', '.join(inputs)}; looked for {' '.join(sorted(_IMAGE_SUFFIXES))}")
    into_folder = (
        output is not None
        and output != _STDIO
        and (len(sources) > 1 or output.endswith(("/", os.sep)) or Path(output).is_dir() or Path(inputs[0]).is_dir())
    )
    if len(sources) > 1 and output == _STDIO:
        raise click.UsageError("several pictures do not fit on standard output; give -o a folder")
    if into_folder and output is not None:
        if Path(output).exists() and not Path(output).is_dir():
            raise click.UsageError(f"several inputs need a folder as -o, {output} is a file")
        if not Path(output).exists() and _suffix(output) in SUFFIXES:
            raise click.UsageError(f"several inputs need a folder as -o, {output} looks like a file; add a / if not")
    if output is None and (len(sources) > 1 or Path(inputs[0]).is_dir()):
        raise click.UsageError("several inputs, or a folder, need a folder as -o")
    reserved = {_real(source): source for source in sources if source != _STDIO}
    jobs = []
    for source in sources:
        job = _Job(source, _target(source, output, kind, into_folder=into_folder))
        if job.target != _STDIO:
            _check_suffix(job.target, opaque=opaque)
            owner = reserved.setdefault(_real(job.target), "")
            if owner:
                job.error = f"{source}: {job.target} is an input, or the output of another; give another -o"
            else:
                reserved[_real(job.target)] = source
        jobs.append(job)
    return jobs


def _expand(inputs: tuple[str, ...]) -> Iterator[str]:
    for name in inputs:
        if name != _STDIO and Path(name).is_dir():
            found = (path for path in Path(name).iterdir() if path.suffix.lower() in _IMAGE_SUFFIXES)
            yield from sorted(str(path) for path in found if path.is_file() and not path.name.startswith("."))
        else:
            yield name


def _target(source: str, output: str | None, kind: str, *, into_folder: bool) -> str:
    stem = "stdin" if source == _STDIO else Path(source).stem
    if into_folder and output is not None:
        return str(Path(output) / f"{stem}.png")
    if output is not None:
        return output
    return _STDIO if source == _STDIO else str(Path(source).with_name(f"{stem}.{kind}.png"))


def _check_suffix(target: str, *, opaque: bool) -> None:
    if _suffix(target) not in SUFFIXES:
        raise click.UsageError(f"{target}: the suffix must be one of {' '.join(SUFFIXES)}")
    if SUFFIXES[_suffix(target)] == "jpeg" and not opaque:
        raise click.UsageError(f"{target}: JPEG has no transparency; use .png or .webp, or give --background a colour")


def _suffix(target: str) -> str:
    return ".png" if target == _STDIO else Path(target).suffix.lower()


def _real(name: str) -> str:
    return os.path.realpath(name)


def _source(job: _Job) -> ImageSource:
    return sys.stdin.buffer.read() if job.source == _STDIO else job.source


def _finish(job: _Job, result: _Encoded | MatteserveError) -> None:
    if isinstance(result, MatteserveError):
        text = str(result)
        job.error = text if job.source in text else f"{job.source}: {text}"
        return
    job.size = result.size
    reason = result.error
    if not reason:
        try:
            _write(result.data, job.target)
        except OSError as exc:
            reason = exc.strerror or str(exc)
    if reason:
        job.error = f"{job.source}: cannot write {job.target}: {reason}"


def _write(data: bytes, target: str) -> None:
    """Put the whole file in place at once."""
    if target == _STDIO:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
        return
    path = Path(target)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        # Opened plainly, so that the file gets the permissions that the user's umask gives.
        partial.write_bytes(data)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
