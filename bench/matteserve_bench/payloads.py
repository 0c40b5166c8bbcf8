"""What is sent: a pool of distinct pictures, prepared before the clock starts."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from matteserve_bench._errors import TargetError
from matteserve_client import ModelContract
from matteserve_client._images import load_picture
from matteserve_client._preprocess import image_tensor

POOL_SIZE = 16
PICTURE_SIZE = (853, 1280)
"""(height, width) of generated pictures: 1.1 megapixels."""
_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}


def load_pictures(
    directory: Path | None, *, count: int = POOL_SIZE, size: tuple[int, int] = PICTURE_SIZE
) -> list[bytes]:
    """Encoded pictures: those of a directory, or generated JPEGs.

    Args:
        directory: Folder with JPEG, PNG or WebP files; None generates.
        count: Most pictures to take.
        size: (height, width) of generated ones.

    Raises:
        TargetError: The directory has no picture.
    """
    if directory is None:
        return [generate_jpeg(seed, size) for seed in range(count)]
    paths = sorted(path for path in directory.iterdir() if path.suffix.lower() in _SUFFIXES)[:count]
    if not paths:
        raise TargetError(f"{directory} has no picture; looked for {', '.join(sorted(_SUFFIXES))}")
    return [path.read_bytes() for path in paths]


def tensors_of(pictures: Sequence[bytes], contract: ModelContract, rows: int) -> list[NDArray[np.uint8]]:
    """Inputs made of pictures as the client makes them: each (rows, height, width, 3), uint8, one per picture."""
    singles = [image_tensor(load_picture(data), contract)[0] for data in pictures]
    return [
        np.ascontiguousarray(np.stack([singles[(first + row) % len(singles)] for row in range(rows)]))
        for first in range(len(singles))
    ]


def generate_jpeg(seed: int, size: tuple[int, int]) -> bytes:
    """A picture with smooth areas, edges and fine grain, so that decoding costs about what a photograph's does.

    Args:
        seed: Another seed, another picture.
        size: (height, width).
    """
    height, width = size
    generator = np.random.default_rng(seed)

    def smooth(cells: int) -> Image.Image:
        coarse = generator.integers(0, 256, (cells, cells, 3), np.uint8)
        return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)

    background, subject = smooth(5), smooth(9)
    y, x = np.mgrid[0:height, 0:width]
    centre_y, centre_x = generator.uniform(0.35, 0.65, 2)
    distance = np.hypot((y / height - centre_y) / 0.35, (x / width - centre_x) / 0.25)
    wobble = 0.1 * np.sin(7 * np.arctan2(y / height - centre_y, x / width - centre_x) + seed)
    mask = Image.fromarray(np.uint8(255) * (distance + wobble < 1).astype(np.uint8))
    background.paste(subject, (0, 0), mask)
    grain = generator.normal(0, 4, (height, width, 1)).astype(np.float32)
    picture = np.clip(np.asarray(background, np.float32) + grain, 0, 255).astype(np.uint8)
    encoded = io.BytesIO()
    Image.fromarray(picture).save(encoded, "JPEG", quality=90)
    return encoded.getvalue()
