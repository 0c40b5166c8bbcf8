"""Draw the loss curve of a training run.

python -m matteserve_export.demo_model.curve docs/demo_model/loss.csv docs/demo_model/loss.png
"""

from __future__ import annotations

import csv
from pathlib import Path

import click
from PIL import Image, ImageDraw

__all__ = ["draw_curve"]

_WIDTH, _HEIGHT, _MARGIN = 900, 420, 46
_LOSS, _SCORE, _INK, _GRID = (31, 90, 180), (200, 90, 20), (40, 40, 40), (225, 225, 225)


def draw_curve(rows: list[dict[str, str]]) -> Image.Image:
    """Loss (left scale) and validation IoU (right scale, 0 to 1) over the steps; grey lines part the picture sizes.

    Args:
        rows: Lines of ``loss.csv``: step, size, learning_rate, loss, validation_iou; the last two may be empty.
    """
    image = Image.new("RGB", (_WIDTH, _HEIGHT), "white")
    pen = ImageDraw.Draw(image)
    last = max(int(row["step"]) for row in rows)
    losses = [(int(row["step"]), float(row["loss"])) for row in rows if row["loss"]]
    scores = [(int(row["step"]), float(row["validation_iou"])) for row in rows if row["validation_iou"]]
    top = max((loss for _, loss in losses), default=1.0)

    def point(step: int, share: float) -> tuple[float, float]:
        x = _MARGIN + (_WIDTH - 2 * _MARGIN) * step / last
        return x, _HEIGHT - _MARGIN - (_HEIGHT - 2 * _MARGIN) * share

    for tenth in range(0, 11, 2):
        left, y = point(0, tenth / 10)
        pen.line((left, y, _WIDTH - _MARGIN, y), fill=_GRID)
        pen.text((6, y - 6), f"{top * tenth / 10:.2f}", fill=_LOSS)
        pen.text((_WIDTH - _MARGIN + 8, y - 6), f"{tenth / 10:.1f}", fill=_SCORE)
    before = ""
    for row in rows:
        if row["size"] != before:
            x, y = point(int(row["step"]), 1.0)
            pen.line((x, y, x, _HEIGHT - _MARGIN), fill=(170, 170, 170))
            pen.text((x + 4, y - 14), f"{row['size']} px", fill=_INK)
            before = row["size"]
    for series, scale, tint in ((losses, top, _LOSS), (scores, 1.0, _SCORE)):
        pen.line([point(step, value / scale) for step, value in series], fill=tint, width=2)
    pen.text((_MARGIN, _HEIGHT - 24), "training loss (blue, left), validation IoU at 0.5 (orange, right)", fill=_INK)
    pen.text((_WIDTH - _MARGIN - 70, _HEIGHT - 24), f"{last} steps", fill=_INK)
    return image


@click.command()
@click.argument("table", type=click.Path(path_type=Path, exists=True))
@click.argument("picture", type=click.Path(path_type=Path))
def main(table: Path, picture: Path) -> None:
    """Draw TABLE, the loss.csv of a run, into PICTURE."""
    draw_curve(list(csv.DictReader(table.read_text().splitlines()))).save(picture)


if __name__ == "__main__":
    main()
