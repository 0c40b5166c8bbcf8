"""Procedural scenes with exact alpha.

``generate(seed, index, size)`` draws a background, one to three objects of random silhouette with textures, shading,
soft or hairy edges and perhaps glass, the shadows and reflections that they throw (which belong to the background),
composes them and ages the result as a camera and a JPEG file would. Alpha is the very one that the composition used.
A scene depends on the arguments alone. It should hold an object that a person would point at: what nobody could tell
from the background, or would take for the background, is a mistake of the generator and not a task for the network.
"""

from __future__ import annotations

import io
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from matteserve_export.demo_model.shapes import Part, draw_silhouette, fur, transform
from matteserve_export.demo_model.textures import blur, colour, fractal_noise, grid, smooth_noise, texture

__all__ = ["Scene", "generate"]

Array = NDArray[np.floating[Any]]
Rng = np.random.Generator

_SUPERSAMPLING = 3
_MATERIALS = 3

_BACKGROUNDS = ("studio", "surface", "room", "landscape", "clutter")
_SHARES = (0.58, 0.14, 0.12, 0.07, 0.09)
_HARD_SHARES = (0.40, 0.14, 0.20, 0.12, 0.14)


class Scene(NamedTuple):
    """One generated picture.

    Attributes:
        image: Shape (S, S, 3), uint8, sRGB.
        alpha: Shape (S, S), uint8, 0 background to 255 foreground.
        background: Kind of the background.
        families: Shape families of the objects.
    """

    image: NDArray[np.uint8]
    alpha: NDArray[np.uint8]
    background: str
    families: tuple[str, ...]


class _Object(NamedTuple):
    """One object: colour (S, S, 3) and alpha (S, S), both float32 in [0, 1], and the y of its foot in pixels."""

    colour: Array
    alpha: Array
    foot: float
    family: str


def generate(seed: int, index: int, size: int, hard: bool = False) -> Scene:
    """Generate scene ``index`` of the series ``seed``.

    Args:
        seed: Series; training and evaluation use different ones.
        index: Number of the scene in its series.
        size: Height and width in pixels.
        hard: Fewer plain backgrounds, for training; what is measured is measured without.
    """
    rng = np.random.default_rng((seed, index))
    kind, image = _background(rng, size, _HARD_SHARES if hard else _SHARES)
    objects = _objects(rng, size)
    light = rng.uniform(-1.0, 1.0)
    alpha: Array = np.zeros((size, size), dtype=np.float32)
    linear = rng.random() < 0.25
    if rng.random() < 0.65:
        for item in objects:
            image = _shadow(rng, image, item, light)
    if rng.random() < 0.1:
        for item in objects:
            image = _reflection(rng, image, item)
    for item in objects:
        item = _visible(rng, image, item)
        image = _over(item.colour, image, item.alpha, linear)
        alpha = alpha + (1.0 - alpha) * item.alpha
    pixels = _camera(rng, image)
    return Scene(pixels, np.round(alpha * 255.0).astype(np.uint8), kind, tuple(item.family for item in objects))


def _over(front: Array, back: Array, alpha: Array, linear: bool) -> Array:
    weight = alpha[..., None]
    if linear:  # light adds up linearly; a gamma of 2.2 stands for the sRGB curve
        mixed = np.maximum(front, 0) ** 2.2 * weight + np.maximum(back, 0) ** 2.2 * (1 - weight)
        return np.asarray(mixed ** (1 / 2.2), dtype=np.float32)
    return front * weight + back * (1 - weight)


def _visible(rng: Rng, image: Array, item: _Object) -> _Object:
    """Brighten or darken an object that nobody could tell from what lies behind it."""
    inside = item.alpha > 0.5
    if not inside.any():
        return item
    front, back = item.colour[inside], image[inside]
    if np.abs(front.mean(0) - back.mean(0)).max() > 0.12:
        return item
    step = np.float32(rng.uniform(0.15, 0.4) * (1.0 if front.mean() < 0.5 else -1.0))
    return item._replace(colour=np.clip(item.colour + step, 0, 1).astype(np.float32))


# --- background ---


def _background(rng: Rng, size: int, shares: tuple[float, ...]) -> tuple[str, Array]:
    kind = str(rng.choice(_BACKGROUNDS, p=shares))
    if kind == "studio":
        image = _studio(rng, size)
    elif kind == "surface":
        image = _ground(rng, size)
        if rng.random() < 0.4:
            image = blur(image, size * rng.uniform(0.004, 0.04))
    elif kind == "room":
        image = _room(rng, size)
    elif kind == "landscape":
        image = _landscape(rng, size)
    else:
        image = _clutter(rng, size)
    if rng.random() < 0.5:  # uneven light
        field = smooth_noise(rng, size, 2) * rng.uniform(0.02, 0.15)
        image = image * (1.0 + field)[..., None]
    if rng.random() < 0.3:  # vignette
        x, y = grid(size)
        centre = rng.uniform(0.35, 0.65, 2)
        distance = (x - centre[0]) ** 2 + (y - centre[1]) ** 2
        image = image * (1.0 - rng.uniform(0.2, 1.0) * distance)[..., None].astype(np.float32)
    return kind, np.clip(image, 0.0, 1.0).astype(np.float32)


def _ground(rng: Rng, size: int) -> Array:
    """Texture of what things stand on or in front of.

    No heap of sharp shapes: those are things themselves, and nobody could say which of them is meant. Mostly quiet: as
    loud as the object, wall and floor would ask for the eye as much as it does.
    """
    image = texture(rng, size, shapes=False)
    if rng.random() < 0.6:
        image = image.mean((0, 1)) + (image - image.mean((0, 1))) * np.float32(rng.uniform(0.1, 0.7))
    return image


def _studio(rng: Rng, size: int) -> Array:
    """Paper or a wall: nearly white, grey, black or coloured, perhaps with a soft floor line."""
    draw = rng.random()
    if draw < 0.45:
        base = np.float32(rng.uniform(0.88, 1.0)) + rng.normal(0, 0.01, 3).astype(np.float32)
    elif draw < 0.65:
        base = np.float32(rng.uniform(0.3, 0.9)) + rng.normal(0, 0.02, 3).astype(np.float32)
    elif draw < 0.75:
        base = np.abs(rng.normal(0, 0.08, 3)).astype(np.float32)
    else:
        base = colour(rng)
    _, y = grid(size)
    other = np.clip(base * rng.uniform(0.75, 1.1), 0, 1) if rng.random() < 0.8 else colour(rng)
    if rng.random() < 0.45:  # wall and floor
        line, softness = rng.uniform(0.45, 0.9), rng.uniform(0.004, 0.15)
        amount = np.clip((y - line) / softness + 0.5, 0, 1)
    else:
        amount = y if rng.random() < 0.4 else np.zeros_like(y)
    amount = np.broadcast_to(amount, (size, size))[..., None]
    return np.asarray(base + (other - base) * amount, dtype=np.float32)


def _room(rng: Rng, size: int) -> Array:
    """Textured wall over a textured table or floor."""
    wall, floor = _ground(rng, size), _ground(rng, size)
    if rng.random() < 0.6:  # the camera is focused on the object, which stands before the wall
        wall = blur(wall, size * rng.uniform(0.005, 0.05))
    _, y = grid(size)
    edge = rng.uniform(0.35, 0.85) + 0.0 * y
    amount = np.clip((y - edge) * size / rng.uniform(1.0, 12.0) + 0.5, 0, 1)[..., None].astype(np.float32)
    return wall + (floor - wall) * amount


def _landscape(rng: Rng, size: int) -> Array:
    """Sky, layers of hills or trees, ground."""
    _, y = grid(size)
    sky = np.array((rng.uniform(0.4, 0.9), rng.uniform(0.55, 0.9), rng.uniform(0.7, 1.0)), dtype=np.float32)
    image: Array = sky + (rng.uniform(0.7, 1.3) * sky - sky) * np.broadcast_to(y, (size, size))[..., None]
    clouds = np.clip(fractal_noise(rng, size, 3, 4, 0.6, 0.5) * 0.5, 0, 0.8)[..., None]
    image = image + (1 - image) * clouds * (rng.random() < 0.6)
    level = rng.uniform(0.25, 0.6)
    for _ in range(int(rng.integers(1, 4))):
        ridge = level + 0.05 * np.cumsum(rng.normal(0, 0.3, 8))
        line = np.interp(np.linspace(0, 7, size), np.arange(8), ridge).astype(np.float32)[None, :]
        rough = fractal_noise(rng, size, 12, 3, 0.7) * rng.uniform(0.0, 0.03)
        mask = np.clip((y - line + rough) * size * 0.5, 0, 1)[..., None].astype(np.float32)
        ground = np.array((rng.uniform(0.1, 0.6), rng.uniform(0.2, 0.6), rng.uniform(0.05, 0.45)), dtype=np.float32)
        noise = fractal_noise(rng, size, rng.uniform(6, 40), 4, 0.8)[..., None] * rng.uniform(0.03, 0.2)
        image = image + (ground * (1 + noise) - image) * mask
        level += rng.uniform(0.08, 0.25)
    if rng.random() < 0.7:
        image = blur(image.astype(np.float32), size * rng.uniform(0.002, 0.03))
    return np.asarray(image, dtype=np.float32)


def _clutter(rng: Rng, size: int) -> Array:
    """Many things out of focus, or lights as discs."""
    image = texture(rng, size).copy()
    if rng.random() < 0.25:
        canvas = Image.fromarray((np.clip(image * rng.uniform(0.1, 0.6), 0, 1) * 255).astype(np.uint8))
        pen = ImageDraw.Draw(canvas)
        for _ in range(int(rng.integers(10, 50))):
            cx, cy = rng.uniform(0, size, 2)
            radius = rng.uniform(0.01, 0.06) * size
            fill = tuple(int(v * 255) for v in colour(rng))
            pen.ellipse((cx - radius, cy - radius, cx + radius, cy + radius), fill=fill)
        return blur(np.asarray(canvas, dtype=np.float32) / 255, size * rng.uniform(0.008, 0.02))
    for _ in range(int(rng.integers(4, 14))):
        extent = rng.uniform(0.1, 0.5, 2)
        corner = rng.uniform(-0.2, 1.0, 2)
        _, parts = draw_silhouette(rng)
        parts = transform(parts, (corner[0], corner[1], corner[0] + extent[0], corner[1] + extent[1]))
        weights = _paint(parts, [], size, 1)
        for weight in weights:
            image = image + (colour(rng) - image) * weight[..., None]
    return blur(image.astype(np.float32), size * rng.uniform(0.015, 0.05))


# --- objects ---


def _objects(rng: Rng, size: int) -> list[_Object]:
    count = int(rng.choice([1, 2, 3], p=[0.86, 0.1, 0.04]))
    # The eye takes what is large and near the middle; several objects share the width.
    objects = []
    for number in range(count):
        share = 1.0 if count == 1 else 0.75 / count**0.4
        height = float(np.clip(rng.normal(0.74, 0.17), 0.3, 1.2)) * share
        name, parts = draw_silhouette(rng)
        every = np.concatenate([part.points for part in parts])
        extent = np.ptp(every, axis=0)
        aspect = float(np.clip(extent[0] / max(extent[1], 1e-6) * np.exp(rng.normal(0, 0.22)), 0.15, 5.0))
        width = height * aspect
        if width > 1.1 * share:
            width, height = 1.1 * share, 1.1 * share / aspect
        if width * height < 0.05:  # very thin ones are drawn larger
            grow = min(np.sqrt(0.05 / (width * height)), 1.1 / max(width, height))
            width, height = width * grow, height * grow
        if width * height > 0.8:  # what fills the picture would be taken for its background
            width, height = (side * np.sqrt(0.8 / (width * height)) for side in (width, height))
        cx = float(np.clip(rng.normal(0.5, 0.07), 0.2, 0.8))
        if count > 1:
            cx = (number + 0.5) / count * 0.8 + 0.1 + float(rng.normal(0, 0.04))
        cy = float(np.clip(rng.normal(0.52, 0.07), 0.25, 0.8))
        if name == "portrait" and rng.random() < 0.8:  # cut by the lower border
            cy = 1.02 + float(rng.uniform(0.0, 0.15)) - height / 2
        elif rng.random() < 0.06:
            cx, cy = float(rng.uniform(0.1, 0.9)), float(rng.uniform(0.2, 0.9))
        # At most a fifth is cut away on a side: of a corner nobody knows whether it is an object.
        cx, cy = float(np.clip(cx, 0.3 * width, 1 - 0.3 * width)), float(np.clip(cy, 0.3 * height, 1 - 0.3 * height))
        box = (cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2)
        objects.append(_object(rng, name, transform(parts, box), box, size))
    return objects


def _paint(parts: list[Part], strands: list[NDArray[np.float64]], size: int, factor: int) -> list[Array]:
    """Coverage of each material, (S, S) float32, drawn at ``factor`` times the size and averaged."""
    canvas = Image.new("L", (size * factor, size * factor))
    pen = ImageDraw.Draw(canvas)
    scale = size * factor
    for strand in strands:
        pen.line([tuple(p) for p in (strand * scale).tolist()], fill=1, width=1 if size < 256 else 2)
    for part in parts:
        pen.polygon([tuple(p) for p in (part.points * scale).tolist()], fill=part.material)
    drawn = np.asarray(canvas)
    weights = []
    for material in range(1, _MATERIALS + 1):
        mask = Image.fromarray((drawn == material).view(np.uint8) * np.uint8(255))
        weights.append(np.asarray(mask.reduce(factor), dtype=np.float32) / np.float32(255))
    return weights


def _object(rng: Rng, name: str, parts: list[Part], box: tuple[float, float, float, float], size: int) -> _Object:
    hairy = name in ("animal", "face", "portrait", "blob", "figure") and rng.random() < 0.2
    strands = fur(rng, parts, rng.uniform(0.03, 0.12) * (box[3] - box[1])) if hairy else []
    weights = _paint(parts, strands, size, _SUPERSAMPLING)
    coverage = np.minimum(sum(weights[1:], weights[0]), 1.0).astype(np.float32)

    surface = np.zeros((size, size, 3), dtype=np.float32)
    alpha = np.zeros((size, size), dtype=np.float32)
    glass = rng.random() < 0.06
    main = texture(rng, size)
    for number, weight in enumerate(weights):
        if not weight.any():
            continue
        skin = main if number == 0 or rng.random() < 0.3 else texture(rng, size)
        surface += skin * weight[..., None]
        opacity = rng.uniform(0.55, 0.9) if glass and (number == 0 or rng.random() < 0.5) else 1.0
        alpha += weight * np.float32(opacity)
    surface /= np.maximum(coverage, 1e-3)[..., None]
    if hairy or coverage.max() > 0:  # colour must go on beyond the outline, where coverage is thin
        thin = coverage < 0.02
        surface[thin] = main[thin]

    height = size * (box[3] - box[1])
    surface = _shade(rng, surface, coverage, height)
    edge = rng.random()
    if edge < 0.35:
        alpha = blur(alpha, size * rng.uniform(0.001, 0.004))
    elif edge < 0.4:
        alpha = blur(alpha, size * rng.uniform(0.004, 0.015))
    return _Object(surface, np.clip(alpha, 0, 1).astype(np.float32), min(box[3], 1.0) * size, name)


def _shade(rng: Rng, surface: Array, coverage: Array, height: float) -> Array:
    """Light from a pseudo height map: the coverage, blurred, is highest in the middle of the object."""
    if rng.random() < 0.2:
        return surface
    strength = rng.uniform(0.1, 0.9)
    relief = blur(coverage, max(height, 8.0) * rng.uniform(0.03, 0.15)) * coverage
    if rng.random() < 0.3:
        relief = relief + fractal_noise(rng, coverage.shape[0], rng.uniform(5, 20), 3) * np.float32(0.03)
    gy, gx = np.gradient(relief)
    steep = np.float32(height * rng.uniform(0.1, 0.5))
    nx, ny = -gx * steep, -gy * steep
    norm = 1.0 / np.sqrt(nx * nx + ny * ny + 1.0)
    angle = rng.uniform(-np.pi, 0.0)  # mostly from above
    lx, ly, lz = np.cos(angle) * 0.7, np.sin(angle) * 0.7, 0.714
    lambert = np.clip((nx * lx + ny * ly + lz) * norm, 0, 1)
    out = surface * (1.0 - strength + strength * lambert * 1.25)[..., None]
    if rng.random() < 0.4:  # gloss
        gloss = np.clip((nx * lx + ny * ly + 1.9 * lz) * norm / 2.0, 0, 1) ** rng.uniform(15, 80)
        out = out + (gloss * rng.uniform(0.1, 0.7))[..., None]
    return np.asarray(np.clip(out, 0, 1), dtype=np.float32)


# --- what objects do to the background ---


def _shift(field: Array, dx: int, dy: int) -> Array:
    out = np.zeros_like(field)
    h, w = field.shape
    if abs(dx) >= w or abs(dy) >= h:
        return out
    out[max(dy, 0) : h + min(dy, 0), max(dx, 0) : w + min(dx, 0)] = field[
        max(-dy, 0) : h + min(-dy, 0), max(-dx, 0) : w + min(-dx, 0)
    ]
    return out


def _shadow(rng: Rng, image: Array, item: _Object, light: float) -> Array:
    size = item.alpha.shape[0]
    kind = rng.random()
    if kind < 0.45:  # contact shadow: a flat soft ellipse under the foot
        x, y = grid(size)
        column = item.alpha.max(0)
        inside = np.flatnonzero(column > 0.3)
        if inside.size == 0:
            return image
        centre, half = (inside[0] + inside[-1]) / 2 / size, max((inside[-1] - inside[0]) / 2 / size, 0.02)
        flat = rng.uniform(0.06, 0.3) * half
        distance = ((x - centre - 0.1 * light * half) / (half * rng.uniform(0.7, 1.15))) ** 2
        distance = distance + ((y - item.foot / size) / flat) ** 2
        shade = np.exp(-distance * rng.uniform(0.7, 2.0)).astype(np.float32)
    elif kind < 0.75:  # on the wall behind, or on the table around
        reach = size * rng.uniform(0.01, 0.07)
        shade = _shift(item.alpha, int(light * reach), int(reach * rng.uniform(0.1, 1.0)))
        shade = blur(shade, size * rng.uniform(0.005, 0.04))
    else:  # cast along the floor: the silhouette, squeezed and sheared about its foot
        squeeze, shear = rng.uniform(0.15, 0.5), light * rng.uniform(0.3, 1.2)
        foot = item.foot
        coefficients = (1.0, shear / squeeze, -shear / squeeze * foot, 0.0, 1.0 / squeeze, foot - foot / squeeze)
        source = Image.fromarray((item.alpha * 255).astype(np.uint8))
        cast = source.transform((size, size), Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR)
        shade = blur(np.asarray(cast, dtype=np.float32) / 255, size * rng.uniform(0.003, 0.025))
    tint = 1.0 - rng.uniform(0.9, 1.1, 3).astype(np.float32) * np.float32(rng.uniform(0.12, 0.6))
    return np.asarray(image * (1.0 + (np.clip(tint, 0.2, 1.0) - 1.0) * shade[..., None]))


def _reflection(rng: Rng, image: Array, item: _Object) -> Array:
    size = item.alpha.shape[0]
    foot = round(item.foot)
    rows = np.arange(size)
    mirrored = 2 * foot - rows - 1
    usable = (rows >= foot) & (mirrored >= 0)
    source = np.clip(mirrored, 0, size - 1)
    fade = np.where(usable, np.exp(-(rows - foot) / (size * rng.uniform(0.03, 0.15))), 0.0) * rng.uniform(0.1, 0.4)
    weight = item.alpha[source] * fade.astype(np.float32)[:, None]
    return image + (item.colour[source] - image) * weight[..., None]


# --- camera ---


def _camera(rng: Rng, image: Array) -> NDArray[np.uint8]:
    """Exposure, colour cast, softness, sensor noise, JPEG."""
    if rng.random() < 0.5:
        image = np.clip(image, 0, 1) ** np.float32(np.exp(rng.normal(0, 0.2)))
    if rng.random() < 0.3:
        image = image * rng.normal(1.0, 0.06, 3).astype(np.float32)
    if rng.random() < 0.25:
        image = blur(image, image.shape[0] * rng.uniform(0.0008, 0.003))
    if rng.random() < 0.5:
        noise = rng.standard_normal(image.shape[:2] + ((3,) if rng.random() < 0.5 else (1,)), dtype=np.float32)
        image = image + noise * np.float32(rng.uniform(0.003, 0.03))
    pixels = np.round(np.clip(image, 0, 1) * 255).astype(np.uint8)
    if rng.random() < 0.5:
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "JPEG", quality=int(rng.integers(45, 96)))
        pixels = np.asarray(Image.open(stream).convert("RGB"))
    return pixels
