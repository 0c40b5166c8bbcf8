"""Architectures in plain torch, by name. Each one takes the state dict of the released checkpoints unchanged."""

from __future__ import annotations

from collections.abc import Callable

import torch

from matteserve_export.models.u2net import u2net, u2netp

__all__ = ["MODEL_BUILDERS", "TRAINING_ONLY", "build_model"]

MODEL_BUILDERS: dict[str, Callable[..., torch.nn.Module]] = {
    "u2net": u2net,
    "u2netp": u2netp,
}
"""Builder of each architecture; a builder's keyword arguments are the architecture's options."""


TRAINING_ONLY: dict[str, tuple[str, ...]] = {}
"""Prefixes of entries by architecture that released checkpoints carry and that inference does not need."""


def build_model(name: str, **options: object) -> torch.nn.Module:
    """Build an architecture with random weights, in evaluation mode.

    Args:
        name: Key of ``MODEL_BUILDERS``.
        options: Keyword arguments of that architecture's builder; U²-Net has none.

    Returns:
        The module. It maps normalised pixel values, (B, 3, H, W) float RGB, to one map (B, 1, H, W).

    Raises:
        ValueError: No architecture has this name.
    """
    if name not in MODEL_BUILDERS:
        known = ", ".join(sorted(MODEL_BUILDERS))
        raise ValueError(f"unknown architecture {name!r}; known ones are: {known}")
    return MODEL_BUILDERS[name](**options).eval()
