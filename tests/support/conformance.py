"""Weights and inputs that follow from names alone, to compare an architecture with recorded outputs.

No trained checkpoint is needed to show that two implementations compute the same function: it is enough that both carry
the same weights. Here the values of a state-dict entry depend on a seed, its name and its shape only. Filters are drawn
with a gain by role and shifted to sum to zero, so that activations stay of order one and the output really varies.
"""

from __future__ import annotations

import hashlib
import math
import re
from typing import Any

import numpy as np
import torch

# Variance times fan-in of the weights with two or more dimensions, by name; the first match holds.
_GAINS = (
    (r"(^|\.)(outconv|side[1-6])\.weight$", 3.0),
    (r"(^|\.)rebnconvin\.conv_s1\.weight$", 1.2),
    (r"(^|\.)rebnconv1d\.conv_s1\.weight$", 1.8),
    (r"(^|\.)rebnconv\w+\.conv_s1\.weight$", 2.2),
)


def _generator(seed: int, label: str) -> np.random.Generator:
    digest = hashlib.sha256(f"{seed}:{label}".encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:8], "little")))


def entry_values(seed: int, name: str, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """Values of one floating entry of a state dict, float32."""
    rng = _generator(seed, name)
    last = name.rpartition(".")[2]
    if last == "running_var":
        return rng.uniform(0.5, 1.5, shape).astype(np.float32)
    if last in ("running_mean", "bias"):
        return (rng.standard_normal(shape) * 0.1).astype(np.float32)
    if len(shape) == 1:  # batch norm's scale
        return rng.uniform(0.8, 1.2, shape).astype(np.float32)
    gain = next(gain for pattern, gain in _GAINS if re.search(pattern, name))
    fan_in = math.prod(shape[1:])
    filters = rng.standard_normal((shape[0], fan_in))
    filters -= filters.mean(axis=1, keepdims=True)
    return (filters * math.sqrt(gain / fan_in)).reshape(shape).astype(np.float32)


def fill(model: torch.nn.Module, seed: int) -> None:
    """Overwrite the floating entries of a model's state dict."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(torch.from_numpy(entry_values(seed, name, tuple(tensor.shape))))


def pixel_values(seed: int, shape: tuple[int, int, int, int]) -> torch.Tensor:
    """Normalised pictures, (N, C, H, W) float32: soft discs over waves and noise, in multiples of 1/64."""
    batch, channels, height, width = shape
    rng = _generator(seed, "input:" + "x".join(str(n) for n in shape))
    y = (np.arange(height)[:, None] + 0.5) / height
    x = (np.arange(width)[None, :] + 0.5) / width
    out = np.empty(shape)
    for picture in range(batch):
        centre_y, centre_x = rng.uniform(0.3, 0.7, 2)
        radius_y, radius_x = rng.uniform(0.15, 0.35, 2)
        inside = ((y - centre_y) / radius_y) ** 2 + ((x - centre_x) / radius_x) ** 2 - 1.0
        disc = 1.0 / (1.0 + np.exp(12.0 * inside))
        for channel in range(channels):
            frequency_y, frequency_x = rng.uniform(0.5, 6.0, 2)
            phase, level = rng.uniform(0.0, 2.0 * np.pi), rng.uniform(-1.5, 1.5)
            wave = 0.7 * np.sin(2.0 * np.pi * (frequency_y * y + frequency_x * x) + phase)
            fine = 0.3 * np.sin(2.0 * np.pi * (23.0 * y - 31.0 * x) + phase)
            noise = 0.25 * rng.standard_normal((height, width))
            out[picture, channel] = wave + fine + noise + level * (2.0 * disc - 1.0)
    return torch.from_numpy((np.round(np.clip(out, -2.5, 2.5) * 64.0) / 64.0).astype(np.float32))
