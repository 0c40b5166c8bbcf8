"""Silhouettes of the generated scenes: families of objects put together from polygons.

A silhouette is a list of parts in local coordinates, x to the right and y down, of any extent; the scene scales them to
the object's box. Each part is a closed polygon with a material number, so that one object can carry several colours,
and a hole is a part with material ``HOLE``. Everything is drawn from the caller's generator.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["FAMILIES", "HOLE", "Part", "draw_silhouette", "fur", "transform"]

Points = NDArray[np.float64]
Rng = np.random.Generator

HOLE = 0
"""Material number of a part that cuts away what was painted before it."""


class Part(NamedTuple):
    """One closed polygon: points of shape (N, 2) as (x, y), and the material that fills it."""

    points: Points
    material: int = 1


def _polar(radius: NDArray[np.float64] | float, count: int) -> Points:
    angle = np.linspace(0.0, 2.0 * np.pi, count, endpoint=False)
    return np.stack((np.cos(angle) * radius, np.sin(angle) * radius), 1)


def _ellipse(cx: float, cy: float, rx: float, ry: float, count: int = 40) -> Points:
    return _polar(1.0, count) * (rx, ry) + (cx, cy)


def _box(x0: float, y0: float, x1: float, y1: float) -> Points:
    return np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], dtype=np.float64)


def _capsule(ax: float, ay: float, bx: float, by: float, ra: float, rb: float) -> Points:
    """Thick stroke from a to b with round ends of radius ra and rb."""
    along = np.arctan2(by - ay, bx - ax)
    half = np.linspace(-np.pi / 2, np.pi / 2, 9)
    end = np.stack((np.cos(along + half), np.sin(along + half)), 1) * rb + (bx, by)
    start = np.stack((np.cos(along + np.pi + half), np.sin(along + np.pi + half)), 1) * ra + (ax, ay)
    return np.concatenate((end, start))


def _smooth(points: Points, rounds: int = 2) -> Points:
    """Cut corners (Chaikin)."""
    for _ in range(rounds):
        following = np.roll(points, -1, 0)
        points = np.stack((0.75 * points + 0.25 * following, 0.25 * points + 0.75 * following), 1).reshape(-1, 2)
    return points


def _mirror(profile: Points) -> Points:
    """Outline of a body of revolution, from the right half of its profile, top to bottom."""
    return np.concatenate((profile, profile[::-1] * (-1.0, 1.0)))


def superellipse(rng: Rng) -> list[Part]:
    """Between a diamond, an ellipse and a rounded rectangle."""
    angle = np.linspace(0.0, 2.0 * np.pi, 72, endpoint=False)
    power = 2.0 / rng.uniform(1.2, 8.0)
    c, s = np.cos(angle), np.sin(angle)
    points = np.stack((np.sign(c) * np.abs(c) ** power, np.sign(s) * np.abs(s) ** power), 1)
    parts = [Part(points)]
    if rng.random() < 0.35:  # a label or a lid
        y0, y1 = sorted(rng.uniform(-0.8, 0.8, 2))
        parts.append(Part(_box(-0.7, y0, 0.7, y1 + 0.1) * rng.uniform(0.6, 1.0), 2))
    return parts


def blob(rng: Rng) -> list[Part]:
    """Smooth random outline."""
    angle = np.linspace(0.0, 2.0 * np.pi, 90, endpoint=False)
    radius = np.ones_like(angle)
    for order in range(1, int(rng.integers(4, 10))):
        radius += rng.normal(0.0, 0.32 / order) * np.cos(order * angle + rng.uniform(0.0, 2.0 * np.pi))
    parts = [Part(_polar(np.maximum(radius, 0.15), 90))]
    if rng.random() < 0.3:
        cx, cy = rng.uniform(-0.3, 0.3, 2)
        parts.append(Part(_ellipse(cx, cy, rng.uniform(0.15, 0.4), rng.uniform(0.15, 0.4)), 2))
    return parts


def polygon(rng: Rng) -> list[Part]:
    """Irregular polygon, sharp or with round corners."""
    count = int(rng.integers(3, 10))
    points = _polar(rng.uniform(0.6, 1.0, count), count)
    return [Part(_smooth(points) if rng.random() < 0.5 else points)]


def star(rng: Rng) -> list[Part]:
    """Stars, flowers and gears."""
    arms = int(rng.integers(3, 12))
    radius = np.where(np.arange(2 * arms) % 2 == 0, 1.0, rng.uniform(0.35, 0.8))
    points = _polar(radius, 2 * arms)
    parts = [Part(_smooth(points) if rng.random() < 0.6 else points)]
    if rng.random() < 0.5:
        parts.append(Part(_ellipse(0, 0, 0.3, 0.3), 2 if rng.random() < 0.6 else HOLE))
    return parts


def ring(rng: Rng) -> list[Part]:
    """Rings, frames and handles: a body with one large hole."""
    inner = rng.uniform(0.4, 0.82)
    if rng.random() < 0.5:
        return [Part(_ellipse(0, 0, 1, 1, 72)), Part(_ellipse(0, 0, inner, inner, 72), HOLE)]
    return [Part(_box(-1, -1, 1, 1)), Part(_box(-inner, -inner, inner, inner), HOLE)]


def vessel(rng: Rng) -> list[Part]:
    """Bottles, vases, glasses and lamps: bodies of revolution, upright."""
    knots = int(rng.integers(3, 7))
    y = np.concatenate(([-1.0], np.sort(rng.uniform(-0.9, 0.9, knots)), [1.0]))
    half = rng.uniform(0.12, 0.6, knots + 2)
    if rng.random() < 0.6:  # bottle: narrow neck above a wide body
        half = np.where(y < rng.uniform(-0.7, -0.2), rng.uniform(0.09, 0.2), rng.uniform(0.3, 0.5))
    fine = np.linspace(-1.0, 1.0, 40)
    width = np.interp(fine, y, half)
    kernel = np.ones(5) / 5
    width = np.convolve(np.pad(width, 2, mode="edge"), kernel, mode="valid")
    parts = [Part(_mirror(np.stack((width, fine), 1)))]
    if rng.random() < 0.6:  # cap
        top = rng.uniform(0.1, 0.3)
        parts.append(Part(_box(-width[0] - 0.03, -1.0 - top, width[0] + 0.03, -1.0 + 0.12), 2))
    if rng.random() < 0.6:  # label that follows the body
        first = int(rng.integers(14, 24))
        last = first + int(rng.integers(5, 14))
        parts.append(Part(_mirror(np.stack((width[first:last], fine[first:last]), 1)), 3))
    return parts


def cup(rng: Rng) -> list[Part]:
    """Cups and pots with a handle, seen slightly from above."""
    bottom, tilt = rng.uniform(0.45, 0.95), rng.uniform(0.05, 0.25)
    body = np.array([(-0.8, -0.7), (0.8, -0.7), (0.8 * bottom, 0.8), (-0.8 * bottom, 0.8)])
    handle = rng.uniform(0.3, 0.5)
    parts = [
        Part(_ellipse(0.85, 0.0, handle, handle * 1.1)),
        Part(_ellipse(0.85, 0.0, handle * 0.62, handle * 0.72), HOLE),
        Part(body),
        Part(_ellipse(0, 0.8, 0.8 * bottom, tilt)),
        Part(_ellipse(0, -0.7, 0.8, tilt)),
        Part(_ellipse(0, -0.7, 0.72, tilt * 0.8), 2),
    ]
    if rng.random() < 0.35:  # saucer
        parts.insert(0, Part(_ellipse(0, 0.85, 1.4, tilt * 1.6), 3))
    return parts


def carton(rng: Rng) -> list[Part]:
    """Boxes and books: three faces in parallel projection."""
    width, height, dx, dy = rng.uniform(0.4, 1.0), rng.uniform(0.3, 1.2), rng.uniform(0.1, 0.6), rng.uniform(0.1, 0.4)
    front = _box(-width, -height, width, height)
    top = np.array([(-width, -height), (-width + dx, -height - dy), (width + dx, -height - dy), (width, -height)])
    side = np.array([(width, -height), (width + dx, -height - dy), (width + dx, height - dy), (width, height)])
    parts = [Part(front, 1), Part(top, 2), Part(side, 3)]
    if rng.random() < 0.4:
        parts.append(Part(_box(-width * 0.6, -height * 0.5, width * 0.6, height * rng.uniform(-0.1, 0.5)), 2))
    return parts


def furniture(rng: Rng) -> list[Part]:
    """Chairs, tables and stools: a plate, legs and perhaps a back."""
    leg, seat, width = rng.uniform(0.04, 0.1), rng.uniform(0.05, 0.2), rng.uniform(0.5, 1.0)
    parts = [Part(_box(-width, -seat, width, seat), 2)]
    splay = rng.uniform(0.0, 0.15)
    for x in (-width + leg, -width * 0.6, width * 0.6, width - leg):
        parts.append(Part(_capsule(x, 0, x + splay * np.sign(x), 1.0, leg, leg * 0.8)))
    if rng.random() < 0.6:
        back = -rng.uniform(0.6, 1.3)
        if rng.random() < 0.5:
            parts.append(Part(_smooth(_box(-width, back, width, 0), 1), 2))
        else:
            for x in np.linspace(-width + leg, width - leg, int(rng.integers(2, 6))):
                parts.append(Part(_capsule(x, 0, x, back, leg, leg)))
            parts.append(Part(_capsule(-width, back, width, back, leg * 1.5, leg * 1.5)))
    return parts


def vehicle(rng: Rng) -> list[Part]:
    """Cars, vans and carts from the side."""
    roof, nose = rng.uniform(0.35, 0.8), rng.uniform(0.5, 0.95)
    back, front = rng.uniform(-1.3, -0.6), rng.uniform(0.3, 0.8)
    body = np.array([(-1.5, 0.3), (-1.5, -0.1), (back, -0.15), (back + 0.25, -roof), (front - 0.2, -roof)])
    body = np.concatenate((body, [(front + 0.2, -0.15), (1.5 * nose, -0.05), (1.5, 0.1), (1.5, 0.3)]))
    wheel = rng.uniform(0.2, 0.32)
    parts = [Part(_smooth(body, 1))]
    parts.append(
        Part(
            np.array([(back + 0.2, -0.15), (back + 0.35, -roof + 0.08), (front - 0.25, -roof + 0.08), (front, -0.15)]),
            2,
        )
    )
    for x in (-0.95, 0.95):
        parts += [Part(_ellipse(x, 0.32, wheel, wheel), 3), Part(_ellipse(x, 0.32, wheel * 0.5, wheel * 0.5), 2)]
    return parts


def figure(rng: Rng) -> list[Part]:
    """Standing or moving person: head, trunk, arms and legs of joined capsules."""
    hip, shoulder, girth = rng.uniform(0.08, 0.2), rng.uniform(0.2, 0.36), rng.uniform(0.07, 0.13)
    parts = [Part(np.array([(-shoulder, -0.55), (shoulder, -0.55), (hip + 0.06, 0.15), (-hip - 0.06, 0.15)]), 1)]
    for side in (-1.0, 1.0):
        elbow = (side * (shoulder + rng.uniform(-0.05, 0.3)), rng.uniform(-0.45, -0.1))
        hand = (elbow[0] + rng.uniform(-0.25, 0.3) * side, elbow[1] + rng.uniform(-0.35, 0.35))
        parts.append(Part(_capsule(side * shoulder, -0.5, *elbow, girth, girth * 0.8), 1))
        parts.append(Part(_capsule(*elbow, *hand, girth * 0.8, girth * 0.6), 3))
        knee = (side * (hip + rng.uniform(-0.02, 0.2)), 0.55)
        foot = (knee[0] + rng.uniform(-0.15, 0.2) * side, 1.0)
        parts.append(Part(_capsule(side * hip, 0.1, *knee, girth * 1.25, girth), 2))
        parts.append(Part(_capsule(*knee, *foot, girth, girth * 0.7), 2))
    parts.append(Part(_capsule(0, -0.55, 0, -0.7, 0.08, 0.08), 3))
    parts.append(Part(_ellipse(0, -0.82, 0.14, 0.18), 3))
    return parts


def portrait(rng: Rng) -> list[Part]:
    """Head and shoulders, wide at the bottom."""
    shoulder, chest, neck = rng.uniform(0.7, 1.1), rng.uniform(0.5, 1.0), rng.uniform(0.16, 0.26)
    trunk = [(-neck, 0.2), (neck, 0.2), (shoulder * 0.8, 0.4), (shoulder, 0.7), (shoulder, 0.5 + chest)]
    outline = np.array(trunk + [(-x, y) for x, y in reversed(trunk[2:])])
    head = rng.uniform(0.3, 0.42)
    hair = Part(_ellipse(0, -0.3, head * rng.uniform(1.05, 1.35), head * rng.uniform(1.2, 1.7)), 2)
    parts = [hair] if rng.random() < 0.8 else []
    parts += [Part(_capsule(0, -0.1, 0, 0.3, neck, neck), 3), Part(_smooth(outline, 2), 1)]
    return [*parts, Part(_ellipse(rng.uniform(-0.05, 0.05), -0.2, head, head * 1.25), 3)]


def animal(rng: Rng) -> list[Part]:
    """Four-legged animal from the side: trunk, legs, neck, head, ears and tail."""
    girth, leg, neck_x = rng.uniform(0.22, 0.42), rng.uniform(0.05, 0.11), rng.uniform(0.9, 1.2)
    head_y = rng.uniform(-0.9, -0.1)
    parts = [Part(_capsule(-0.6, 0, 0.6, 0, girth, girth * rng.uniform(0.8, 1.1)))]
    for x in (-0.7, -0.5, 0.45, 0.68):
        foot = x + rng.uniform(-0.2, 0.2)
        material = 1 if rng.random() < 0.8 else 3
        parts.append(Part(_capsule(x, 0.1, foot, rng.uniform(0.75, 1.0), leg * 1.6, leg), material))
    parts.append(Part(_capsule(0.6, -0.05, neck_x, head_y, girth * 0.8, 0.15)))
    parts.append(Part(_capsule(neck_x, head_y, neck_x + rng.uniform(0.15, 0.4), head_y + 0.1, 0.18, 0.1)))
    parts.append(Part(np.array([(neck_x - 0.1, head_y), (neck_x - 0.05, head_y - 0.35), (neck_x + 0.1, head_y)]), 2))
    parts.append(Part(_capsule(-0.75, -0.1, rng.uniform(-1.4, -1.0), rng.uniform(-0.6, 0.5), 0.08, 0.03)))
    return parts


def face(rng: Rng) -> list[Part]:
    """Head of an animal from the front, with ears, eyes and a snout."""
    parts = []
    ear, spread = rng.uniform(0.2, 0.55), rng.uniform(0.4, 0.7)
    for side in (-1.0, 1.0):
        tip = (side * (spread + 0.15), -0.75 - ear)
        parts.append(Part(np.array([(side * (spread - 0.3), -0.7), tip, (side * (spread + 0.3), -0.3)])))
    parts.append(Part(_ellipse(0, 0, rng.uniform(0.8, 1.0), rng.uniform(0.75, 1.0), 60)))
    for side in (-1.0, 1.0):
        parts.append(Part(_ellipse(side * 0.38, -0.15, 0.13, 0.1), 2))
    parts.append(Part(_ellipse(0, 0.35, 0.35, 0.25), 3))
    if rng.random() < 0.5:
        parts.insert(0, Part(_smooth(np.array([(-0.7, 0.4), (0.7, 0.4), (1.1, 1.7), (-1.1, 1.7)]), 1), 1))
    return parts


def sticks(rng: Rng) -> list[Part]:
    """Thin structures: stands, bicycles' frames, branches."""
    joints = rng.uniform(-1.0, 1.0, (int(rng.integers(3, 7)), 2))
    width = rng.uniform(0.03, 0.1)
    parts = [
        Part(_capsule(a[0], a[1], b[0], b[1], width, width), 1 + index % 2)
        for index, (a, b) in enumerate(zip(joints, np.roll(joints, -1, 0), strict=True))
    ]
    if rng.random() < 0.5:
        for cx, cy in joints[:2]:
            radius = rng.uniform(0.25, 0.5)
            parts.append(Part(_ellipse(cx, cy, radius, radius), 3))
            parts.append(Part(_ellipse(cx, cy, radius * 0.8, radius * 0.8), HOLE))
    return parts


def plant(rng: Rng) -> list[Part]:
    """Leaves or petals around a stem, perhaps in a pot."""
    parts = [Part(_capsule(0, 1.0, rng.uniform(-0.2, 0.2), -0.6, 0.05, 0.03), 2)]
    leaf = _smooth(np.array([(0, 0), (0.5, -0.22), (1.0, 0), (0.5, 0.22)]), 2)
    for _ in range(int(rng.integers(5, 16))):
        angle = rng.uniform(-np.pi, 0.0) if rng.random() < 0.7 else rng.uniform(-np.pi, np.pi)
        turned = leaf @ np.array([(np.cos(angle), np.sin(angle)), (-np.sin(angle), np.cos(angle))])
        parts.append(Part(turned * rng.uniform(0.5, 1.0) + (0, rng.uniform(-0.6, 0.5)), int(rng.integers(1, 3))))
    if rng.random() < 0.5:
        parts.append(Part(np.array([(-0.5, 0.7), (0.5, 0.7), (0.36, 1.5), (-0.36, 1.5)]), 3))
    return parts


def tool(rng: Rng) -> list[Part]:
    """Elongated things with a head: spoons, brushes, hammers, shoes' outlines."""
    grip, length = rng.uniform(0.05, 0.14), rng.uniform(1.0, 1.8)
    parts = [Part(_capsule(0, 0, 0, length, grip, grip * rng.uniform(0.6, 1.6)), 2)]
    if rng.random() < 0.5:
        parts.append(Part(_ellipse(0, -0.2, rng.uniform(0.2, 0.45), rng.uniform(0.3, 0.6))))
    else:
        parts.append(Part(_smooth(_box(-rng.uniform(0.2, 0.7), -0.35, rng.uniform(0.2, 0.7), 0.1), 1)))
    return parts


def garment(rng: Rng) -> list[Part]:
    """Shirts and dresses laid out flat."""
    sleeve, drop, hem = rng.uniform(0.3, 0.8), rng.uniform(0.1, 0.7), rng.uniform(0.45, 0.95)
    right = [(0.2, -0.8), (0.5, -0.75), (0.55 + sleeve, -0.7 + drop), (0.45 + sleeve, -0.45 + drop)]
    right += [(0.5, -0.3), (0.48, 0.2), (hem, 1.0)]
    outline = np.array(right + [(-x, y) for x, y in reversed(right)])
    parts = [Part(_smooth(outline, 1))]
    if rng.random() < 0.4:
        parts.append(Part(_ellipse(0, 0, 0.28, 0.28), 2))
    return parts


FAMILIES: dict[str, tuple[Callable[[Rng], list[Part]], float, bool]] = {
    # builder, weight, whether it stands upright
    "superellipse": (superellipse, 1.0, False),
    "blob": (blob, 1.6, False),
    "polygon": (polygon, 0.7, False),
    "star": (star, 0.7, False),
    "ring": (ring, 0.5, False),
    "vessel": (vessel, 1.6, True),
    "cup": (cup, 1.0, True),
    "carton": (carton, 1.2, True),
    "furniture": (furniture, 1.0, True),
    "vehicle": (vehicle, 1.2, True),
    "figure": (figure, 1.2, True),
    "portrait": (portrait, 1.2, True),
    "animal": (animal, 1.2, True),
    "face": (face, 0.8, True),
    "sticks": (sticks, 0.25, False),
    "plant": (plant, 0.8, True),
    "tool": (tool, 0.7, False),
    "garment": (garment, 0.9, True),
}
"""Shape families by name: builder, sampling weight, and whether the object stands upright."""

_WEIGHTS = np.array([weight for _, weight, _ in FAMILIES.values()])
_WEIGHTS = _WEIGHTS / _WEIGHTS.sum()


def draw_silhouette(rng: Rng) -> tuple[str, list[Part]]:
    """Draw one object.

    Returns:
        Name of its family, and its parts, turned but not yet scaled to a box. Sometimes two families are joined.
    """
    name = str(rng.choice(list(FAMILIES), p=_WEIGHTS))
    builder, _, upright = FAMILIES[name]
    parts = builder(rng)
    if rng.random() < 0.06:  # joined objects are new silhouettes
        extra, _, _ = FAMILIES[str(rng.choice(list(FAMILIES), p=_WEIGHTS))]
        shift = rng.uniform(-0.6, 0.6, 2)
        parts = parts + [Part(p.points * rng.uniform(0.4, 0.7) + shift, p.material) for p in extra(rng)]
    angle = rng.normal(0.0, 0.12) if upright else rng.uniform(-np.pi, np.pi)
    if upright and rng.random() < 0.06:
        angle = rng.uniform(-np.pi, np.pi)
    flip = -1.0 if rng.random() < 0.5 else 1.0
    turn = np.array([(np.cos(angle), np.sin(angle)), (-np.sin(angle), np.cos(angle))]) * np.array([[flip], [1.0]])
    return name, [Part(part.points @ turn, part.material) for part in parts]


def transform(parts: list[Part], box: tuple[float, float, float, float]) -> list[Part]:
    """Scale and move parts so that they fill a box (x0, y0, x1, y1)."""
    every = np.concatenate([part.points for part in parts])
    low = every.min(0)
    extent = np.maximum(every.max(0) - low, 1e-6)
    scale = np.array((box[2] - box[0], box[3] - box[1])) / extent
    return [Part((part.points - low) * scale + box[:2], part.material) for part in parts]


def fur(rng: Rng, parts: list[Part], length: float) -> list[Points]:
    """Hair-like strands that leave the outline of the largest part.

    Args:
        rng: Generator.
        parts: Parts in the picture's coordinates.
        length: Typical length of a strand, in the same units.

    Returns:
        Open polylines, each of shape (5, 2).
    """
    root = max(parts, key=lambda part: float(np.prod(np.ptp(part.points, 0)))).points
    closed = np.concatenate((root, root[:1]))
    count = int(rng.integers(60, 260))
    position = rng.uniform(0.0, len(root), count)
    whole = position.astype(int)
    start = closed[whole] + (closed[whole + 1] - closed[whole]) * (position - whole)[:, None]
    outward = start - root.mean(0)
    outward /= np.maximum(np.linalg.norm(outward, axis=1, keepdims=True), 1e-6)
    lean = rng.normal(0.0, 0.35, (count, 2)) + rng.normal(0.0, 0.3, 2)
    reach = length * rng.uniform(0.3, 1.3, count)[:, None]
    step = np.linspace(-0.3, 1.0, 5)[None, :, None]
    strands = start[:, None] + step * (outward * reach)[:, None] + step**2 * (lean * reach)[:, None]
    return list(strands)
