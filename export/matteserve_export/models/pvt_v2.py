"""Pyramid Vision Transformer v2 as a backbone: four maps, at a quarter to a thirty-second of the image's size.

Paper: Wang et al., "PVT v2: Improved Baselines with Pyramid Vision Transformer", Computational Visual Media 2022,
https://arxiv.org/abs/2106.13797. Original repository: https://github.com/whai362/PVT (code Apache-2.0); names, shapes
and order of the state dict are those of its checkpoints, without the classifier.

What differs: tokens of the whole batch are rows of one matrix. The batch is never asked for its size, so that it stays
symbolic in an exported graph.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from matteserve_export.models._ops import static_dims, static_size

__all__ = ["PyramidVisionTransformer", "pvt_v2_b2"]

# The original code gives this to the norms of the blocks and stages; those of embeddings and attention have torch's
# 1e-5.
_EPS = 1e-6


class OverlapPatchEmbed(nn.Module):
    """Strided convolution with overlapping patches, then a norm."""

    def __init__(self, in_channels: int, channels: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, channels, kernel, stride=stride, padding=kernel // 2)
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> tuple[Tensor, int, int]:
        """(B, C, H, W) to tokens (B*H*W, C) of the smaller map, and its size."""
        x = self.proj(x)
        height, width = static_size(x)
        return self.norm(_to_tokens(x)), height, width


class Attention(nn.Module):
    """Attention of all tokens to a map that is `reduction` times smaller."""

    def __init__(self, channels: int, heads: int, reduction: int) -> None:
        super().__init__()
        self.heads = heads
        self.scale = (channels // heads) ** -0.5
        self.q = nn.Linear(channels, channels)
        self.kv = nn.Linear(channels, 2 * channels)
        self.proj = nn.Linear(channels, channels)
        self.reduction = reduction
        if reduction > 1:
            self.sr = nn.Conv2d(channels, channels, reduction, stride=reduction)
            self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """(B*H*W, C) in and out."""
        (channels,) = static_dims(x)
        # The scale of the scores, applied to the weights that make the queries.
        query = F.linear(x, self.q.weight * self.scale, self.q.bias * self.scale)
        query = query.reshape(-1, height * width, self.heads, channels // self.heads).transpose(1, 2)
        if self.reduction > 1:
            smaller = self.sr(_to_map(x, height, width))
            height, width = static_size(smaller)
            x = self.norm(_to_tokens(smaller))
        kv = self.kv(x).reshape(-1, height * width, 2, self.heads, channels // self.heads)
        key, value = kv.permute(2, 0, 3, 1, 4).unbind(0)
        attended = torch.softmax(query @ key.transpose(-2, -1), -1) @ value
        out: Tensor = self.proj(attended.transpose(1, 2).reshape(-1, channels))
        return out


class DepthwiseConv(nn.Module):
    """Depthwise 3x3 convolution over tokens."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """(B*H*W, C) in and out."""
        return _to_tokens(self.dwconv(_to_map(x, height, width)))


class Mlp(nn.Module):
    """Two linear layers with a depthwise convolution and a GELU (the exact one) between them."""

    def __init__(self, channels: int, ratio: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, ratio * channels)
        self.dwconv = DepthwiseConv(ratio * channels)
        self.fc2 = nn.Linear(ratio * channels, channels)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.dwconv(self.fc1(x), height, width)))
        return out


class Block(nn.Module):
    """Attention and a perceptron, each after a norm and added to what came in."""

    def __init__(self, channels: int, heads: int, ratio: int, reduction: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels, eps=_EPS)
        self.attn = Attention(channels, heads, reduction)
        self.norm2 = nn.LayerNorm(channels, eps=_EPS)
        self.mlp = Mlp(channels, ratio)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """(B*H*W, C) in and out."""
        x = x + self.attn(self.norm1(x), height, width)
        out: Tensor = x + self.mlp(self.norm2(x), height, width)
        return out


class PyramidVisionTransformer(nn.Module):
    """PVT v2 with four stages.

    Args:
        channels: Channels of each stage.
        depths: Number of blocks of each stage.
        heads: Attention heads of each stage.
        ratios: Widening inside the perceptrons of each stage.
        reductions: How many times smaller the map of keys and values is, of each stage.
    """

    def __init__(
        self,
        channels: tuple[int, ...],
        depths: tuple[int, ...],
        heads: tuple[int, ...],
        ratios: tuple[int, ...],
        reductions: tuple[int, ...],
    ) -> None:
        super().__init__()
        self.channels = channels
        inputs = (3, *channels[:-1])
        for number in range(4):
            kernel, stride = (3, 2) if number else (7, 4)
            embed = OverlapPatchEmbed(inputs[number], channels[number], kernel, stride)
            self.add_module(f"patch_embed{number + 1}", embed)
        for number in range(4):
            settings = (channels[number], heads[number], ratios[number], reductions[number])
            blocks = nn.ModuleList(Block(*settings) for _ in range(depths[number]))
            self.add_module(f"block{number + 1}", blocks)
            self.add_module(f"norm{number + 1}", nn.LayerNorm(channels[number], eps=_EPS))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Features of an image.

        Args:
            x: Pixel values, shape (B, 3, H, W), H and W multiples of 4.

        Returns:
            Four maps, (B, C, H/4, W/4) and on; each next one half as large, odd sizes rounded up.
        """
        features = []
        for number in range(1, 5):
            tokens, height, width = self.get_submodule(f"patch_embed{number}")(x)
            for block in self.get_submodule(f"block{number}").children():
                tokens = block(tokens, height, width)
            # Unlike in Swin, the norm is on the way to the next stage.
            x = _to_map(self.get_submodule(f"norm{number}")(tokens), height, width)
            features.append(x)
        return tuple(features)


def _to_map(tokens: Tensor, height: int, width: int) -> Tensor:
    """(B*H*W, C) to (B, C, H, W)."""
    return tokens.reshape(-1, height, width, *static_dims(tokens)).permute(0, 3, 1, 2)


def _to_tokens(map_: Tensor) -> Tensor:
    """(B, C, H, W) to (B*H*W, C)."""
    return map_.permute(0, 2, 3, 1).reshape(-1, static_dims(map_)[0])


def pvt_v2_b2() -> PyramidVisionTransformer:
    """PVT v2 B2, 24.8 M parameters."""
    return PyramidVisionTransformer((64, 128, 320, 512), (3, 4, 6, 3), (1, 2, 5, 8), (8, 8, 4, 4), (8, 4, 2, 1))
