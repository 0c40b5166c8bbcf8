"""The command `matteserve verify`."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
from numpy.typing import NDArray

from matteserve_export._errors import ExportError

if TYPE_CHECKING:
    from matteserve_export.compare import EngineParity
    from matteserve_export.verification import Engines

__all__ = ["verify"]

_FOLDER = click.Path(file_okay=False, path_type=Path)
_GENERATED = 8
_SHEET_ROWS = 6
_PEAKS = 10


@click.command()
@click.argument("model")
@click.option(
    "--engine",
    "wanted",
    multiple=True,
    metavar="ENGINE",
    help="Engine to verify, e.g. onnx_fp16; may be repeated.  [default: all of the model]",
)
@click.option("--images", "directory", type=_FOLDER, help="Directory of pictures.  [default: generated scenes]")
@click.option("--limit", type=click.IntRange(1), default=64, show_default=True, help="Most pictures to take.")
@click.option(
    "--model-repository", type=_FOLDER, default=Path("model_repository"), show_default=True, help="Where the files are."
)
@click.option("--address", metavar="HOST:PORT", help="Ask this server instead of running the files here.")
@click.option(
    "--timeout-s", type=click.FloatRange(0, min_open=True), default=120.0, show_default=True, help="For each answer."
)
@click.option(
    "--contact-sheet", type=click.Path(dir_okay=False, path_type=Path), help="Write a picture of the worst pictures."
)
@click.option("--peaks", is_flag=True, help="List the largest activations of the FP32 graph.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def verify(
    model: str,
    wanted: tuple[str, ...],
    directory: Path | None,
    limit: int,
    model_repository: Path,
    address: str | None,
    timeout_s: float,
    contact_sheet: Path | None,
    peaks: bool,
    as_json: bool,
) -> None:
    """Compare a model's engines with its FP32 ONNX engine; exit with 1 if one fails.

    MODEL is the name that clients call. Without --address, ONNX engines are run in this process on the CPU: as they
    are, and with every node's result rounded as a GPU stores it. With --address, the server's engines are asked, plans
    too. Each is given single pictures and batches.

    \b
    Examples:
        matteserve verify birefnet --images photos --contact-sheet worst.png
        matteserve verify birefnet --engine trt_fp16 --address localhost:8001
    """
    if peaks and address:
        raise click.UsageError("--peaks looks into the FP32 graph's file; leave out --address")
    from matteserve_export.verification import EngineFiles, ServedEngines, engine_names, verify_engine

    with ExitStack() as stack:
        engines: Engines
        if address is None:
            engines = EngineFiles(model_repository, model)
        else:
            from matteserve_client import GrpcTransport

            try:
                transport = GrpcTransport(address)
            except ValueError as exc:
                raise click.BadParameter(str(exc), param_hint="--address") from exc
            stack.callback(transport.close)
            engines = ServedEngines(transport, model, timeout_s=timeout_s)
        names = engine_names(model, wanted) or engines.names()
        if not names and not peaks:
            raise ExportError(
                f"{model} has no engine but {engines.reference}, with which the others are compared; "
                "`matteserve build` makes some"
            )
        images = _images(engines, directory, limit)
        reference_run = engines.open_reference()
        found = {name: verify_engine(engines, name, images, reference_run) for name in names}
        outcomes = [outcome for name in names for outcome in found[name]]
        if contact_sheet is not None and outcomes:
            _write_sheet(contact_sheet, engines, found, images)
    listed = _peaks(engines, images) if peaks else []
    if not listed and any(outcome.not_finite for outcome in outcomes):
        listed = [peak for peak in _peaks(engines, images) if peak["note"]]  # what may have overflowed
    if as_json:
        engine_of = [name for name in names for _ in found[name]]
        click.echo(
            json.dumps(
                {
                    "model": model,
                    "reference": engines.reference,
                    "images": str(directory) if directory else "generated scenes",
                    "engines": [{"engine": e, **o.to_dict()} for e, o in zip(engine_of, outcomes, strict=True)],
                    "peaks": listed,
                },
                indent=2,
            )
        )
    else:
        if outcomes:
            click.echo(_table(outcomes))
        for outcome in outcomes:
            for violation in outcome.violations:
                click.echo(f"{outcome.name} ({outcome.method}): {violation}")
        for peak in listed:
            click.echo(f"peak {peak['peak']:<10.5g} {peak['operator']} {peak['node']}{peak['note']}")
    if not all(outcome.passed for outcome in outcomes):
        raise click.exceptions.Exit(1)


def _images(engines: Engines, directory: Path | None, limit: int) -> NDArray[np.uint8]:
    """The user's pictures at the model's size, or made up ones."""
    from matteserve_export.compare import make_scenes
    from matteserve_export.pictures import read_pictures

    contract = engines.contract(engines.reference)
    if directory is not None:
        return read_pictures(directory, contract, limit)
    click.echo(
        f"comparing on {min(limit, _GENERATED)} generated scenes; your own pictures say more: --images DIRECTORY",
        err=True,
    )
    return make_scenes(min(limit, _GENERATED), contract.height, contract.width)


def _write_sheet(
    path: Path, engines: Engines, found: dict[str, tuple[EngineParity, ...]], images: NDArray[np.uint8]
) -> None:
    """Run the worst pictures of the worst outcome again, to show them."""
    from matteserve_export.compare import alpha_of
    from matteserve_export.contact_sheet import write_contact_sheet

    name, number = max(
        ((name, number) for name, outcomes in found.items() for number in range(len(outcomes))),
        key=lambda place: found[place[0]][place[1]].difference.mean_abs,
    )
    outcome = found[name][number]
    _, open_run = engines.open(name).runs[number]
    run = open_run()
    reference_run = engines.open_reference()
    worst = sorted(range(len(images)), key=lambda i: -outcome.per_image[i])[:_SHEET_ROWS]
    chosen = images[worst]
    write_contact_sheet(
        path,
        chosen,
        np.concatenate([alpha_of(reference_run, image[None]) for image in chosen]),
        np.concatenate([alpha_of(run, image[None]) for image in chosen]),
        [f"picture {i}: mean {outcome.per_image[i] * 255:.2f}/255" for i in worst],
        outcome.line(),
    )
    click.echo(f"contact sheet: {path}", err=True)


def _peaks(engines: Engines, images: NDArray[np.uint8]) -> list[dict[str, Any]]:
    """The largest activations, as plain data; the first four pictures tell."""
    from matteserve_export.emulate import activation_peaks, note
    from matteserve_export.verification import EngineFiles

    if not isinstance(engines, EngineFiles):
        return []
    peaks = activation_peaks(engines.reference_graph(), images[:4])[:_PEAKS]
    return [{"node": p.node, "operator": p.operator, "peak": p.peak, "note": note(p)} for p in peaks]


def _table(outcomes: list[EngineParity]) -> str:
    """One line an outcome; differences in levels of 255."""
    rows: list[tuple[str, ...]] = [
        ("RESULT", "ENGINE", "METHOD", "BATCH", "MAX", "99.9 %", "MEAN", "IOU", "FLAT", "NOT FINITE")
    ]
    for outcome in outcomes:
        figures, bounds = outcome.difference, outcome.tolerance
        levels = [
            f"{getattr(figures, name) * 255:.{digits}f} (≤ {getattr(bounds, name) * 255:.3g})"
            for name, digits in (("max_abs", 0), ("p999_abs", 0), ("mean_abs", 3))
        ]
        rows.append(
            (
                "PASSED" if outcome.passed else "FAILED",
                outcome.name.split(" vs ")[0],
                outcome.method,
                "+".join(map(str, outcome.batch_sizes)),
                *levels,
                f"{figures.iou:.4f} (≥ {bounds.min_iou:.4g})",
                f"{figures.flat}/{figures.images}",
                "-" if outcome.not_finite is None else f"{outcome.not_finite:.2%}",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
