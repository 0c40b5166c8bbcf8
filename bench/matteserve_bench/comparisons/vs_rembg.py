"""rembg and matteserve, interleaved in one run: pictures/s, latency, memory, and how far the masks differ."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
from PIL import Image

from matteserve_bench.comparisons.models import PreparedModel, prepare_model
from matteserve_bench.comparisons.pictures import PictureFile, make_pictures, some
from matteserve_bench.comparisons.processes import (
    ComparisonError,
    MemoryWatch,
    Worker,
    cpu_seconds,
    rembg_environment,
    rembg_server,
)
from matteserve_client import alpha_difference
from matteserve_server import EmbeddedServer, ServerOptions

REMBG, REMBG_HTTP = "rembg remove()", "rembg s"
# rembg's files are black where nothing is seen; ours keep the picture's colours there unless told otherwise.
OURS, OURS_CLEARED = "matteserve", "matteserve, clear_transparent"
# For many requests at once: as many instances as cores, one thread each, and no batches.
OURS_PER_CORE = "matteserve, an instance a core, clear_transparent"
BARE, TENSORS = "bare session", "matteserve, tensors"


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes:
        pictures: How many of the pictures, by model; the slow ones get fewer.
        concurrencies: Pictures under way at once; what is more than there are pictures is left out.
        rounds: Parts that the pictures are dealt into; in each, every side has its turn. One where parts would have
            fewer pictures than are to be under way.
        masks: Pictures whose masks are compared.
        tensors: Inferences of each turn of the bare session and of the server alone, at most two a picture.
        tensor_turns: How many of those turns.
    """

    pictures: Mapping[str, int] = field(
        default_factory=lambda: {"u2netp": 32, "u2net": 16, "isnet": 10, "birefnet_lite": 4, "birefnet": 2}
    )
    concurrencies: tuple[int, ...] = (1, 4, 8)
    rounds: int = 2
    masks: int = 8
    tensors: int = 16
    tensor_turns: int = 3

    @classmethod
    def quick(cls) -> Plan:
        """A look in about two minutes."""
        return cls({"u2netp": 12, "u2net": 6, "isnet": 4, "birefnet_lite": 2, "birefnet": 1}, (1, 8), 1, 3, 6, 2)


@dataclass
class Turns:
    """What one side did at one concurrency.

    Attributes:
        images: Pictures that it finished.
        seconds: Time that its turns took together.
        latencies_s: One a picture, in the order of `megapixels`.
        megapixels: Sizes of the pictures.
        rates: Images per second of each turn.
        bytes_out: Bytes of all outputs.
        cpu_s: CPU time of all its processes, server and client.
        peak_bytes: Most memory that its processes had.
        errors: What failed.
    """

    images: int = 0
    seconds: float = 0.0
    latencies_s: list[float] = field(default_factory=list)
    megapixels: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    bytes_out: int = 0
    cpu_s: float = 0.0
    peak_bytes: int = 0
    errors: list[str] = field(default_factory=list)

    def add(self, answer: Mapping[str, Any], pictures: Sequence[PictureFile], peak_bytes: int, cpu_s: float) -> None:
        """Count one turn in."""
        records = answer["records"]
        good = [record for record in records if not record[3]]
        self.images += len(good)
        self.seconds += answer["seconds"]
        self.rates.append(len(good) / answer["seconds"])
        self.latencies_s += [record[1] - record[0] for record in good]
        self.megapixels += [
            picture.megapixels for picture, record in zip(pictures, records, strict=True) if not record[3]
        ]
        self.bytes_out += sum(record[2] for record in good)
        self.cpu_s += cpu_s
        self.peak_bytes = max(self.peak_bytes, peak_bytes)
        self.errors += [record[3] for record in records if record[3]]

    def row(self) -> dict[str, Any]:
        """The figures that are reported."""
        latencies = np.sort(self.latencies_s) if self.latencies_s else np.array([np.nan])
        return {
            "images": self.images,
            "images_per_s": self.images / self.seconds if self.seconds else 0.0,
            "megapixels_per_s": sum(self.megapixels) / self.seconds if self.seconds else 0.0,
            "p50_ms": 1000 * float(latencies[(len(latencies) - 1) // 2]),
            "p99_ms": 1000 * float(latencies[max(0, int(np.ceil(0.99 * len(latencies))) - 1)]),
            "peak_mb": self.peak_bytes / 1e6,
            "bytes_per_pixel": self.bytes_out / (1e6 * sum(self.megapixels)) if self.megapixels else 0.0,
            "cpu_s_per_image": self.cpu_s / self.images if self.images else 0.0,
            "rates": self.rates,
            "errors": self.errors,
        }


@dataclass
class _Side:
    name: str
    worker: Worker
    processes: list[int]


def compare(models: Sequence[str], plan: Plan, cache: Path, rembg_python: str, *, http: bool) -> dict[str, Any]:
    """Run the whole comparison.

    Args:
        models: Keys of `models.REMBG_NAMES`.
        plan: How much.
        cache: Folder for pictures and models.
        rembg_python: Interpreter that has rembg.
        http: Whether `rembg s` takes part.

    Returns:
        By model: `throughput`, `masks`, `serving`.
    """
    pictures = make_pictures(cache / "pictures")
    results = {}
    for name in models:
        click.echo(f"{name}: preparing", err=True)
        prepared = prepare_model(name, cache)
        chosen = some(pictures, plan.pictures[name])
        with ExitStack() as stack:
            sides = _start(stack, prepared, cache, rembg_python, http)
            throughput = list(_throughput(name, sides[:-2], chosen, plan))
            masks = _masks(stack, sides, prepared, chosen, plan)
            serving = _serving(name, sides[-2:], chosen, plan)
        results[name] = {"throughput": throughput, "masks": masks, "serving": serving}
    return results


def _start(stack: ExitStack, model: PreparedModel, cache: Path, rembg_python: str, http: bool) -> list[_Side]:
    environment = rembg_environment(cache / "rembg")
    names = {"model": model.rembg_name}
    worker = stack.enter_context(Worker("rembg", names, python=rembg_python, environment=environment))
    sides = [_Side(REMBG, worker, [worker.pid])]
    if http:
        port, pid = stack.enter_context(rembg_server(rembg_python, environment))
        worker = stack.enter_context(Worker("rembg-http", {**names, "port": port}))
        sides.append(_Side(REMBG_HTTP, worker, [pid, worker.pid]))
    per_core = stack.enter_context(_server(model.name, model.per_core_repository))
    options = {"model": model.name, "address": per_core.address, "clear_transparent": True}
    worker = stack.enter_context(Worker("matteserve", options))
    sides.append(_Side(OURS_PER_CORE, worker, [per_core.process.pid, worker.pid]))
    server = stack.enter_context(_server(model.name, model.repository))
    target = {"model": model.name, "address": server.address}
    worker = stack.enter_context(Worker("matteserve", {**target, "clear_transparent": True}))
    sides.append(_Side(OURS_CLEARED, worker, [server.process.pid, worker.pid]))
    worker = stack.enter_context(Worker("matteserve", target))
    sides.append(_Side(OURS, worker, [server.process.pid, worker.pid]))
    worker = stack.enter_context(Worker("bare", {"path": str(model.serving_onnx)}))
    sides.append(_Side(BARE, worker, [worker.pid]))
    worker = stack.enter_context(Worker("tensors", target))
    sides.append(_Side(TENSORS, worker, [server.process.pid, worker.pid]))
    return sides


def _server(model: str, repository: Path) -> EmbeddedServer:
    # Without probes of idle models: they would take CPU time from the others' turns, and in ours there are none.
    return EmbeddedServer(ServerOptions(repository, (model,), grpc_port=0, metrics_port=None, probe_interval_s=0))


def _throughput(
    model: str, sides: Sequence[_Side], pictures: Sequence[PictureFile], plan: Plan
) -> Iterator[dict[str, Any]]:
    smallest = min(pictures, key=lambda picture: picture.megapixels)
    for side in sides:  # the first inference of a session allocates
        side.worker.run([smallest.path] * 2, 2)
    for concurrency in (number for number in plan.concurrencies if number <= len(pictures)):
        turns = {side.name: Turns() for side in sides}
        rounds = plan.rounds if len(pictures) >= plan.rounds * concurrency else 1
        for part in range(rounds):
            dealt = pictures[part::rounds]
            for side in _rotated(sides, part):
                click.echo(f"{model}: {concurrency} at once, part {part + 1}: {side.name}", err=True)
                before = cpu_seconds(side.processes)
                with MemoryWatch(side.processes) as memory:
                    answer = side.worker.run([picture.path for picture in dealt], concurrency)
                turns[side.name].add(answer, dealt, memory.peak_bytes, cpu_seconds(side.processes) - before)
        for name, done in turns.items():
            yield {"side": name, "concurrency": concurrency, **done.row()}


def _masks(
    stack: ExitStack, sides: Sequence[_Side], model: PreparedModel, pictures: Sequence[PictureFile], plan: Plan
) -> dict[str, Any]:
    """Differences of the alphas of the cut-outs against rembg's: ours by default, and with rembg's numerics."""
    chosen = [picture for picture in pictures if picture.megapixels < 3][: plan.masks]
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    ours = next(side for side in sides if side.name == OURS)
    theirs = _alphas(sides[0].worker, chosen, folder / "rembg")
    differences = {"default": _difference(_alphas(ours.worker, chosen, folder / "default"), theirs)}
    with (
        _server(model.name, model.rembg_repository) as server,
        Worker("matteserve", {"model": model.name, "address": server.address}) as worker,
    ):
        same = _alphas(worker, chosen, folder / "same")
    return {**differences, "rembg's numerics": _difference(same, theirs)}


def _alphas(worker: Worker, pictures: Sequence[PictureFile], folder: Path) -> list[Any]:
    folder.mkdir()
    answer = worker.run([picture.path for picture in pictures], 1, keep=folder)
    if errors := [record[3] for record in answer["records"] if record[3]]:
        raise ComparisonError(f"{worker.side}: {errors[0]}")
    paths = [folder / f"{picture.path.stem}.png" for picture in pictures]
    return [np.asarray(Image.open(io.BytesIO(path.read_bytes())).getchannel("A")) for path in paths]


def _difference(ours: list[Any], theirs: list[Any]) -> dict[str, float]:
    each = [alpha_difference(a[None], b[None]) for a, b in zip(ours, theirs, strict=True)]
    return {
        "max": max(255 * one.max_abs for one in each),
        "p999": max(255 * one.p999_abs for one in each),
        "mean": float(np.mean([255 * one.mean_abs for one in each])),
        "iou": min(one.iou for one in each),
        "pictures": len(each),
    }


def _serving(model: str, sides: Sequence[_Side], pictures: Sequence[PictureFile], plan: Plan) -> dict[str, float]:
    """Inferences per second of a bare session, one after the other, and through the server, two under way."""
    paths = [pictures[-1].path]
    rates: dict[str, list[float]] = {side.name: [] for side in sides}
    for turn in range(plan.tensor_turns + 1):
        for side in _rotated(sides, turn):
            click.echo(f"{model}: tensors, turn {turn}: {side.name}", err=True)
            count = min(plan.tensors, 2 * len(pictures)) if turn else 2
            answer = side.worker.run(paths * count, 1 if side.name == BARE else 2)
            if turn:  # the first one warms up
                rates[side.name].append(count / answer["seconds"])
    bare, served = (float(np.median(rates[name])) for name in (BARE, TENSORS))
    ratios = [a / b for a, b in zip(rates[BARE], rates[TENSORS], strict=True)]
    return {"bare_per_s": bare, "served_per_s": served, "tax": float(np.median(ratios)) - 1, "session_ms": 1000 / bare}


def _rotated(sides: Sequence[_Side], by: int) -> list[_Side]:
    by %= len(sides)
    return [*sides[by:], *sides[:by]]


def table(results: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    lines = []
    for model, result in results.items():
        lines += [
            f"**{model}**",
            "",
            "| at once | side | images/s | vs. remove() | p50 ms | p99 ms | CPU s/image | peak MB | bytes/pixel |",
            "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
        base = {row["concurrency"]: row for row in result["throughput"] if row["side"] == REMBG}
        for row in result["throughput"]:
            reference = base[row["concurrency"]]
            ratio = row["images_per_s"] / reference["images_per_s"] if reference["images_per_s"] else float("nan")
            failed = f", {len(row['errors'])} failed" if row["errors"] else ""
            figures = [
                f"{row['images_per_s']:.2f}",
                f"{ratio:.2f}",
                f"{row['p50_ms']:.0f}",
                f"{row['p99_ms']:.0f}",
                f"{row['cpu_s_per_image']:.2f}",
                f"{row['peak_mb']:.0f}",
                f"{row['bytes_per_pixel']:.2f}",
            ]
            lines.append(f"| {row['concurrency']} | {row['side']}{failed} | {' | '.join(figures)} |")
        lines.append("")
        for mode, found in result["masks"].items():
            lines.append(
                f"Masks of {found['pictures']} pictures, {mode}, against rembg's, in steps of 1/255: at most "
                f"{found['max']:.0f}, 99.9 % within {found['p999']:.0f}, mean {found['mean']:.2f}; IoU at least "
                f"{found['iou']:.4f}."
            )
        serving = result["serving"]
        floor = {concurrency: serving["bare_per_s"] / row["images_per_s"] for concurrency, row in base.items()}
        lines += [
            "",
            "A bare session, with nothing read, decoded or encoded, would be "
            + ", ".join(f"{ratio:.2f} times remove() at {concurrency}" for concurrency, ratio in floor.items())
            + " at once.",
            "",
            f"Serving tax: a bare session {serving['bare_per_s']:.2f}/s ({serving['session_ms']:.0f} ms), through the "
            f"server {serving['served_per_s']:.2f}/s: {100 * serving['tax']:+.1f} % of time.",
            "",
        ]
    return "\n".join(lines)


__all__ = ["Plan", "Turns", "compare", "table"]
