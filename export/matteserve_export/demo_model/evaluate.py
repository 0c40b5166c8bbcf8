"""Measure the demonstration model on unseen scenes, and draw its results on scenes and on photographs.

    python -m matteserve_export.demo_model.evaluate --weights u2netp_demo.safetensors --size 192

The path is the serving graph's: stretch to S x S by Pillow's bilinear filter, normalise, network, stretch each map by
its own minimum and maximum, bring it back to the picture's size by Pillow's bilinear filter.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import click
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file

from matteserve_export.demo_model.scenes import Scene, generate
from matteserve_export.demo_model.train import normalise
from matteserve_export.models import build_model

__all__ = ["EVALUATION_SEED", "contact_sheet", "evaluate", "load_model", "predict"]

EVALUATION_SEED = 3
"""Series of the evaluation scenes; training uses 1 and its validation 2."""

SCENE_SIZE = 320


def load_model(weights: Path) -> torch.nn.Module:
    """U²-Net-P with the given weights (.safetensors), in evaluation mode."""
    model = build_model("u2netp")
    model.load_state_dict(load_file(weights))
    return model


def predict(model: torch.nn.Module, image: NDArray[np.uint8], size: int) -> NDArray[np.float32]:
    """Alpha of one picture.

    Args:
        model: Maps normalised pixel values to the probability.
        image: RGB, shape (H, W, 3), uint8.
        size: Height and width at which the network sees it.

    Returns:
        Alpha, shape (H, W), float32 in [0, 1].
    """
    height, width = image.shape[:2]
    stretched = Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.array(stretched)).permute(2, 0, 1)[None]
    with torch.inference_mode():
        probability = model(normalise(pixels))[0, 0].numpy()
    low, high = float(probability.min()), float(probability.max())
    alpha = (probability - low) / max(high - low, 1e-6)
    levels = Image.fromarray(np.round(alpha * 255).astype(np.uint8))
    back = levels.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(np.asarray(back, dtype=np.float32) / 255, dtype=np.float32)


def evaluate(model: torch.nn.Module, size: int, count: int, seed: int = EVALUATION_SEED) -> dict[str, object]:
    """IoU at 0.5 and mean absolute error of alpha over generated scenes.

    Args:
        model: As for ``predict``.
        size: Height and width at which the network sees the scenes.
        count: Number of scenes.
        seed: Series of the scenes.

    Returns:
        ``iou`` (mean over scenes), ``iou_median``, ``share_above_0.9``, ``mae``, and ``iou_by_background``.
    """
    overlaps: list[float] = []
    errors: list[float] = []
    by_background: defaultdict[str, list[float]] = defaultdict(list)
    for index in range(count):
        scene = generate(seed, index, SCENE_SIZE)
        alpha, true = predict(model, scene.image, size), scene.alpha.astype(np.float32) / 255
        found, expected = alpha > 0.5, true > 0.5
        overlap = float((found & expected).sum() / max(1, (found | expected).sum()))
        overlaps.append(overlap)
        by_background[scene.background].append(overlap)
        errors.append(float(np.abs(alpha - true).mean()))
    return {
        "scenes": count,
        "seed": seed,
        "size": size,
        "iou": round(float(np.mean(overlaps)), 4),
        "iou_median": round(float(np.median(overlaps)), 4),
        "share_above_0.9": round(float(np.mean(np.array(overlaps) > 0.9)), 4),
        "mae": round(float(np.mean(errors)), 4),
        "iou_by_background": {kind: round(float(np.mean(v)), 4) for kind, v in sorted(by_background.items())},
    }


def contact_sheet(
    pictures: list[tuple[NDArray[np.uint8], list[NDArray[np.float32]]]], columns: int, cell: int
) -> Image.Image:
    """Rows of pictures with their maps below and, last, the cut-out by the last map over grey.

    Args:
        pictures: RGB image (H, W, 3) uint8 and alpha maps (H, W) float32, for each picture; all have as many maps.
        columns: Pictures in a row.
        cell: Height and width of a cell in pixels.
    """
    stacks = []
    for image, maps in pictures:
        alpha = maps[-1][..., None]
        tiles = [image, *(np.repeat(np.round(m * 255).astype(np.uint8)[..., None], 3, 2) for m in maps)]
        tiles.append(np.round(image * alpha + np.float32(150) * (1 - alpha)).astype(np.uint8))
        stacks.append(np.concatenate([np.asarray(Image.fromarray(tile).resize((cell, cell))) for tile in tiles]))
    while len(stacks) % columns:
        stacks.append(np.full_like(stacks[0], 255))
    rows = [np.concatenate(stacks[first : first + columns], 1) for first in range(0, len(stacks), columns)]
    return Image.fromarray(np.concatenate(rows))


def _drawn(model: torch.nn.Module, scene: Scene, size: int) -> tuple[NDArray[np.uint8], list[NDArray[np.float32]]]:
    return scene.image, [(scene.alpha / 255).astype(np.float32), predict(model, scene.image, size)]


@click.command()
@click.option("--weights", type=click.Path(path_type=Path, exists=True), required=True, help=".safetensors file.")
@click.option("--size", default=192, show_default=True, help="Height and width at which the network sees the picture.")
@click.option("--count", default=500, show_default=True, help="Scenes to measure on; 0 measures nothing.")
@click.option("--sheet", type=click.Path(path_type=Path), help="PNG of results on the first 24 scenes.")
@click.option("--samples", type=click.Path(path_type=Path), help="PNG of 24 training scenes with their alpha.")
@click.option("--photo-sheet", type=click.Path(path_type=Path), help="PNG of results on the given photographs.")
@click.argument("photos", nargs=-1, type=click.Path(path_type=Path, exists=True))
def main(
    weights: Path,
    size: int,
    count: int,
    sheet: Path | None,
    samples: Path | None,
    photo_sheet: Path | None,
    photos: tuple[Path, ...],
) -> None:
    """Measure the demonstration model on unseen generated scenes (JSON on stdout).

    Example: python -m matteserve_export.demo_model.evaluate --weights u2netp_demo.safetensors --sheet results.png
    """
    model = load_model(weights)
    if sheet is not None:
        scenes = [generate(EVALUATION_SEED, index, SCENE_SIZE) for index in range(24)]
        contact_sheet([_drawn(model, scene, size) for scene in scenes], 12, 112).save(sheet, optimize=True)
    if samples is not None:
        scenes = [generate(1, index, 128, hard=True) for index in range(24)]
        shown = [(scene.image, [(scene.alpha / 255).astype(np.float32)]) for scene in scenes]
        contact_sheet(shown, 12, 112).save(samples, optimize=True)
    if photo_sheet is not None:
        images = [np.array(Image.open(path).convert("RGB")) for path in photos]
        contact_sheet([(image, [predict(model, image, size)]) for image in images], 8, 180).save(photo_sheet)
    if count:
        click.echo(json.dumps(evaluate(model, size, count), indent=2))


if __name__ == "__main__":
    main()
