"""Modulated deformable convolution in plain torch, and the two forms in which ONNX can hold it.

Paper: Zhu et al., "Deformable ConvNets v2: More Deformable, Better Results", CVPR 2019,
https://arxiv.org/abs/1811.11168.

Every tap of the kernel reads at its own place plus an offset that the network predicts, bilinearly, and weighs what it
read with a predicted factor. Offsets are not clamped; a bilinear corner outside the map counts as zero.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from matteserve_export.models._ops import constant, static_dims, static_size

__all__ = ["DeformConvForm", "DeformableConv2d", "deform_conv2d", "deform_conv2d_one_grid", "sampling_points"]

DeformConvForm = Literal["taps", "native", "grid-sample"]
"""How to compute it: tap by tap, as ONNX `DeformConv` (operator set 19), or with ONNX `GridSample` (16 to 19)."""


def deform_conv2d(x: Tensor, offset: Tensor, mask: Tensor, weight: Tensor) -> Tensor:
    """Deformable convolution with stride 1, dilation 1 and a padding that keeps the size, tap by tap.

    Besides input and output it needs the memory of two maps of the input's size, whatever the kernel.

    Args:
        x: Shape (B, C, H, W).
        offset: Shape (B, 2*K*K, H, W) in pixels: dy and dx of tap t = i*K + j are channels 2*t and 2*t + 1.
        mask: Shape (B, K*K, H, W), factor of each tap.
        weight: Shape (O, C, K, K), K odd.

    Returns:
        Shape (B, O, H, W).
    """
    height, width = static_size(x)
    kernel = static_dims(weight)[-1]
    points = sampling_points(offset, kernel)
    out = x.new_zeros(x.shape[0], weight.shape[0], height * width)
    for tap in range(kernel * kernel):
        sampled = _sample(x, points[:, tap].permute(0, 2, 3, 1)) * mask[:, tap : tap + 1]
        filters = weight[:, :, tap // kernel, tap % kernel]
        out.baddbmm_(filters.expand(x.shape[0], -1, -1), sampled.flatten(2))
    return out.reshape(-1, weight.shape[0], height, width)


def deform_conv2d_one_grid(x: Tensor, points: Tensor, mask: Tensor, weight: Tensor) -> Tensor:
    """The same with one sampling for all taps: a map K times as high and wide, then a convolution with stride K.

    As a graph this is a dozen operators that TensorRT knows. The sampled map is K*K times as large as the input.

    Args:
        x: Shape (B, C, H, W).
        points: Shape (B, K*K, 2, H, W), see `sampling_points`.
        mask: Shape (B, K*K, H, W), factor of each tap.
        weight: Shape (O, C, K, K), K odd.

    Returns:
        Shape (B, O, H, W).
    """
    height, width = static_size(x)
    kernel = static_dims(weight)[-1]
    if kernel == 1:
        grid = points.reshape(-1, 2, height, width).permute(0, 2, 3, 1)
    else:
        grid = points.reshape(-1, kernel, kernel, 2, height, width).permute(0, 4, 1, 5, 2, 3)
        grid = grid.reshape(-1, height * kernel, width * kernel, 2)
        mask = mask.reshape(-1, kernel, kernel, height, width).permute(0, 3, 1, 4, 2)
        mask = mask.reshape(-1, 1, height * kernel, width * kernel)
    return F.conv2d(_sample(x, grid) * mask, weight, stride=kernel)


def sampling_points(offset: Tensor, kernel: int) -> Tensor:
    """Where each tap reads.

    Args:
        offset: Shape (B, 2*K*K, H, W) in pixels, as `deform_conv2d` takes it.
        kernel: K.

    Returns:
        Shape (B, K*K, 2, H, W): x and y as `grid_sample` counts them without aligned corners, where pixel p of a row of
        W is (2p + 1)/W - 1.
    """
    height, width = static_size(offset)
    shifts, scale, base = _point_constants(kernel, height, width, offset.device)
    pixels = offset.reshape(-1, kernel * kernel, 2, height, width).flip(2) + shifts[:, :, None, None]
    return pixels * scale[:, None, None] + base


def _sample(x: Tensor, grid: Tensor) -> Tensor:
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _point_constants(kernel: int, height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Place of each tap (K*K, 2) in pixels, units per pixel (2,), points of the map (2, H, W); x first in each."""
    y, x = np.mgrid[:kernel, :kernel] - kernel // 2
    shifts = np.stack((x.ravel(), y.ravel()), 1)
    scale = np.array((2 / width, 2 / height))
    base = np.empty((2, height, width))
    base[0] = (2 * np.arange(width) + 1) / width - 1
    base[1] = ((2 * np.arange(height) + 1) / height - 1)[:, None]

    shifts_, scale_, base_ = (constant(array.astype(np.float32)).to(device) for array in (shifts, scale, base))
    return shifts_, scale_, base_


class _NativeDeformConv(torch.autograd.Function):
    """`deform_conv2d`, exported as one ONNX `DeformConv`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, offset: Tensor, mask: Tensor, weight: Tensor, _: tuple[int, int]) -> Tensor:
        if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            # The exporter asks for a tensor of the right shape only.
            return x.new_zeros(()).expand(x.shape[0], weight.shape[0], *x.shape[2:])
        return deform_conv2d(x, offset, mask, weight)

    @staticmethod
    def symbolic(g: Any, x: Any, offset: Any, mask: Any, weight: Any, sizes: tuple[int, int]) -> Any:
        out_channels, kernel = sizes
        return g.op(
            "DeformConv",
            *(x, weight, offset, g.op("Constant", value_t=torch.zeros(out_channels)), mask),
            kernel_shape_i=[kernel, kernel],
            pads_i=[kernel // 2] * 4,
        )


class DeformableConv2d(nn.Module):
    """Deformable convolution that predicts its own offsets and factors from its input.

    Attributes:
        form: How to compute it; the function is the same. "taps" is for torch, the others for exported graphs.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__()
        self.form: DeformConvForm = "taps"
        padding, taps = kernel_size // 2, kernel_size**2
        self.offset_conv = nn.Conv2d(in_channels, 2 * taps, kernel_size, padding=padding)
        self.modulator_conv = nn.Conv2d(in_channels, taps, kernel_size, padding=padding)
        self.regular_conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=padding, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.sigmoid(self.modulator_conv(x))
        weight = 2 * self.regular_conv.weight  # the factors are 2 * sigmoid
        if self.form == "grid-sample":
            return deform_conv2d_one_grid(x, self._predict_points(x), mask, weight)
        offset = self.offset_conv(x)
        if self.form == "native":
            sizes = (self.regular_conv.out_channels, self.regular_conv.kernel_size[0])
            out: Tensor = _NativeDeformConv.apply(x, offset, mask, weight, sizes)  # type: ignore[no-untyped-call]
            return out
        return deform_conv2d(x, offset, mask, weight)

    def _predict_points(self, x: Tensor) -> Tensor:
        """`sampling_points` of the predicted offsets, its scale and order of axes being part of the convolution."""
        height, width = static_size(x)
        kernel = self.offset_conv.kernel_size[0]
        shifts, scale, base = _point_constants(kernel, height, width, x.device)
        weight, bias = self.offset_conv.weight, self.offset_conv.bias
        assert bias is not None
        weight = (weight.reshape(kernel**2, 2, -1).flip(1) * scale[:, None]).reshape(weight.shape)
        bias = ((bias.reshape(kernel**2, 2).flip(1) + shifts) * scale).reshape(bias.shape)
        points = F.conv2d(x, weight, bias, padding=kernel // 2)
        return points.reshape(-1, kernel**2, 2, height, width) + base
