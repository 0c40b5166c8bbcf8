"""Pictures from a directory, at a model's size: to calibrate int8 with, and to compare engines on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from matteserve_client import ModelContract
from matteserve_client._images import load_picture
from matteserve_client._preprocess import image_tensor
from matteserve_export._errors import ExportError

__all__ = ["read_pictures"]

_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif")


def read_pictures(directory: Path, contract: ModelContract, limit: int = 64) -> NDArray[np.uint8]:
    """Read a directory's pictures as a client would send them.

    Args:
        directory: Folder; subfolders are not looked into.
        contract: Size and filter.
        limit: Largest number of pictures; of more, every so many in the order of their names.

    Returns:
        RGB, [N, height, width, 3] uint8, N ≥ 1.

    Raises:
        ExportError: No such directory, or no pictures in it.
        InvalidImageError: One of them cannot be read.
    """
    if not directory.is_dir():
        raise ExportError(f"{directory}: no such directory; give one with pictures in it")
    paths = sorted(path for path in directory.iterdir() if path.suffix.lower() in _SUFFIXES)
    if not paths:
        raise ExportError(f"{directory}: no pictures in it; looked for {' '.join(_SUFFIXES)}")
    chosen = [paths[i] for i in np.linspace(0, len(paths) - 1, min(limit, len(paths))).round().astype(int)]
    return np.concatenate([image_tensor(load_picture(path), contract) for path in chosen])
