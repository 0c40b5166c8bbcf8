"""Render `scene.jpg`, the picture of the demonstration: a rubber duck with a tuft, on a table, marched in numpy.

    python examples/render_scene.py examples/scene.jpg

The project's own picture, so that nothing has to be downloaded and nobody's licence is in the way. It is no training
data: the demonstration model has not seen this duck, nor this renderer.
"""

from __future__ import annotations

import sys

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Array = NDArray[np.float32]

WIDTH, HEIGHT, OVERSAMPLING = 960, 640, 2
CAMERA = np.float32([0.0, 1.25, -5.2])
LIGHT = np.float32([0.55, 0.75, -0.45]) / np.float32(np.linalg.norm([0.55, 0.75, -0.45]))
YELLOW, ORANGE, BLACK, WHITE = (np.float32(c) for c in ([0.95, 0.62, 0.04], [0.85, 0.22, 0.03], [0.02] * 3, [0.9] * 3))
TABLE, WALL = np.float32([0.36, 0.52, 0.55]), np.float32([0.55, 0.66, 0.66])


def ellipsoid(p: Array, centre: tuple[float, float, float], radii: tuple[float, float, float]) -> Array:
    """Distance (a bound of it) to an ellipsoid; `p` has shape (N, 3)."""
    r = np.float32(radii)
    q = p - np.float32(centre)
    k0, k1 = np.linalg.norm(q / r, axis=1), np.linalg.norm(q / (r * r), axis=1)
    return k0 * (k0 - 1) / np.maximum(k1, 1e-6)


def capsule(p: Array, a: tuple[float, float, float], b: tuple[float, float, float], radius: float) -> Array:
    """Distance to a rod with round ends."""
    start, axis = np.float32(a), np.float32(b) - np.float32(a)
    along = np.clip((p - start) @ axis / (axis @ axis), 0, 1)[:, None]
    return np.linalg.norm(p - start - along * axis, axis=1) - radius


def blend(a: Array, b: Array, width: float) -> Array:
    """Smooth union of two shapes."""
    h = np.maximum(width - np.abs(a - b), 0) / width
    return np.minimum(a, b) - h * h * width / 4


def duck_parts(p: Array) -> list[tuple[Array, Array]]:
    """Distances of the duck's parts, each with its colour."""
    body = ellipsoid(p, (0.0, 0.62, 0.0), (1.05, 0.62, 0.74))
    tail = ellipsoid(p, (-0.98, 0.95, 0.0), (0.36, 0.22, 0.26))
    head = ellipsoid(p, (0.62, 1.52, 0.0), (0.52, 0.50, 0.50))
    body = blend(blend(body, tail, 0.45), head, 0.30)
    wing = ellipsoid(p, (-0.12, 0.80, -0.62), (0.52, 0.30, 0.20))
    body = blend(body, wing, 0.07)
    tuft = np.minimum.reduce(
        [
            capsule(p, (0.55 + 0.03 * i, 1.98, 0.02 * i), (0.28 + 0.13 * i, 2.32 - 0.05 * abs(i), 0.05 * i), 0.012)
            for i in range(-3, 4)
        ]
    )
    beak = blend(
        ellipsoid(p, (1.12, 1.46, -0.06), (0.30, 0.085, 0.24)),
        ellipsoid(p, (1.08, 1.36, -0.06), (0.24, 0.06, 0.19)),
        0.04,
    )
    eye = ellipsoid(p, (0.84, 1.66, -0.38), (0.105, 0.125, 0.08))
    glint = ellipsoid(p, (0.87, 1.70, -0.45), (0.03, 0.03, 0.025))
    return [(np.minimum(body, tuft), YELLOW), (beak, ORANGE), (eye, BLACK), (glint, WHITE)]


def distance(p: Array) -> Array:
    """Distance to the nearest surface: duck, table, or the curve where the table becomes a wall."""
    duck = np.minimum.reduce([part for part, _ in duck_parts(p)])
    return np.minimum(duck, blend(p[:, 1], 4.0 - p[:, 2], 2.5))


def normals(p: Array) -> Array:
    """Unit normals by central differences."""
    steps = np.eye(3, dtype=np.float32) * 0.002
    gradient = np.stack([distance(p + step) - distance(p - step) for step in steps], axis=1)
    return gradient / np.maximum(np.linalg.norm(gradient, axis=1, keepdims=True), 1e-6)


def march(origin: Array, direction: Array, steps: int, limit: float) -> Array:
    """Follow rays to the first surface; return the distance travelled."""
    travelled = np.zeros(len(direction), np.float32)
    active = np.arange(len(direction))
    for _ in range(steps):
        gap = distance(origin[active] + travelled[active, None] * direction[active])
        travelled[active] += gap
        active = active[(gap > 0.0008) & (travelled[active] < limit)]
        if not len(active):
            break
    return travelled


def soft_shadow(p: Array) -> Array:
    """Share of the light that reaches a point, 0 to 1, with a penumbra."""
    lit, travelled = np.ones(len(p), np.float32), np.full(len(p), 0.03, np.float32)
    for _ in range(40):
        gap = distance(p + travelled[:, None] * LIGHT)
        lit = np.minimum(lit, np.clip(9 * gap / travelled, 0, 1))
        travelled += np.clip(gap, 0.02, 0.25)
    return lit


def occlusion(p: Array, normal: Array) -> Array:
    """Share of the sky that a point sees, 0 to 1."""
    dark = sum((h - distance(p + h * normal)) * w for h, w in ((0.06, 1.0), (0.18, 0.5), (0.42, 0.25)))
    return np.clip(1 - 1.6 * np.asarray(dark), 0, 1)


def shade(p: Array, direction: Array) -> Array:
    """Linear RGB of the surface points, shape (N, 3)."""
    parts = duck_parts(p)
    distances = np.stack([part for part, _ in parts])
    on_duck = distances.min(axis=0) < 0.01
    fade = np.clip((p[:, 2] + p[:, 1] - 1) / 5, 0, 1)[:, None]
    albedo = np.where(
        on_duck[:, None], np.stack([c for _, c in parts])[distances.argmin(axis=0)], TABLE + fade * (WALL - TABLE)
    )
    normal = normals(p)
    sun = np.maximum(normal @ LIGHT, 0) * soft_shadow(p + 0.01 * normal)
    sky = (0.55 + 0.45 * normal[:, 1]) * occlusion(p, normal)
    half = LIGHT - direction
    half /= np.linalg.norm(half, axis=1, keepdims=True)
    gloss = np.maximum((normal * half).sum(axis=1), 0) ** 70 * on_duck * (sun > 0)
    rim = np.maximum(1 + (normal * direction).sum(axis=1), 0) ** 4 * on_duck
    light = 1.25 * sun[:, None] * np.float32([1.0, 0.94, 0.85]) + 0.55 * sky[:, None] * np.float32([0.85, 0.93, 1.0])
    return albedo * light + 0.55 * gloss[:, None] + 0.10 * rim[:, None]


def render(width: int, height: int) -> NDArray[np.uint8]:
    """The picture, shape (height, width, 3), uint8, sRGB."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    plane = np.stack([(x - width / 2) / height, (height / 2 - y) / height - 0.04, np.full_like(x, 1.35)], axis=-1)
    picture = np.empty((height * width, 3), np.float32)
    rays = plane.reshape(-1, 3)
    for start in range(0, len(rays), 1 << 16):
        direction = rays[start : start + (1 << 16)]
        direction = direction / np.linalg.norm(direction, axis=1, keepdims=True)
        origin = np.broadcast_to(CAMERA, direction.shape)
        picture[start : start + (1 << 16)] = shade(
            origin + march(origin, direction, 110, 14.0)[:, None] * direction, direction
        )
    linear = np.clip(picture.reshape(height, width, 3), 0, None)
    mapped = linear * (1 + linear / 4) / (1 + linear)  # highlights roll off, as on film
    return (255 * np.clip(1.12 * mapped, 0, 1) ** (1 / 2.2)).round().astype(np.uint8)


if __name__ == "__main__":
    large = Image.fromarray(render(WIDTH * OVERSAMPLING, HEIGHT * OVERSAMPLING))
    large.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS).save(sys.argv[1], quality=92)
