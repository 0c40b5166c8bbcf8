"""Weights that follow from names alone: to compare architectures, and to export without a checkpoint.

No trained checkpoint is needed to show that two implementations compute the same function: it is enough that both carry
the same weights. Here the values of a state-dict entry depend on a seed, its name and its shape only. Filters are drawn
with a gain by role and shifted to sum to zero, so that activations stay of order one through the deepest network and
the output really varies over the picture. `matteserve export … --init conformance` uses them for tests and
demonstrations; the masks mean nothing.
"""

from __future__ import annotations

import hashlib
import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["Fingerprint", "entry_values", "fill_module", "generator"]

# Variance times fan-in of the weights with two or more dimensions, by name; the first match holds.
_GAINS = tuple(
    (re.compile(rf"(^|\.)({names})\.weight$"), gain)
    for names, gain in (
        # Heads that make one-channel logits.
        (r"outconv|side[1-6]", 3.0),
        (r"conv_out1\.0", 0.8),
        (r"conv_ms_spvn_[234]|gdt_convs_(pred|attn)_[234]\.0", 3.0),
        # Offsets of about a pixel, several at the extremes.
        (r"offset_conv|modulator_conv", 2.0),
        # Residual U-blocks: convolution, batch norm and ReLU, with a sum at the end.
        (r"rebnconvin\.conv_s1", 1.2),
        (r"rebnconv1d\.conv_s1", 1.8),
        (r"rebnconv\w+\.conv_s1", 2.2),
        # No activation follows.
        (r"ipt_blk[1-5]\.conv(1|_out)|lateral_block[234]\.conv", 1.0),
        # Transformers.
        (r"attn\.(qkv|q|kv)", 1.5),
        (r"attn\.proj|mlp\.fc1|mlp\.fc2|reduction|patch_embed\d?\.proj", 1.0),
    )
)
_OTHER_GAIN = 1.8
# Standard deviations of what is not a filter.
_SHIFTS = {"running_mean": 0.1, "bias": 0.1, "relative_position_bias_table": 0.5}
_OFFSET_BIAS = 0.5


@dataclass(frozen=True)
class Fingerprint:
    """Digest of filled weights; it tolerates last-bit differences and any order of the entries.

    Attributes:
        entries: Number of entries that were drawn.
        values: Number of values in them.
        abs_sum: Sum of the absolute values.
        weighted: Sum over the entries of their first 64 values, times a number that follows from the name.
    """

    entries: int
    values: int
    abs_sum: float
    weighted: float


def generator(seed: int, label: str) -> np.random.Generator:
    """Random numbers that follow from a seed and a label."""
    digest = hashlib.sha256(f"{seed}:{label}".encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:8], "little")))


def entry_values(seed: int, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Values of one floating entry of a state dict."""
    rng = generator(seed, name)
    kind = name.rpartition(".")[2]
    values: NDArray[Any]
    if kind == "running_var":
        values = rng.uniform(0.5, 1.5, shape)
    elif kind in _SHIFTS:
        scale = _OFFSET_BIAS if name.endswith(("offset_conv.bias", "modulator_conv.bias")) else _SHIFTS[kind]
        values = rng.standard_normal(shape) * scale
    elif len(shape) == 1:  # scale of a norm
        values = rng.uniform(0.8, 1.2, shape)
    else:
        gain = next((gain for pattern, gain in _GAINS if pattern.search(name)), _OTHER_GAIN)
        fan_in = math.prod(shape[1:])
        filters = rng.standard_normal((shape[0], fan_in))
        if fan_in > 1:
            filters -= filters.mean(axis=1, keepdims=True)
        values = (filters * math.sqrt(gain / fan_in)).reshape(shape)
    return values.astype(np.float32)


def fill_module(model: torch.nn.Module, seed: int = 0) -> Fingerprint:
    """Overwrite the floating entries of a model's state dict, in place.

    Returns:
        What was written, in short.
    """
    entries, values, abs_sum, weighted = 0, 0, 0.0, 0.0
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if not tensor.is_floating_point():
                continue
            drawn = entry_values(seed, name, tuple(tensor.shape))
            tensor.copy_(torch.from_numpy(drawn))
            flat = drawn.ravel().astype(np.float64)
            entries += 1
            values += flat.size
            abs_sum += float(np.abs(flat).sum())
            weighted += float(flat[:64].sum()) * hashlib.sha256(name.encode()).digest()[0]
    return Fingerprint(entries, values, round(abs_sum, 1), round(weighted, 2))
