"""A pool of generated scenes on disk, so that training does not wait for the generator."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from matteserve_export.demo_model.scenes import generate

__all__ = ["build_pool"]


def _fill(task: tuple[str, int, int, bool, int, int]) -> None:
    path, seed, size, hard, first, last = task
    pool = np.lib.format.open_memmap(path, mode="r+")
    for index in range(first, last):
        scene = generate(seed, index, size, hard)
        pool[index, ..., :3] = scene.image
        pool[index, ..., 3] = scene.alpha


def build_pool(
    folder: Path, seed: int, size: int, count: int, hard: bool = False, processes: int = 2
) -> NDArray[np.uint8]:
    """Scenes 0 to count - 1 of a series, from the folder or generated into it.

    Args:
        folder: Where pools are kept, outside of the source tree.
        seed: Series of the scenes.
        size: Height and width in pixels.
        count: Number of scenes.
        hard: As for ``generate``.
        processes: Worker processes that generate.

    Returns:
        Read-only memory map, shape (count, size, size, 4), uint8: RGB and alpha.
    """
    path = folder / f"scenes-seed{seed}-{size}px-{count}{'-hard' if hard else ''}.npy"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        shape = (count, size, size, 4)
        np.lib.format.open_memmap(partial, mode="w+", dtype=np.uint8, shape=shape).flush()
        tasks = [(str(partial), seed, size, hard, first, min(first + 50, count)) for first in range(0, count, 50)]
        with multiprocessing.get_context("spawn").Pool(processes) as workers:
            for _ in workers.imap_unordered(_fill, tasks):
                pass
        os.replace(partial, path)
    pool: NDArray[np.uint8] = np.load(path, mmap_mode="r")
    return pool
