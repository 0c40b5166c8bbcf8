"""Whether a new engine may stand in for the one that serves: both answer the same pictures, on the server itself."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from matteserve_client import (
    TOLERANCES,
    AlphaDifference,
    AlphaTolerance,
    ModelContract,
    ServerOverloadedError,
    Transport,
    alpha_difference,
)
from matteserve_client._images import load_picture
from matteserve_client._preprocess import image_tensor
from matteserve_server._errors import SwapError, VerificationError
from matteserve_server.manifest import Manifest

GENERATED_IMAGES = 4
MOST_IMAGES = 16
_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp"})
_OVERLOAD_TRIES = 20
_OVERLOAD_PAUSE_S = 0.25


# What the exporter's gate holds engines to, for an engine whose manifest does not say it.
@dataclass(frozen=True)
class Verified:
    """A verification that passed.

    Attributes:
        images: The pictures, shape (N, H, W, 3), uint8, RGB.
        references: What the old engine answered, shape (N, H, W), uint8.
        difference: The new engine's answers against these.
        tolerance: What they were held to.
    """

    images: NDArray[np.uint8]
    references: NDArray[np.uint8]
    difference: AlphaDifference
    tolerance: AlphaTolerance


def verify(
    transport: Transport,
    new: str,
    old: str,
    images: NDArray[np.uint8],
    tolerance: AlphaTolerance,
    *,
    max_batch_size: int,
    timeout_s: float,
) -> Verified:
    """Compare two loaded engines, one picture at a time and then in batches.

    A batch is more than its pictures: compilers are known to be right at one and wrong at four.

    Args:
        transport: Connection to the server that has both.
        new: Engine in question.
        old: Engine that serves.
        images: Pictures, shape (N, H, W, 3), uint8, RGB.
        tolerance: What the difference must fulfil.
        max_batch_size: Largest batch of the new engine.
        timeout_s: Seconds to wait for each answer.

    Raises:
        VerificationError: The answers differ by more than the tolerance.
        MatteserveError: A request failed.
    """
    references = answers(transport, old, images, timeout_s=timeout_s)
    for batch in sorted({1, min(max_batch_size, len(images))}):
        found = answers(transport, new, images, timeout_s=timeout_s, batch=batch)
        difference = alpha_difference(found, references)
        if violations := difference.violations(tolerance):
            raise VerificationError(
                f"{new!r} does not answer what {old!r} answers on {len(images)} images in batches of {batch}: "
                f"{'; '.join(violations)}. Picture {difference.worst} is the worst"
            )
    return Verified(images, references, difference, tolerance)


def answers(
    transport: Transport, model: str, images: NDArray[np.uint8], *, timeout_s: float, batch: int = 1
) -> NDArray[np.uint8]:
    """Ask a model; a server that is busy with its clients is asked again.

    Returns:
        Alphas, shape (N, H, W), uint8.

    Raises:
        MatteserveError: A request failed.
    """
    parts = [
        _answer(transport, model, images[begin : begin + batch], timeout_s) for begin in range(0, len(images), batch)
    ]
    return np.concatenate(parts)


def tolerance_between(new: Manifest | None, old: Manifest | None, contracts: Sequence[ModelContract]) -> AlphaTolerance:
    """What two engines may differ by: both may be off from the FP32 graph, so the looser bound of each figure holds.

    Args:
        new: Manifest of the new engine, if it is known.
        old: Manifest of the old one, if it is known.
        contracts: Contracts of the two, in the same order; their precisions decide where a manifest says nothing.
    """
    first, second = (
        manifest.tolerance
        if manifest is not None and manifest.tolerance is not None
        else TOLERANCES.get(contract.precision, TOLERANCES["fp16"])
        for manifest, contract in zip((new, old), contracts, strict=True)
    )
    return AlphaTolerance(
        max_abs=max(first.max_abs, second.max_abs),
        p999_abs=max(first.p999_abs, second.p999_abs),
        mean_abs=max(first.mean_abs, second.mean_abs),
        min_iou=min(first.min_iou, second.min_iou),
    )


def load_images(directory: Path, contract: ModelContract) -> NDArray[np.uint8]:
    """Read the first pictures of a directory, in the order of their names.

    Returns:
        Shape (N, height, width, 3), uint8, RGB, N ≤ 16.

    Raises:
        SwapError: There are none.
        InvalidImageError: One cannot be read.
    """
    paths = sorted(path for path in directory.iterdir() if path.suffix.lower() in _SUFFIXES)[:MOST_IMAGES]
    if not paths:
        raise SwapError(f"{directory} has no pictures to verify with; looked for {', '.join(sorted(_SUFFIXES))}")
    return np.concatenate([image_tensor(load_picture(path), contract) for path in paths])


def generate_images(contract: ModelContract, count: int = GENERATED_IMAGES) -> NDArray[np.uint8]:
    """Draw objects before backgrounds: enough for a network to find something, the same on every machine.

    Returns:
        Shape (count, height, width, 3), uint8, RGB.
    """
    height, width = contract.height, contract.width
    y, x = np.meshgrid(np.linspace(0, 1, height), np.linspace(0, 1, width), indexing="ij")
    images = np.empty((count, height, width, 3), np.uint8)
    for index in range(count):
        generator = np.random.default_rng(index)
        low, high, colour = generator.uniform(0, 255, (3, 3))
        background = low + (high - low) * x[..., None]
        stripes = 40 * np.sin(40 * (x * generator.uniform() + y))[..., None]
        objects = np.zeros((height, width))
        for _ in range(1 + index % 3):
            centre_y, centre_x = generator.uniform(0.3, 0.7, 2)
            radius_y, radius_x = generator.uniform(0.1, 0.35, 2)
            distance = ((y - centre_y) / radius_y) ** 2 + ((x - centre_x) / radius_x) ** 2
            objects = np.maximum(objects, np.clip(8 * (1 - distance), 0, 1))
        alpha = objects[..., None]
        noise = generator.normal(0, 4, (height, width, 3))
        images[index] = np.clip(alpha * (255 - colour + stripes) + (1 - alpha) * background + noise, 0, 255)
    return images


def _answer(transport: Transport, model: str, images: NDArray[np.uint8], timeout_s: float) -> NDArray[np.uint8]:
    for _ in range(_OVERLOAD_TRIES):
        try:
            return transport.infer(model, images, timeout_s=timeout_s).result()
        except ServerOverloadedError:
            time.sleep(_OVERLOAD_PAUSE_S)
    return transport.infer(model, images, timeout_s=timeout_s).result()
