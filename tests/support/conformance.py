"""Inputs that follow from their shape alone, and recorded outputs of the original code to compare with."""

from __future__ import annotations

import gzip
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from matteserve_export.conformance import fill_module as fill
from matteserve_export.conformance import generator

__all__ = ["Taps", "fill", "pixel_values", "recorded_keys", "recorded_vectors"]

_FOLDER = Path(__file__).parents[1] / "export" / "conformance"


@lru_cache
def recorded_keys() -> dict[str, Any]:
    """Of each architecture, the entries of its checkpoints, and the fingerprint of those filled with seed 1."""
    keys: dict[str, Any] = json.loads(gzip.decompress((_FOLDER / "keys.json.gz").read_bytes()))
    return keys


def recorded_vectors(name: str) -> dict[str, np.ndarray[Any, Any]]:
    """Recorded cases of an architecture: shapes, outputs, elements of intermediate tensors."""
    with np.load(_FOLDER / f"{name}.npz") as vectors:
        return dict(vectors)


class Taps:
    """Collects what the modules of a network return, by the names that the recordings use."""

    def __init__(self, model: nn.Module) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._passes: dict[str, int] = {}
        self._handles = [
            module.register_forward_hook(lambda _, inputs, output, name=name: self._collect(name, inputs, output))
            for name, module in model.named_modules()
        ]

    def __enter__(self) -> Taps:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _collect(self, name: str, inputs: tuple[Any, ...], output: Any) -> None:
        first = self._passes.get(name, 0) == 0
        self._passes[name] = 1
        if name == "bb":
            for number, features in enumerate(output, start=1):
                self.tensors[f"bb.{'full' if first else 'half'}.x{number}"] = features
            return
        if name == "squeeze_module":
            self.tensors["forward_enc.x4"] = inputs[0]
        elif name == "decoder":
            self.tensors.update({f"forward_enc.x{number}": inputs[number] for number in (1, 2, 3)})
            for number in (2, 3, 4):
                gate = torch.sigmoid(self.tensors[f"decoder.gdt_convs_attn_{number}"])
                self.tensors[f"decoder.p{number}"] = gate * self.tensors[f"decoder.decoder_block{number}"]
        output = output[0] if isinstance(output, tuple) else output
        suffix = ("@full" if first else "@half") if name.startswith("bb.") else ""
        # A copy, as an activation in place may follow.
        self.tensors[name + suffix] = output.clone()

    def values(self, name: str, shape: tuple[int, ...], index: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Elements of one tensor at flat indices into the shape that the original code gives it."""
        tensor = self.tensors[name]
        if len(shape) == 4 and tensor.ndim == 2:  # a map kept as rows, one per pixel
            batch, channels, height, width = shape
            tensor = tensor.reshape(batch, height, width, channels).permute(0, 3, 1, 2)
        assert tensor.numel() == np.prod(shape)
        return tensor.flatten().numpy()[index]


def pixel_values(seed: int, shape: tuple[int, int, int, int]) -> torch.Tensor:
    """Normalised pictures, (N, C, H, W) float32: soft discs over waves and noise, in multiples of 1/64."""
    batch, channels, height, width = shape
    rng = generator(seed, "input:" + "x".join(str(n) for n in shape))
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
