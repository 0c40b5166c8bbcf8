"""Swin Transformer v1 as a backbone: four maps, at a quarter to a thirty-second of the image's size.

Paper: Liu et al., "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows", ICCV 2021,
https://arxiv.org/abs/2103.14030. Original repository: https://github.com/microsoft/Swin-Transformer (code MIT); names,
shapes and order of the state dict are those of its segmentation variant, which BiRefNet's checkpoints contain.

What differs: padding, shift and partition into windows are one selection of rows each way, with constant indices;
tokens of the whole batch are rows of one matrix outside the attention. The batch is never asked for its size, so that
it stays symbolic in an exported graph.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from matteserve_export.models._ops import constant, static_dims, static_size

__all__ = ["SwinTransformer", "swin_b", "swin_l", "swin_s", "swin_t"]

# Added to the scores of pairs that must not see each other. Finite, so that reduced precisions keep it a number; after
# the softmax it is zero in float32 as minus infinity would be.
_MASKED = -100.0


class WindowPlan(NamedTuple):
    """How the tokens of a map are cut into windows; nW windows of N tokens.

    Attributes:
        windows: nW.
        gather: Shape (nW*N,): token of the map at each place of each window; H*W means padding.
        scatter: Shape (H*W,): place among the windows of each token of the map.
        mask: Shape (nW, 1, N, N), added to the scores; None without a shift.
    """

    windows: int
    gather: Tensor
    scatter: Tensor
    mask: Tensor | None


@lru_cache(maxsize=16)
def window_plan(height: int, width: int, window: int, shift: int) -> WindowPlan:
    """Plan for a map padded at the bottom and right to whole windows, then rolled by `shift` up and left."""
    padded_height, padded_width = -(-height // window) * window, -(-width // window) * window
    tokens = np.full((padded_height, padded_width), height * width)
    tokens[:height, :width] = np.arange(height * width).reshape(height, width)
    gather = _partition(np.roll(tokens, (-shift, -shift), (0, 1)), window).ravel()
    scatter = np.empty(height * width + 1, dtype=np.int64)
    scatter[gather] = np.arange(gather.size)

    mask = None
    if shift:
        # After the roll the map has three bands along each axis; the last windows hold parts of two, far apart before.
        band_y, band_x = (
            np.digitize(np.arange(length), (length - window, length - shift))
            for length in (padded_height, padded_width)
        )
        region = _partition(3 * band_y[:, None] + band_x[None, :], window)
        apart = region[:, None, :, None] != region[:, None, None, :]
        mask = constant(np.where(apart, np.float32(_MASKED), np.float32(0)))
    return WindowPlan(gather.size // window**2, constant(gather), constant(scatter[:-1].copy()), mask)


def _partition(grid: NDArray[Any], window: int) -> NDArray[Any]:
    """(H, W) to (nW, N): windows row by row, tokens of a window row by row."""
    height, width = grid.shape
    windows = grid.reshape(height // window, window, width // window, window).transpose(0, 2, 1, 3)
    return np.reshape(windows, (-1, window * window))


class WindowAttention(nn.Module):
    """Self-attention inside windows, with a learnt bias for each relative position of two tokens."""

    relative_position_index: Tensor

    def __init__(self, channels: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads = heads
        self.tokens = window**2
        self.scale = (channels // heads) ** -0.5
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        place = torch.stack(torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")).flatten(1)
        distance = place[:, :, None] - place[:, None, :] + window - 1  # (2, N, N)
        self.register_buffer("relative_position_index", distance[0] * (2 * window - 1) + distance[1])
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def forward(self, windows: Tensor, plan: WindowPlan) -> Tensor:
        """Attend.

        Args:
            windows: Shape (B*nW*N, C).
            plan: How the windows were cut.

        Returns:
            Shape (B*nW*N, C).
        """
        (channels,) = static_dims(windows)
        # The scale of the scores is applied to the rows of the weights that make the queries.
        scale = constant(np.repeat(np.array((self.scale, 1, 1), np.float32), channels)).to(windows.device)
        qkv = F.linear(windows, self.qkv.weight * scale[:, None], self.qkv.bias * scale)
        qkv = qkv.reshape(-1, self.tokens, 3, self.heads, channels // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B*nW, heads, N, C/heads)
        position = self.relative_position_bias_table.index_select(0, self.relative_position_index.flatten())
        scores = query @ key.transpose(-2, -1)
        scores = scores + position.reshape(self.tokens, self.tokens, self.heads).permute(2, 0, 1)
        if plan.mask is not None:
            shape = static_dims(scores)
            scores = scores.reshape(-1, plan.windows, *shape) + plan.mask.to(scores.device)
            scores = scores.reshape(-1, *shape)
        attended = torch.softmax(scores, -1) @ value
        out: Tensor = self.proj(attended.transpose(1, 2).reshape(-1, channels))
        return out


class Mlp(nn.Module):
    """Two linear layers with a GELU (the exact one, by the error function) between them."""

    def __init__(self, channels: int, ratio: int = 4) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, ratio * channels)
        self.fc2 = nn.Linear(ratio * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class SwinBlock(nn.Module):
    """Window attention and a perceptron, each after a norm and added to what came in."""

    def __init__(self, channels: int, heads: int, window: int, shift: int) -> None:
        super().__init__()
        self.window = window
        self.shift = shift
        self.norm1 = nn.LayerNorm(channels)
        self.attn = WindowAttention(channels, heads, window)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = Mlp(channels)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """Shape (B*H*W, C) in and out."""
        (channels,) = static_dims(x)
        plan = window_plan(height, width, self.window, self.shift)
        # A row of zeros after the tokens of each image stands for the padding, which is not masked: it goes through
        # qkv.
        tokens = F.pad(self.norm1(x).reshape(-1, height * width, channels), (0, 0, 0, 1))
        windows = tokens.index_select(1, plan.gather.to(x.device)).reshape(-1, channels)
        windows = self.attn(windows, plan).reshape(-1, plan.windows * self.window**2, channels)
        x = x + windows.index_select(1, plan.scatter.to(x.device)).reshape(-1, channels)
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class PatchMerging(nn.Module):
    """Joins 2x2 tokens into one with twice the channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * channels, 2 * channels, bias=False)
        self.norm = nn.LayerNorm(4 * channels)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """(B*H*W, C) to (B*ceil(H/2)*ceil(W/2), 2C)."""
        (channels,) = static_dims(x)
        half_height, half_width = -(-height // 2), -(-width // 2)
        x = x.reshape(-1, height, width, channels)
        if height % 2 or width % 2:
            x = F.pad(x, (0, 0, 0, width % 2, 0, height % 2))
        x = x.reshape(-1, half_height, 2, half_width, 2, channels)
        x = x.permute(0, 1, 3, 4, 2, 5).reshape(-1, 4 * channels)  # columns before rows, as the weights expect it
        out: Tensor = self.reduction(self.norm(x))
        return out


class SwinStage(nn.Module):
    """Blocks at one size, every second one with shifted windows, and the way to the next size."""

    def __init__(self, channels: int, depth: int, heads: int, window: int, last: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            SwinBlock(channels, heads, window, shift=window // 2 if number % 2 else 0) for number in range(depth)
        )
        if not last:
            self.downsample = PatchMerging(channels)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        for block in self.blocks:
            x = block(x, height, width)
        return x


class PatchEmbed(nn.Module):
    """4x4 pixels to one token."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, channels, 4, stride=4)
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) to (B*H/4*W/4, C)."""
        tokens = self.proj(x).permute(0, 2, 3, 1).reshape(-1, self.proj.out_channels)
        out: Tensor = self.norm(tokens)
        return out


class SwinTransformer(nn.Module):
    """Swin Transformer v1.

    Args:
        channels: Channels of the first stage; each next one has twice as many.
        depths: Number of blocks of each stage.
        heads: Attention heads of the first stage; each next one has twice as many.
        window: Side of a window in tokens. Windows are never shrunk, and maps smaller than one are padded.
    """

    def __init__(self, channels: int, depths: tuple[int, int, int, int], heads: int, window: int) -> None:
        super().__init__()
        self.channels = tuple(channels * 2**number for number in range(4))
        self.patch_embed = PatchEmbed(channels)
        self.layers = nn.ModuleList(
            SwinStage(self.channels[number], depth, heads * 2**number, window, last=number == 3)
            for number, depth in enumerate(depths)
        )
        for number, width in enumerate(self.channels):
            self.add_module(f"norm{number}", nn.LayerNorm(width))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Features of an image.

        Args:
            x: Pixel values, shape (B, 3, H, W), H and W multiples of 4.

        Returns:
            Four maps (B, C, H/4, W/4), (B, 2C, H/8, W/8), …, odd sizes rounded up.
        """
        image_height, image_width = static_size(x)
        height, width = image_height // 4, image_width // 4
        tokens = self.patch_embed(x)
        features = []
        for number, stage in enumerate(self.layers):
            tokens = stage(tokens, height, width)
            # The norm is for this output alone; the next stage takes the tokens without it.
            normed = self.get_submodule(f"norm{number}")(tokens)
            features.append(normed.reshape(-1, height, width, self.channels[number]).permute(0, 3, 1, 2))
            if number < 3:
                tokens = stage.get_submodule("downsample")(tokens, height, width)
                height, width = -(-height // 2), -(-width // 2)
        return tuple(features)


def swin_t() -> SwinTransformer:
    """Swin-T, 27.5 M parameters."""
    return SwinTransformer(96, (2, 2, 6, 2), 3, 7)


def swin_s() -> SwinTransformer:
    """Swin-S, 48.8 M parameters."""
    return SwinTransformer(96, (2, 2, 18, 2), 3, 7)


def swin_b() -> SwinTransformer:
    """Swin-B, 87 M parameters."""
    return SwinTransformer(128, (2, 2, 18, 2), 4, 12)


def swin_l() -> SwinTransformer:
    """Swin-L, 195 M parameters."""
    return SwinTransformer(192, (2, 2, 18, 2), 6, 12)
