"""Every way to encode a cut-out that is installed: CPU time and size per pixel, each checked by Pillow's decoder."""

from __future__ import annotations

import importlib.util
import io
import time
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from matteserve_bench.comparisons.pictures import render_cutout
from matteserve_client import _png
from matteserve_client._encode import encode

Encoder = Callable[[Image.Image, Image.Image], bytes]
"""From the picture, mode "RGB", and its alpha to a file."""

_ROUNDS = 4


def encoders() -> dict[str, Encoder]:
    """The encoders by name."""
    found: dict[str, Encoder] = {
        "PNG, Pillow level 6 (default, rembg)": _pillow("PNG"),
        "PNG, Pillow level 1": _pillow("PNG", compress_level=1),
        "PNG, Pillow level 1, Z_RLE": _pillow("PNG", compress_level=1, compress_type=zlib.Z_RLE),
        "PNG, Pillow level 1, Z_HUFFMAN_ONLY": _pillow("PNG", compress_level=1, compress_type=zlib.Z_HUFFMAN_ONLY),
        "PNG, ours, zlib level 1": _ours(lambda: zlib.compressobj(1)),
        "WebP lossless, Pillow default": _pillow("WEBP", lossless=True, exact=True),
        "WebP lossless, ours": lambda picture, alpha: encode(picture, "webp", alpha=alpha),
        "TIFF LZW, Pillow": _pillow("TIFF", compression="tiff_lzw"),
        "TIFF LZW, ours": lambda picture, alpha: encode(picture, "tiff", alpha=alpha),
    }
    if importlib.util.find_spec("isal") is not None:
        from isal import isal_zlib

        found["PNG, ours, ISA-L level 0"] = _ours(lambda: isal_zlib.compressobj(0))
        found["PNG, ours, ISA-L level 1 ([fast])"] = _ours(lambda: isal_zlib.compressobj(1))
        found["PNG, ours, ISA-L level 2"] = _ours(lambda: isal_zlib.compressobj(2))
    if importlib.util.find_spec("zlib_ng") is not None:
        from zlib_ng import zlib_ng

        found["PNG, ours, zlib-ng level 1"] = _ours(lambda: zlib_ng.compressobj(1))
        found["PNG, ours, zlib-ng level 2"] = _ours(lambda: zlib_ng.compressobj(2))
    if importlib.util.find_spec("deflate") is not None:
        import deflate

        found["PNG, ours, libdeflate level 1"] = _ours(lambda: _AtOnce(lambda data: deflate.zlib_compress(data, 1)))
    if importlib.util.find_spec("cv2") is not None:
        import cv2

        def opencv(picture: Image.Image, alpha: Image.Image) -> bytes:
            samples = np.dstack([np.asarray(picture)[..., ::-1], np.asarray(alpha)])
            return bytes(cv2.imencode(".png", samples, [cv2.IMWRITE_PNG_COMPRESSION, 1])[1])

        found["PNG, OpenCV level 1"] = opencv
    if importlib.util.find_spec("fpng_py") is not None:
        import fpng_py

        def fpng(picture: Image.Image, alpha: Image.Image) -> bytes:
            samples = _cutout(picture, alpha).tobytes()
            return bytes(fpng_py.fpng_encode_image_to_memory(samples, picture.width, picture.height))

        found["PNG, fpng"] = fpng
    return found


def measure(megapixels: float = 2.0) -> list[dict[str, Any]]:
    """Encode one cut-out with each; the least CPU time of several rounds, which are interleaved.

    Returns:
        One row each, fastest first: `encoder`, `ms_per_megapixel`, `bytes_per_pixel`.
    """
    picture, alpha = render_cutout(megapixels)
    size = picture.width * picture.height / 1e6
    expected = _cutout(picture, alpha).tobytes()
    best: dict[str, float] = {}
    lengths: dict[str, int] = {}
    for part in range(_ROUNDS):
        for name, work in encoders().items():
            began = time.process_time()
            data = work(picture, alpha)
            took = time.process_time() - began
            best[name], lengths[name] = min(took, best.get(name, took)), len(data)
            if part == 0 and Image.open(io.BytesIO(data)).tobytes() != expected:
                raise AssertionError(f"{name}: what Pillow decodes is not the cut-out")
    return [
        {"encoder": name, "ms_per_megapixel": 1000 * best[name] / size, "bytes_per_pixel": lengths[name] / size / 1e6}
        for name in sorted(best, key=best.__getitem__)
    ]


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = ["| encoder | CPU ms per megapixel | bytes per pixel |", "| --- | --- | --- |"]
    lines += [f"| {row['encoder']} | {row['ms_per_megapixel']:.1f} | {row['bytes_per_pixel']:.2f} |" for row in rows]
    return "\n".join(lines)


def _cutout(picture: Image.Image, alpha: Image.Image) -> Image.Image:
    cutout = picture.convert("RGBA")
    cutout.putalpha(alpha)
    return cutout


def _pillow(format_name: str, **options: Any) -> Encoder:
    def work(picture: Image.Image, alpha: Image.Image) -> bytes:
        stream = io.BytesIO()
        _cutout(picture, alpha).save(stream, format_name, **options)
        return stream.getvalue()

    return work


def _ours(compressor: Callable[[], Any]) -> Encoder:
    return lambda picture, alpha: _png.write_png(picture, alpha, compressor=compressor)


class _AtOnce:
    """A compressor for a library that only compresses all at once."""

    def __init__(self, compress: Callable[[bytes], bytes]) -> None:
        self._compress, self._data = compress, bytearray()

    def compress(self, data: Any) -> bytes:
        self._data += memoryview(data).cast("B")
        return b""

    def flush(self) -> bytes:
        return bytes(self._compress(bytes(self._data)))
