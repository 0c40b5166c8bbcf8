"""A picture of the worst pictures: what went in, what should come out, what came out, and where they differ."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from matteserve_export._errors import ExportError

__all__ = ["GAIN", "write_contact_sheet"]

GAIN = 32
"""By how much the difference is amplified: 8 levels are white."""

_TILE = 256  # pixels
_MARGIN = 8
_TEXT = 22  # height of a line
_INK, _PAPER = (32, 32, 32), (255, 255, 255)


def write_contact_sheet(
    path: Path,
    images: NDArray[np.uint8],
    references: NDArray[np.uint8],
    answers: NDArray[np.uint8],
    captions: Sequence[str],
    title: str,
) -> None:
    """Write a sheet with one row a picture: image | reference alpha | engine's alpha | difference, amplified.

    Args:
        path: File to write; its suffix says how (PNG keeps every level).
        images: RGB, [N, H, W, 3] uint8.
        references: Alphas, [N, H, W] uint8.
        answers: Alphas in question, same shape.
        captions: One line a picture.
        title: One line above all.

    Raises:
        ExportError: The file cannot be written.
    """
    height, width = images.shape[1:3]
    scale = _TILE / max(height, width)
    tile = max(1, round(width * scale)), max(1, round(height * scale))
    column, row = tile[0] + _MARGIN, tile[1] + _MARGIN + _TEXT
    heads = ("image", "fp32 alpha", "engine's alpha", f"difference x{GAIN}")
    sheet = Image.new("RGB", (_MARGIN + len(heads) * column, _MARGIN + 2 * _TEXT + len(images) * row), _PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    draw.text((_MARGIN, _MARGIN), title.replace("|Δ|", "difference").replace("≤", "<=").replace("≥", ">="), _INK, font)
    for number, head in enumerate(heads):
        draw.text((_MARGIN + number * column, _MARGIN + _TEXT), head, _INK, font)
    for number, (image, reference, answer, caption) in enumerate(
        zip(images, references, answers, captions, strict=True)
    ):
        difference = np.maximum(reference, answer) - np.minimum(reference, answer)
        amplified = np.minimum(difference.astype(np.uint16) * GAIN, 255).astype(np.uint8)
        top = _MARGIN + 2 * _TEXT + number * row
        for place, array in enumerate((image, reference, answer, amplified)):
            # A single bad pixel must stay visible when the difference is shrunk.
            shrunk = _shrink_by_maximum(array, tile) if place == 3 else Image.fromarray(array).resize(tile)
            sheet.paste(shrunk, (_MARGIN + place * column, top))
        draw.text((_MARGIN, top + tile[1] + 2), caption, _INK, font)
    try:
        sheet.save(path)
    except (OSError, ValueError) as exc:  # ValueError: a suffix that Pillow does not know
        raise ExportError(f"{path}: the contact sheet cannot be written: {exc}; name a .png that can be made") from exc


def _shrink_by_maximum(array: NDArray[np.uint8], tile: tuple[int, int]) -> Image.Image:
    """Resize (width, height) so that each new pixel is the largest of those it stands for."""
    width, height = tile
    rows = np.linspace(0, array.shape[0], height, endpoint=False).astype(int)
    columns = np.linspace(0, array.shape[1], width, endpoint=False).astype(int)
    return Image.fromarray(np.maximum.reduceat(np.maximum.reduceat(array, rows, axis=0), columns, axis=1))
