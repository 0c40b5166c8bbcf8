"""A picture of the worst: what went in, what should come out, what came out, and where they differ."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from matteserve_bench._errors import EvaluationError
from matteserve_client import MatteserveError
from matteserve_client._images import load_picture

if TYPE_CHECKING:
    from matteserve_bench.evaluation.measures import Measure
    from matteserve_bench.evaluation.run import Row

TILE = 224
"""Longer side of a tile in pixels."""

_MARGIN = 8
_TEXT = 20  # height of a line
_INK, _PAPER, _GREY = (32, 32, 32), (255, 255, 255), (200, 200, 200)
_HEADS = ("picture", "mask", "alpha", "red: too much, blue: too little")


@dataclass(frozen=True)
class Tiles:
    """One alpha and its mask at the size of a contact sheet.

    Attributes:
        mask: Shape (h, w), uint8.
        alpha: Same shape, uint8.
        difference: Shape (h, w, 3), uint8 RGB: white where both agree, red where alpha is too large, blue where it is
            too small. The largest of the pixels that one stands for, so that a single bad one stays visible.
    """

    mask: NDArray[np.uint8]
    alpha: NDArray[np.uint8]
    difference: NDArray[np.uint8]


def make_tiles(alpha: NDArray[np.uint8], mask: NDArray[np.float32]) -> Tiles:
    """Shrink an alpha and its mask.

    Args:
        alpha: Shape (H, W), uint8.
        mask: Same shape, float32 in [0, 1].
    """
    true = np.rint(mask * 255).astype(np.uint8)
    size = _tile_size(alpha.shape[1], alpha.shape[0])
    excess = _shrink_by_maximum(np.where(alpha > true, alpha - true, np.uint8(0)), size)
    lack = _shrink_by_maximum(np.where(true > alpha, true - alpha, np.uint8(0)), size)
    difference = np.uint8(255) - np.stack([lack, np.maximum(excess, lack), excess], axis=-1)
    return Tiles(_shrink(true, size), _shrink(alpha, size), difference)


class Worst:
    """Keeps the worst rows of each model, and nothing of the others.

    Args:
        count: Rows to keep.
        measure: By which.
    """

    def __init__(self, count: int, measure: Measure) -> None:
        self.measure = measure
        self._count, self._order = count, itertools.count()
        self._heaps: dict[str, list[tuple[float, int, Row]]] = {}

    def offer(self, row: Row) -> None:
        """Keep a row if it is among the worst so far; of equal ones the first stays."""
        if row.error is not None or not self._count:
            return
        heap = self._heaps.setdefault(row.model, [])
        value = row.figures[self.measure.key]
        badness = -value if self.measure.higher_is_better else value
        entry = badness, -next(self._order), row
        if len(heap) < self._count:
            heapq.heappush(heap, entry)
        else:
            heapq.heappushpop(heap, entry)

    def rows(self) -> Mapping[str, Sequence[Row]]:
        """By model, the worst first."""
        return {model: [row for _, _, row in sorted(heap, reverse=True)] for model, heap in self._heaps.items()}


def write_contact_sheet(path: Path, worst: Worst, captions: Sequence[Measure]) -> None:
    """Write a sheet with a line for each kept row: picture | mask | alpha | difference.

    Args:
        path: PNG to write.
        worst: What to show.
        captions: Measures that stand under each line.

    Raises:
        EvaluationError: The file cannot be written.
    """
    sections = worst.rows()
    rows = sum(map(len, sections.values()))
    column, line = TILE + _MARGIN, TILE + _MARGIN + _TEXT
    size = _MARGIN + len(_HEADS) * column, _MARGIN + 2 * _TEXT * len(sections) + line * rows
    sheet = Image.new("RGB", size, _PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    top = _MARGIN
    for model, kept in sections.items():
        draw.text((_MARGIN, top), f"{model}: the {len(kept)} worst by {worst.measure.key}", _INK, font)
        for number, head in enumerate(_HEADS):
            draw.text((_MARGIN + number * column, top + _TEXT), head, _INK, font)
        top += 2 * _TEXT
        for row in kept:
            for number, tile in enumerate(_pictures(row)):
                left = _MARGIN + number * column
                sheet.paste(tile, (left, top))
                draw.rectangle((left - 1, top - 1, left + tile.width, top + tile.height), outline=_GREY)
            figures = ", ".join(f"{m.key} {row.figures[m.key]:.{m.digits}f}" for m in captions)
            draw.text((_MARGIN, top + TILE + 2), f"{row.pair.name}: {figures}", _INK, font)
            top += line
    try:
        sheet.save(path)
    except (OSError, ValueError) as exc:
        raise EvaluationError(f"{path}: the contact sheet cannot be written: {exc}") from exc


def _pictures(row: Row) -> list[Image.Image]:
    assert row.tiles is not None
    tiles = row.tiles
    height, width = tiles.mask.shape
    try:
        # A smaller decode where the format has one: only a tile of it is needed.
        picture = load_picture(row.pair.image, at_least=TILE).image.resize((width, height), reducing_gap=2.0)
    except MatteserveError:  # gone since; the rest is still worth showing
        picture = Image.new("RGB", (width, height), _GREY)
    return [picture, *map(Image.fromarray, (tiles.mask, tiles.alpha, tiles.difference))]


def _tile_size(width: int, height: int) -> tuple[int, int]:
    """(width, height) that fits into a tile; small pictures stay as they are."""
    scale = min(1.0, TILE / max(width, height))
    return max(1, round(width * scale)), max(1, round(height * scale))


def _shrink(array: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    return np.asarray(Image.fromarray(array).resize(size, Image.Resampling.BOX))


def _shrink_by_maximum(array: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """Resize to (width, height) so that each new pixel is the largest of those it stands for."""
    width, height = size
    rows = np.linspace(0, array.shape[0], height, endpoint=False).astype(int)
    columns = np.linspace(0, array.shape[1], width, endpoint=False).astype(int)
    return np.maximum.reduceat(np.maximum.reduceat(array, rows, axis=0), columns, axis=1)
