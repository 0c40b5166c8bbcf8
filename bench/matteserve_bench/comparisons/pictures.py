"""The pictures of the comparisons: generated on the fly, kept in a cache, never committed.

Thirty-two scenes of the project's own generator, from 0.3 to 24 megapixels, three of four as JPEG and one as PNG, as
people upload them. A generated scene is smoother than a photograph, and a PNG's size and time depend on nothing so much
as on noise: so each picture is enlarged to its size and gets the grain of a camera.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

SEED = 20_240
_SCENE_SIZE = 384
_GRAIN = (
    6.0,
    1.5,
)  # standard deviations in 8-bit levels: of brightness and of each colour; then a JPEG has 0.3 bytes a pixel

# Megapixels and how many pictures of each: what web shops and phones send, and a few of a camera's largest.
MIX = ((0.3, 10), (0.8, 12), (2.0, 6), (5.0, 2), (12.0, 1), (24.0, 1))


@dataclass(frozen=True)
class PictureFile:
    """One picture.

    Attributes:
        path: The file.
        height: Pixels.
        width: Pixels.
    """

    path: Path
    height: int
    width: int

    @property
    def megapixels(self) -> float:
        """Millions of pixels."""
        return self.height * self.width / 1e6


def make_pictures(folder: Path, mix: tuple[tuple[float, int], ...] = MIX) -> list[PictureFile]:
    """The pictures, largest first; those that `folder` has already are not made again.

    Largest first, because a run ends when its last picture is done: a large one begun last would measure how one core
    works while the others have nothing to do.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sizes = [megapixels for megapixels, count in mix for _ in range(count)]
    return [_make(folder, index, megapixels) for index, megapixels in reversed(list(enumerate(sizes)))]


def some(pictures: list[PictureFile], count: int) -> list[PictureFile]:
    """So many of the pictures, of all sizes; the largest only if all are taken."""
    if count >= len(pictures):
        return pictures
    smaller = pictures[1:]
    return [smaller[i * len(smaller) // count] for i in range(count)]


def render_cutout(megapixels: float, index: int = 4) -> tuple[Image.Image, Image.Image]:
    """A picture as a JPEG of it decodes, mode "RGB", and the alpha that its scene was composed with, mode "L"."""
    from matteserve_export.demo_model.scenes import generate

    height, width = round((megapixels * 1e6 * 3 / 4) ** 0.5), round((megapixels * 1e6 * 4 / 3) ** 0.5)
    picture = Image.open(io.BytesIO(_encode(_render(index, height, width), "jpg")))
    picture.load()
    alpha = Image.fromarray(generate(SEED, index, _SCENE_SIZE).alpha)
    return picture, alpha.resize((width, height), Image.Resampling.BICUBIC)


def _make(folder: Path, index: int, megapixels: float) -> PictureFile:
    ratio = (4 / 3, 3 / 4, 3 / 2, 1.0)[index % 4]
    width, height = round((megapixels * 1e6 * ratio) ** 0.5), round((megapixels * 1e6 / ratio) ** 0.5)
    suffix = "png" if index % 4 == 3 and megapixels < 20 else "jpg"
    path = folder / f"{SEED}-{index:02d}-{height}x{width}.{suffix}"
    if not path.exists():
        partial = path.with_suffix(".part")
        partial.write_bytes(_encode(_render(index, height, width), suffix))
        partial.replace(path)
    return PictureFile(path, height, width)


def _render(index: int, height: int, width: int) -> Image.Image:
    from matteserve_export.demo_model.scenes import generate

    scene = Image.fromarray(generate(SEED, index, _SCENE_SIZE).image).resize((width, height), Image.Resampling.BICUBIC)
    rng = np.random.default_rng((SEED, index))
    shared, single = (
        rng.standard_normal((height, width, channels), np.float32) * np.float32(deviation)
        for channels, deviation in zip((1, 3), _GRAIN, strict=True)
    )
    grainy = np.asarray(scene) + (shared + single)
    return Image.fromarray(np.rint(grainy).clip(0, 255).astype(np.uint8))


def _encode(image: Image.Image, suffix: str) -> bytes:
    stream = io.BytesIO()
    if suffix == "jpg":
        image.save(stream, "JPEG", quality=90)
    else:
        image.save(stream, "PNG")
    return stream.getvalue()
