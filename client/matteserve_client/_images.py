"""From whatever holds a picture to an upright RGB image, its own alpha and its colour profile.

The formats are an allow-list, recognised by their first bytes and opened by their own Pillow plugin: no other parser
ever sees the data, the pixel limit is checked between header and pixels, and Pillow's process-wide switches
(`Image.MAX_IMAGE_PIXELS`, the list of plugins, warning filters) are neither needed nor touched.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from matteserve_client import _colour
from matteserve_client._errors import ImageTooLargeError, InvalidImageError, UnsupportedFormatError

ImageSource: TypeAlias = (
    str | os.PathLike[str] | bytes | bytearray | memoryview | IO[bytes] | Image.Image | NDArray[np.uint8]
)
"""A path, an encoded image (bytes or a binary file object), a Pillow image, or a uint8 array: (H, W, 3) RGB,
(H, W, 4) RGBA with straight alpha, or (H, W) grey."""

DEFAULT_MAX_PIXELS = 100_000_000
"""Largest picture that is decoded, in pixels (width x height)."""

_OPENERS: dict[str, Callable[[IO[bytes]], Image.Image]] = {
    "JPEG": JpegImagePlugin.JpegImageFile,
    "PNG": PngImagePlugin.PngImageFile,
    "WebP": WebPImagePlugin.WebPImageFile,
    "TIFF": TiffImagePlugin.TiffImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
    "GIF": GifImagePlugin.GifImageFile,
}
FORMATS = tuple(_OPENERS)
"""Image file formats that are read; of an animation or a document of several pages, the first picture."""

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What undoes each EXIF orientation."""
_SIDEWAYS = {_TURNS[orientation] for orientation in (5, 6, 7, 8)}

_SIGNATURES: tuple[tuple[int, bytes, str], ...] = (
    (0, b"\xff\xd8\xff", "JPEG"),
    (0, b"\x89PNG\r\n\x1a\n", "PNG"),
    (8, b"WEBP", "WebP"),
    (0, b"II*\0", "TIFF"),
    (0, b"MM\0*", "TIFF"),
    (0, b"II+\0", "TIFF"),
    (0, b"MM\0+", "TIFF"),
    (0, b"GIF87a", "GIF"),
    (0, b"GIF89a", "GIF"),
    # Known, so that the message can name them; not read.
    (4, b"ftypavif", "AVIF"),
    (4, b"ftypavis", "AVIF"),
    (4, b"ftyphei", "HEIC"),
    (4, b"ftyphevc", "HEIC"),
    (4, b"ftypmif1", "HEIF"),
    (4, b"ftypmsf1", "HEIF"),
    (0, b"\0\0\0\x0cjP  ", "JPEG 2000"),
    (0, b"\xff\x4f\xff\x51", "JPEG 2000"),
    (0, b"\0\0\0\x0cJXL ", "JPEG XL"),
    (0, b"\xff\x0a", "JPEG XL"),
    (0, b"\0\0\x01\0", "ICO"),
    (0, b"icns", "ICNS"),
    *((0, b"P%d%c" % (kind, space), "PPM/PGM/PBM") for kind in range(1, 8) for space in b" \n\r\t"),
    (0, b"8BPS", "PSD"),
    (0, b"%PDF", "PDF"),
    (0, b"%!PS", "EPS"),
    (0, b"<svg", "SVG"),
    (0, b"<?xml", "SVG or other XML"),
    (0, b"\x76\x2f\x31\x01", "OpenEXR"),
    (0, b"#?RADIANCE", "Radiance HDR"),
    (0, b"DDS ", "DDS"),
    (0, b"qoif", "QOI"),
    (0, b"SIMPLE  =", "FITS"),
    (0, b"BM", "BMP"),
)


@dataclass(frozen=True)
class Picture:
    """A decoded picture, upright.

    Attributes:
        image: Mode "RGB". Never written to: it may be the caller's own.
        alpha: Mode "L", straight alpha of the input; None if it is opaque.
        icc_profile: Profile that describes `image`; None means sRGB or unknown.
        full_size: (height, width) of the picture, where `image` is a smaller decode of it.
    """

    image: Image.Image
    alpha: Image.Image | None = None
    icc_profile: bytes | None = None
    full_size: tuple[int, int] | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the picture in pixels."""
        return self.full_size or (self.image.height, self.image.width)


def load_picture(source: ImageSource, *, max_pixels: int = DEFAULT_MAX_PIXELS, at_least: int | None = None) -> Picture:
    """Decode a picture, turn it upright and bring it to 8-bit RGB.

    EXIF orientation is applied. Palette, grey, 1-bit, CMYK and Lab become RGB (CMYK, Lab and grey through their ICC
    profile where they carry one); 16-bit and float samples are scaled to 8 bits, not clipped; alpha (also a palette's
    or a colour key's) is split off and kept.

    Args:
        source: See `ImageSource`. File objects are read from where they stand, and left open.
        max_pixels: Largest width x height that is decoded; checked before pixels are read.
        at_least: Side in pixels that is enough: an encoded JPEG is then decoded at 1/2, 1/4 or 1/8 of its size, as
            long as neither side gets shorter than this. libjpeg leaves out the rest of the inverse transform.

    Raises:
        UnsupportedFormatError: An image file of a format outside the allow-list.
        ImageTooLargeError: More pixels than `max_pixels`.
        InvalidImageError: Not an image, damaged, unreadable, or an array of another dtype or shape.
    """
    full_size: tuple[int, int] | None = None
    with ExitStack() as stack:
        if isinstance(source, np.ndarray):
            what = "image array"
            image = _from_array(cast("NDArray[Any]", source), max_pixels)
        elif isinstance(source, Image.Image):
            what = "PIL image"
            image = source
            _check_size(image, what, max_pixels)
        else:
            stream, what = _open_stream(source, stack)
            image = _open_image(stream, what, max_pixels)
            if at_least is not None and isinstance(image, JpegImagePlugin.JpegImageFile):
                full_size = image.height, image.width
                image.draft(None, (at_least, at_least))
                full_size = None if (image.height, image.width) == full_size else full_size
        _load(image, what)
    # The stream is closed now; Pillow keeps nothing of it once the first frame is loaded.
    turn = _turn(image)
    if turn is not None:
        image = image.transpose(turn)
        if full_size is not None and turn in _SIDEWAYS:
            full_size = full_size[1], full_size[0]
    colour, alpha, profile = _colour.to_rgb(image, what)
    return Picture(colour, alpha, profile, full_size)


def _open_stream(source: Any, stack: ExitStack) -> tuple[IO[bytes], str]:
    """Return a seekable binary stream and what to call it in messages."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        return io.BytesIO(source), "image bytes"
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        try:
            stream: IO[bytes] = stack.enter_context(path.open("rb"))
            if not stream.seekable():
                stream = io.BytesIO(stream.read())
        except (OSError, ValueError) as exc:  # ValueError: a NUL in the path
            reason = getattr(exc, "strerror", None) or exc
            raise InvalidImageError(f"{str(source)!r}: cannot be read: {reason}") from exc
        return stream, repr(str(path))
    if hasattr(source, "read"):
        what = repr(str(getattr(source, "name", "image file object")))
        try:
            data = source.read()
        except (OSError, ValueError) as exc:
            raise InvalidImageError(f"{what}: cannot be read: {exc}") from exc
        if not isinstance(data, (bytes, bytearray, memoryview)):
            raise InvalidImageError(f"{what}: read() returned {type(data).__name__}, not bytes; open it with mode 'rb'")
        return io.BytesIO(data), what
    raise InvalidImageError(
        f"cannot take an image from {type(source).__name__}; "
        "pass a path, bytes, a binary file object, a PIL image or a uint8 array"
    )


def _open_image(stream: IO[bytes], what: str, max_pixels: int) -> Image.Image:
    """Read the header only."""
    head = stream.read(32)
    stream.seek(0)
    if not head:
        raise InvalidImageError(f"{what}: is empty (0 bytes)")
    found = next((name for at, magic, name in _SIGNATURES if head.startswith(magic, at)), None)
    if found is None:
        raise InvalidImageError(f"{what}: is not an image (it starts with {head[:8]!r}); allowed: {', '.join(FORMATS)}")
    if found not in _OPENERS:
        raise UnsupportedFormatError(f"{what}: is {found}, which is not read; allowed: {', '.join(FORMATS)}")
    try:
        image = _OPENERS[found](stream)
    except MemoryError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as exc:
        raise ImageTooLargeError(f"{what}: {exc}") from exc
    except Exception as exc:  # Pillow's parsers raise nearly anything on damaged data
        raise InvalidImageError(
            f"{what}: the {found} header is damaged or cut off ({exc or type(exc).__name__})"
        ) from exc
    _check_size(image, what, max_pixels)
    return image


def _check_size(image: Image.Image, what: str, max_pixels: int) -> None:
    width, height = image.size
    if width < 1 or height < 1:
        raise InvalidImageError(f"{what}: has no pixels (height {height}, width {width})")
    if width * height > max_pixels:
        raise ImageTooLargeError(
            f"{what}: is {height} x {width} = {height * width:,} pixels, the limit is {max_pixels:,}; "
            "make it smaller, or raise max_pixels if you trust where it comes from"
        )


def _load(image: Image.Image, what: str) -> None:
    """Decode the pixels."""
    try:
        image.load()
    except MemoryError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as exc:
        # TIFF: Pillow's own guard looks once more, at twice its MAX_IMAGE_PIXELS.
        raise ImageTooLargeError(f"{what}: {exc}") from exc
    except Exception as exc:
        raise InvalidImageError(
            f"{what}: the {image.format or 'image'} data is truncated or damaged ({exc or type(exc).__name__})"
        ) from exc


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What turns a picture upright by its EXIF orientation; a damaged EXIF block counts as none."""
    try:
        return _TURNS.get(image.getexif().get(0x0112, 1))
    except MemoryError:
        raise
    except Exception:  # a damaged EXIF block is no reason to refuse a picture that decodes
        return None


def _from_array(array: NDArray[Any], max_pixels: int) -> Image.Image:
    shapes = "(H, W, 3) RGB, (H, W, 4) RGBA or (H, W) grey"
    if array.dtype != np.uint8:
        values = ""
        if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
            values = " with NaN or infinity in it"
        raise InvalidImageError(
            f"image array: dtype is {array.dtype}{values}, must be uint8 with values 0 to 255; "
            "for floats in [0, 1] pass (array * 255).round().astype(np.uint8)"
        )
    if not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))):
        hint = "; pass one image at a time, channels last" if array.ndim in (3, 4) else ""
        raise InvalidImageError(f"image array: shape is {array.shape}, must be {shapes}{hint}")
    if 0 in array.shape:
        raise InvalidImageError(f"image array: shape is {array.shape}, it has no pixels")
    height, width = array.shape[:2]
    if height * width > max_pixels:
        raise ImageTooLargeError(
            f"image array: is {height} x {width} = {height * width:,} pixels, the limit is {max_pixels:,}; "
            "make it smaller, or raise max_pixels"
        )
    return Image.fromarray(array)
