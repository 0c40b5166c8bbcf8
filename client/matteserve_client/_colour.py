"""Colour: any Pillow mode to 8-bit RGB and a straight alpha.

Sample ranges. 16-bit grey spans 0 to 65535. 32-bit integers and floats do not say their range, so the rule is: floats
within [0, 1] span [0, 1]; floats within [0, 255] span [0, 255]; numbers within [0, 65535] span [0, 65535]; anything
else is stretched from its own minimum to its own maximum.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

from matteserve_client._errors import InvalidImageError

# Bytes 16 to 19 of an ICC profile name the colour space that it describes (ICC.1, table 19).
_PROFILE_SPACES = {"RGB": b"RGB ", "L": b"GRAY", "CMYK": b"CMYK", "LAB": b"Lab "}


def to_rgb(image: Image.Image, what: str) -> tuple[Image.Image, Image.Image | None, bytes | None]:
    """Split a loaded image into colour, alpha and the profile that still describes the colour.

    Args:
        image: Any mode; is not changed. May be returned itself when it is opaque RGB.
        what: Name of the image in messages.

    Returns:
        RGB image; "L" alpha or None if opaque; ICC profile or None.

    Raises:
        InvalidImageError: NaN or infinity in a float image, or a mode that Pillow cannot convert.
    """
    try:
        colour, alpha = _split_alpha(image, what)
        if alpha is not None and alpha.getextrema() == (255, 255):
            alpha = None
        profile = image.info.get("icc_profile")
        space = profile[16:20] if isinstance(profile, bytes) else None
        if colour.mode == "RGB":
            return colour, alpha, profile if space == _PROFILE_SPACES["RGB"] else None
        if colour.mode == "LAB" or (space is not None and space == _PROFILE_SPACES.get(colour.mode)):
            converted = _to_srgb(colour, profile if space == _PROFILE_SPACES.get(colour.mode) else None)
            if converted is not None:
                return converted, alpha, None
        # An RGB profile on a grey or palette picture describes the RGB that the palette or the grey stands for.
        fits = space == _PROFILE_SPACES["RGB"] and colour.mode not in ("CMYK", "LAB")
        return colour.convert("RGB"), alpha, profile if fits else None
    except ValueError as exc:
        if isinstance(exc, InvalidImageError):
            raise
        raise InvalidImageError(f"{what}: mode {image.mode!r} cannot be converted to RGB ({exc})") from exc


def _split_alpha(image: Image.Image, what: str) -> tuple[Image.Image, Image.Image | None]:
    """Return the colour in a mode without alpha, and the alpha."""
    mode = image.mode
    if mode in ("I", "F") or mode.startswith("I;16"):
        samples = np.asarray(image)
        return _to_8_bit(samples, mode, what), _colour_key(samples, image.info.get("transparency"))
    if mode == "RGBa":
        image = image.convert("RGBA")
    elif mode == "La":
        image = image.convert("LA")
    elif mode in ("P", "PA") or "transparency" in image.info:
        has_alpha = mode == "PA" or "transparency" in image.info
        image = image.convert("RGBA" if has_alpha else "RGB")
    if image.mode == "RGBA":
        return image.convert("RGB"), image.getchannel("A")
    if image.mode == "LA":
        return image.getchannel("L"), image.getchannel("A")
    return (image.convert("L") if image.mode == "1" else image), None


def _to_8_bit(samples: NDArray[Any], mode: str, what: str) -> Image.Image:
    """Scale (H, W) samples to an "L" image, rounding to nearest."""
    if mode.startswith("I;16"):
        return Image.fromarray(((samples.astype(np.uint32) + 128) // 257).astype(np.uint8))
    low, high = float(samples.min()), float(samples.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        raise InvalidImageError(f"{what}: the float samples hold NaN or infinity; replace them before sending")
    tops = (1.0, 255.0, 65535.0) if mode == "F" else (65535.0,)
    top = next((top for top in tops if low >= 0 and high <= top), None)
    if top is not None:
        low, high = 0.0, top
    scaled = (samples.astype(np.float64 if mode == "I" else np.float32) - low) * 255.0 / ((high - low) or 1.0)
    return Image.fromarray(np.rint(scaled).clip(0, 255).astype(np.uint8))


def _colour_key(samples: NDArray[Any], key: Any) -> Image.Image | None:
    """Alpha of a grey PNG whose one sample value stands for transparent."""
    if not isinstance(key, int):
        return None
    return Image.fromarray(np.where(samples == key, 0, 255).astype(np.uint8))


def _to_srgb(colour: Image.Image, profile: bytes | None) -> Image.Image | None:
    """Convert through the ICC profile; None where the profile is unusable."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile)) if profile else ImageCms.createProfile("LAB")
        return ImageCms.profileToProfile(colour, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, TypeError, ImportError):  # ImportError: a Pillow without LittleCMS
        return None
