"""Architectures in plain torch, by name. Each one takes the state dict of the released checkpoints unchanged."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch

from matteserve_export.models import birefnet as _birefnet
from matteserve_export.models.isnet import isnet
from matteserve_export.models.u2net import u2net, u2netp

__all__ = ["MODEL_BUILDERS", "TRAINING_ONLY", "build_model"]

MODEL_BUILDERS: dict[str, Callable[..., torch.nn.Module]] = {
    "u2net": u2net,
    "u2netp": u2netp,
    "isnet": isnet,
    "birefnet": _birefnet.birefnet,
    "birefnet_lite": _birefnet.birefnet_lite,
    "birefnet_swin_b": _birefnet.birefnet_swin_b,
    "birefnet_swin_s": _birefnet.birefnet_swin_s,
    "birefnet_pvt_v2_b2": _birefnet.birefnet_pvt_v2_b2,
}
"""Builder of each architecture; a builder's keyword arguments are the architecture's options."""

TRAINING_ONLY: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {name: _birefnet.TRAINING_ONLY if name.startswith("birefnet") else () for name in MODEL_BUILDERS}
)
"""Prefixes of the entries of released checkpoints that inference does not need, by architecture."""


def build_model(name: str, **options: object) -> torch.nn.Module:
    """Build an architecture with random weights, in evaluation mode.

    Args:
        name: Key of ``MODEL_BUILDERS``.
        options: Keyword arguments of that architecture's builder; BiRefNet has ``patch_order``, the others have none.

    Returns:
        The module. It maps normalised pixel values, (B, 3, H, W) float RGB, to one map (B, 1, H, W): the probability
        for U²-Net and IS-Net, logits for BiRefNet.

    Raises:
        ValueError: No architecture has this name, or it has no such option, or the option no such value.
    """
    if name not in MODEL_BUILDERS:
        known = ", ".join(sorted(MODEL_BUILDERS))
        raise ValueError(f"unknown architecture {name!r}; known ones are: {known}")
    builder = MODEL_BUILDERS[name]
    allowed = inspect.signature(builder).parameters
    unknown = ", ".join(sorted(options.keys() - allowed.keys()))
    if unknown:
        raise ValueError(f"{name} has no option {unknown}; it has {', '.join(allowed) or 'none'}")
    return builder(**options).eval()
