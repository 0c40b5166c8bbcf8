"""Small things about files that several stages need."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

__all__ = ["digest"]


def digest(path: Path, algorithm: Literal["md5", "sha256"]) -> str:
    """Hex digest of a file."""
    # MD5 only recognises published files here, it protects against nothing.
    state = hashlib.new(algorithm, usedforsecurity=False)
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            state.update(chunk)
    return state.hexdigest()
