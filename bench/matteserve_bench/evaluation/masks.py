"""Ground truth from files: whatever holds one number for each pixel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from matteserve_bench._errors import EvaluationError

_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF")  # those of the client's pictures
_16_BIT = 65535


def load_mask(path: Path) -> NDArray[np.float32]:
    """Read a mask or an alpha matte.

    The rule: a file with an alpha channel that is not opaque everywhere is a cut-out, and its alpha is the mask; else
    the grey level is, of 1, 8 or 16 bits, from black (background) to white; colours are allowed if they are greys. EXIF
    orientation is applied, as the client applies it to the picture.

    Returns:
        Alpha, shape (H, W), float32 in [0, 1].

    Raises:
        EvaluationError: The file cannot be read, holds colours, or only the levels 0 and 1 of 255.
    """
    image = _open(path)
    if "transparency" in image.info or image.mode == "PA":
        image = image.convert("RGBA")
    if image.mode in ("RGBA", "LA") and image.getchannel("A").getextrema() != (255, 255):
        return _unit(image.getchannel("A"))
    if image.mode in ("1", "L", "I", "F") or image.mode.startswith("I;16"):
        return _unit(image, path)
    if image.mode == "LA":
        return _unit(image.getchannel("L"), path)
    red, green, blue = image.convert("RGB").split()
    if red.tobytes() != green.tobytes() or red.tobytes() != blue.tobytes():
        raise EvaluationError(
            f"{path}: is a colour picture of mode {image.mode}, not a mask; a mask is grey, or the alpha of a cut-out"
        )
    return _unit(red, path)


def load_trimap(path: Path) -> NDArray[np.bool_]:
    """Read a trimap.

    Returns:
        Where the alpha is in question, shape (H, W): every grey between black (background) and white (foreground).

    Raises:
        EvaluationError: The file cannot be read, holds colours, or nothing is in question.
    """
    levels = load_mask(path)
    unknown: NDArray[np.bool_] = (levels > 0) & (levels < 1)
    if not unknown.any():
        raise EvaluationError(f"{path}: the trimap is black and white only; what is in question must be grey, e.g. 128")
    return unknown


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path, formats=_FORMATS) as image:
            image.load()
            return ImageOps.exif_transpose(image)
    except MemoryError:
        raise
    except Exception as exc:  # Pillow's parsers raise nearly anything on damaged data
        raise EvaluationError(
            f"{path}: cannot be read as a mask ({exc or type(exc).__name__}); allowed: {', '.join(_FORMATS)}"
        ) from exc


def _unit(image: Image.Image, path: Path | None = None) -> NDArray[np.float32]:
    """One channel to [0, 1]; with a path, levels that were meant as 0 and 255 but are 0 and 1 are refused."""
    if image.mode == "1":
        image = image.convert("L")
    levels: NDArray[Any] = np.asarray(image)
    top = float(levels.max())
    if image.mode == "L":
        if path is not None and top == 1:
            raise EvaluationError(f"{path}: holds only the levels 0 and 1 of 255; multiply it by 255")
        return _divide(levels, 255)
    if image.mode == "F":
        if not (float(levels.min()) >= 0 and top <= 1):
            raise EvaluationError(f"{path}: float samples must lie in [0, 1], found {levels.min():g} to {top:g}")
        return levels.astype(np.float32)
    if not (levels.min() >= 0 and top <= _16_BIT):
        raise EvaluationError(f"{path}: samples must have 1, 8 or 16 bits, found values from {levels.min()} to {top:g}")
    return _divide(levels, _16_BIT)


def _divide(levels: NDArray[Any], top: int) -> NDArray[np.float32]:
    unit: NDArray[np.float32] = np.divide(levels, np.float32(top), dtype=np.float32)
    return unit
