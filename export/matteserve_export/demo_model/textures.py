"""Colours and textures of the generated scenes. Objects and backgrounds draw from the same distribution."""

from __future__ import annotations

import colorsys
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

__all__ = ["blur", "colour", "fractal_noise", "grid", "smooth_noise", "texture"]

Array = NDArray[np.floating[Any]]
Rng = np.random.Generator


def grid(size: int) -> tuple[Array, Array]:
    """Coordinates of the pixel centres, (1, S) and (S, 1), in [0, 1]."""
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size
    return axis[None, :], axis[:, None]


def blur(image: Array, sigma: float) -> Array:
    """Blur by three box filters, which is close to a Gaussian; edges are repeated.

    Args:
        image: Shape (H, W) or (H, W, C), float32.
        sigma: Standard deviation in pixels; below about 0.3 nothing changes.
    """
    # A box of fractional half-width r has variance (2r + 1)^2 / 12; whole widths are mixed for what lies between.
    half = max(0.0, (np.sqrt(4.0 * sigma * sigma + 1.0) - 1.0) / 2.0)
    low = int(half)
    share = np.float32(half - low)
    if half < 0.05:
        return image
    for axis in (0, 1):
        for _ in range(3):
            pad = [(0, 0)] * image.ndim
            pad[axis] = (low + 2, low + 1)
            total = np.cumsum(np.pad(image, pad, mode="edge"), axis=axis, dtype=np.float32)
            count = image.shape[axis]

            def span(radius: int, total: Array = total, axis: int = axis, count: int = count) -> Array:
                first = low + 1 - radius
                upper = np.take(total, range(first + 2 * radius + 1, first + 2 * radius + 1 + count), axis=axis)
                lower = np.take(total, range(first, first + count), axis=axis)
                return np.asarray((upper - lower) / np.float32(2 * radius + 1))

            image = span(low) * (1 - share) + span(low + 1) * share if share > 0.02 else span(low)
    return image


def smooth_noise(rng: Rng, size: int, cells: int, aspect: float = 1.0) -> Array:
    """Smooth random field of shape (S, S), about standard normal, with ``cells`` bumps across."""
    shape = (max(2, int(cells)), max(2, int(cells * aspect)))
    values = rng.standard_normal(shape).astype(np.float32)
    return np.asarray(Image.fromarray(values).resize((size, size), Image.Resampling.BICUBIC), dtype=np.float32)


def fractal_noise(rng: Rng, size: int, cells: float, octaves: int, gain: float = 0.5, aspect: float = 1.0) -> Array:
    """Sum of octaves of smooth noise, shape (S, S), scaled to about unit deviation."""
    total = np.zeros((size, size), dtype=np.float32)
    weight, power = 1.0, 0.0
    for _ in range(octaves):
        if cells > size:
            break
        total += np.float32(weight) * smooth_noise(rng, size, int(cells), aspect)
        power += weight * weight
        weight, cells = weight * gain, cells * 2.0
    return np.asarray(total / np.float32(np.sqrt(max(power, 1e-6))))


def colour(rng: Rng) -> Array:
    """One sRGB colour, shape (3,), in [0, 1]: greys, skin and wood tones, muted and bright colours."""
    kind = rng.random()
    if kind < 0.3:
        value = rng.random() ** 0.8
        tint = rng.normal(0.0, 0.02, 3)
        return np.asarray(np.clip(value + tint, 0.0, 1.0), dtype=np.float32)
    if kind < 0.45:
        hue, saturation, value = rng.uniform(0.02, 0.1), rng.uniform(0.25, 0.75), rng.uniform(0.15, 1.0)
    elif kind < 0.75:
        hue, saturation, value = rng.random(), rng.uniform(0.1, 0.5), rng.uniform(0.15, 0.95)
    else:
        hue, saturation, value = rng.random(), rng.uniform(0.5, 1.0), rng.uniform(0.3, 1.0)
    return np.array(colorsys.hsv_to_rgb(hue, saturation, value), dtype=np.float32)


def _related(rng: Rng, base: Array) -> Array:
    """A second colour: a shade of the first one, or any."""
    if rng.random() < 0.6:
        return np.clip(base * rng.uniform(0.5, 1.5) + rng.normal(0, 0.04, 3), 0, 1).astype(np.float32)
    return colour(rng)


def _mix(first: Array, second: Array, amount: Array) -> Array:
    return first + (second - first) * np.clip(amount, 0.0, 1.0)[..., None]


def _turned(rng: Rng, size: int) -> Array:
    """Coordinate along a random direction, shape (S, S)."""
    x, y = grid(size)
    angle = rng.uniform(0, 2 * np.pi)
    return np.asarray(x * np.float32(np.cos(angle)) + y * np.float32(np.sin(angle)), dtype=np.float32)


def _plain(rng: Rng, size: int) -> Array:
    return np.broadcast_to(colour(rng), (size, size, 3))


def _gradient(rng: Rng, size: int) -> Array:
    base = colour(rng)
    along = _turned(rng, size)
    return _mix(base, _related(rng, base), (along - along.min()) / np.float32(np.ptp(along)))


def _noise(rng: Rng, size: int) -> Array:
    base = colour(rng)
    field = fractal_noise(rng, size, rng.uniform(2, 24), int(rng.integers(1, 6)), rng.uniform(0.4, 0.9))
    out = _mix(base, _related(rng, base), 0.5 + field * rng.uniform(0.2, 0.8))
    if rng.random() < 0.3:
        out = _mix(out, colour(rng), fractal_noise(rng, size, rng.uniform(2, 10), 3))
    return out


def _stripes(rng: Rng, size: int) -> Array:
    base = colour(rng)
    phase = _turned(rng, size) * rng.uniform(3, 30)
    if rng.random() < 0.5:
        phase = phase + smooth_noise(rng, size, 4) * rng.uniform(0.05, 0.6)
    wave = np.sin(2 * np.pi * phase) * rng.choice([0.7, 4.0]) + rng.uniform(-0.5, 0.5)
    return _mix(base, _related(rng, base), (0.5 + wave).astype(np.float32))


def _checks(rng: Rng, size: int) -> Array:
    base = colour(rng)
    x, y = grid(size)
    count = rng.uniform(2, 16)
    if rng.random() < 0.5:
        field = (np.floor(x * count) + np.floor(y * count)) % 2
    else:  # tiles or bricks: thin joints
        row = np.floor(y * count)
        shift = 0.5 * (row % 2) if rng.random() < 0.5 else 0.0
        joint = rng.uniform(0.05, 0.15)
        field = np.maximum((x * count * 0.5 + shift) % 1.0 < joint / 2, (y * count) % 1.0 < joint)
    return _mix(base, _related(rng, base), np.broadcast_to(field, (size, size)).astype(np.float32))


def _dots(rng: Rng, size: int) -> Array:
    base = colour(rng)
    x, y = grid(size)
    count = rng.uniform(3, 16)
    distance = np.hypot((x * count) % 1.0 - 0.5, (y * count) % 1.0 - 0.5)
    return _mix(base, _related(rng, base), ((rng.uniform(0.15, 0.4) - distance) * 12).astype(np.float32))


def _wood(rng: Rng, size: int) -> Array:
    base = colour(rng)
    grain = fractal_noise(rng, size, 2.5, 3, aspect=rng.choice([0.2, 6.0]))
    line = np.sin(grain * rng.uniform(3, 12)) * 0.4 + 0.5 + 0.15 * rng.standard_normal((size, size)).astype(np.float32)
    return _mix(base, (base * rng.uniform(0.5, 0.8)).astype(np.float32), line.astype(np.float32))


def _marble(rng: Rng, size: int) -> Array:
    base = colour(rng)
    veins = np.abs(fractal_noise(rng, size, rng.uniform(2, 6), 5, 0.6))
    return _mix(base, _related(rng, base), (1.0 - veins * rng.uniform(1.5, 5)).astype(np.float32))


def _marks(rng: Rng, size: int) -> Array:
    """Rows of small marks like print, over a colour."""
    base, ink = colour(rng), colour(rng)
    canvas = Image.new("L", (size, size))
    draw = ImageDraw.Draw(canvas)
    y, height = float(rng.uniform(0, 8)), float(rng.uniform(0.02, 0.08) * size)
    while y < size:
        x = float(rng.uniform(0, 0.1) * size)
        while x < size:
            width = float(rng.uniform(0.3, 2.5) * height)
            draw.rectangle((x, y, x + width, y + height * 0.6), fill=255)
            x += width + float(rng.uniform(0.15, 0.8) * height)
        y += height * float(rng.uniform(1.1, 2.2))
    return _mix(base, ink, np.asarray(canvas, dtype=np.float32) / 255)


def _patches(rng: Rng, size: int) -> Array:
    """Random polygons and spots over each other, sharp."""
    canvas = Image.new("RGB", (size, size), _rgb(colour(rng)))
    draw = ImageDraw.Draw(canvas)
    for _ in range(int(rng.integers(8, 50))):
        cx, cy = rng.uniform(0, size, 2)
        radius = rng.uniform(0.02, 0.25) * size
        if rng.random() < 0.5:
            draw.ellipse((cx - radius, cy - radius * 0.8, cx + radius, cy + radius * 0.8), fill=_rgb(colour(rng)))
        else:
            points = rng.normal(0, radius, (int(rng.integers(3, 6)), 2)) + np.array((cx, cy))
            draw.polygon([tuple(p) for p in points.tolist()], fill=_rgb(colour(rng)))
    return np.asarray(canvas, dtype=np.float32) / 255


def _rgb(value: Array) -> tuple[int, int, int]:
    red, green, blue = (int(v * 255) for v in value)
    return red, green, blue


_KINDS: tuple[tuple[Callable[[Rng, int], Array], float], ...] = (
    (_plain, 0.38),
    (_gradient, 0.14),
    (_noise, 0.2),
    (_stripes, 0.05),
    (_checks, 0.04),
    (_dots, 0.02),
    (_wood, 0.06),
    (_marble, 0.04),
    (_marks, 0.04),
    (_patches, 0.03),
)


def texture(rng: Rng, size: int, shapes: bool = True) -> Array:
    """Draw one surface.

    Args:
        rng: Generator.
        size: Height and width in pixels.
        shapes: Whether it may be a heap of sharp, large shapes.

    Returns:
        sRGB values, shape (S, S, 3), float32 in [0, 1].
    """
    weights = np.array([weight if shapes or draw is not _patches else 0.0 for draw, weight in _KINDS])
    kind = int(rng.choice(len(_KINDS), p=weights / weights.sum()))
    return np.clip(_KINDS[kind][0](rng, size), 0.0, 1.0).astype(np.float32)
