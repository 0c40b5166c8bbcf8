"""A PNG writer for pictures: one filter for every row, and deflate at its fastest.

Pillow, like libpng, tries five filters on every row and, unless told otherwise, deflates at level 6: on a photograph
that takes longer than a small network. Here every row is predicted from the one above (the filter "Up" of PNG, ISO/IEC
15948, section 9: one subtraction over the whole picture) and deflated at level 1. Files are as large as Pillow's at
level 1, and 5 to 10 % larger than at level 6; `bench/results/README.md` has the figures.

With the extra [fast], ISA-L deflates instead of zlib, three times as fast. Any deflate is a valid PNG.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from PIL import Image


def _fastest_deflate() -> Any:
    """The module of the extra [fast] if it is installed, else zlib, whose interface it has."""
    try:
        from isal import isal_zlib
    except ImportError:
        return zlib
    return isal_zlib


_deflate = _fastest_deflate()
_COLOUR_TYPES = {"L": 0, "RGB": 2, "LA": 4, "RGBA": 6}
_FILTER_UP = 2
# A strip stays in the second-level cache from the crop to the deflate, and is what a picture costs in memory here.
_STRIP_BYTES = 1 << 18


def write_png(
    image: Image.Image,
    alpha: Image.Image | None = None,
    icc_profile: bytes | None = None,
    *,
    clear_transparent: bool = False,
    compressor: Callable[[], Any] = lambda: _deflate.compressobj(1),
) -> bytes:
    """Encode a picture as PNG, without a copy of the whole in between.

    Args:
        image: Mode "L", "RGB", "LA" or "RGBA"; "RGB" if `alpha` is given.
        alpha: Mode "L", straight alpha of the same size.
        icc_profile: Profile of the colours, to be stored with them.
        clear_transparent: Store black where alpha is 0.
        compressor: Makes what deflates: an object with the methods of `zlib.compressobj()`.

    Raises:
        ValueError: Another mode, or sizes that differ.
    """
    mode = image.mode if alpha is None else "RGBA"
    if mode not in _COLOUR_TYPES or (alpha is not None and (image.mode, alpha.mode) != ("RGB", "L")):
        with_alpha = "" if alpha is None else f" with alpha of mode {alpha.mode!r}"
        raise ValueError(f"cannot write mode {image.mode!r}{with_alpha}; allowed: L, RGB, LA, RGBA, or RGB with L")
    if alpha is not None and alpha.size != image.size:
        raise ValueError(f"the alpha is {alpha.height} x {alpha.width}, its picture {image.height} x {image.width}")
    header = struct.pack(">IIBBBBB", image.width, image.height, 8, _COLOUR_TYPES[mode], 0, 0, 0)
    parts = [b"\x89PNG\r\n\x1a\n", *_chunk(b"IHDR", header)]
    if icc_profile:
        parts += _chunk(b"iCCP", b"ICC Profile\0\0" + zlib.compress(icc_profile))
    stream = compressor()
    for rows in _filtered_strips(image, alpha, clear_transparent and mode == "RGBA"):
        if deflated := stream.compress(rows):
            parts += _chunk(b"IDAT", deflated)
    parts += _chunk(b"IDAT", stream.flush())
    parts += _chunk(b"IEND", b"")
    return b"".join(parts)


def _filtered_strips(image: Image.Image, alpha: Image.Image | None, clear_transparent: bool) -> Iterator[Any]:
    """The rows of the picture, filtered, each after its filter's number; as a buffer of uint8 that is used again."""
    width, height = image.size
    channels = len(image.getbands()) if alpha is None else 4
    rows = min(height, max(1, _STRIP_BYTES // (width * channels)))
    filtered = np.empty((rows, 1 + width * channels), np.uint8)
    filtered[:, 0] = _FILTER_UP
    above = np.zeros((1, width * channels), np.uint8)
    for top in range(0, height, rows):
        box = (0, top, width, min(top + rows, height))
        strip = image.crop(box)
        if alpha is not None:
            strip.putalpha(alpha.crop(box))
        samples = np.asarray(strip).reshape(box[3] - top, -1)
        if clear_transparent:
            pixels = samples.view("<u4")  # alpha is the topmost byte
            samples = np.where(pixels < 1 << 24, np.uint32(0), pixels).astype("<u4", copy=False).view(np.uint8)
        out = filtered[: len(samples), 1:]
        np.subtract(samples[:1], above, out=out[:1])
        np.subtract(samples[1:], samples[:-1], out=out[1:])
        above = samples[-1:]
        yield filtered[: len(samples)]


def _chunk(kind: bytes, data: bytes) -> list[bytes]:
    return [struct.pack(">I", len(data)), kind, data, struct.pack(">I", zlib.crc32(data, zlib.crc32(kind)))]
