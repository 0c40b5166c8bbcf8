"""A network of a moment with one of each operator to which a precision gives a thought."""

from __future__ import annotations

import onnx
import torch
from torch import Tensor, nn

from matteserve_export.serving import Core, ServingConfig, build_serving
from matteserve_export.to_onnx import ToOnnxConfig, export_core

SIZE = 64


class Everything(nn.Module):
    """One of each operator that needs a thought: normalisation, attention, sampling, resizing, a sigmoid inside."""

    def __init__(self, gain: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.down = nn.Conv2d(3, 8, 4, stride=4)
        self.norm = nn.LayerNorm(8)
        self.offset = nn.Conv2d(8, 2, 3, padding=1)
        self.up, self.head = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 1, 1)
        side = (torch.arange(16) * 2 + 1) / 16 - 1
        self.register_buffer("grid", torch.stack(torch.meshgrid(side, side, indexing="ij")[::-1], -1)[None])
        self.gain = gain

    def forward(self, x: Tensor) -> Tensor:
        h = self.down(x) * self.gain * self.gain
        tokens = self.norm(h.reshape(-1, 8, 256).transpose(1, 2))
        tokens = tokens + torch.softmax(tokens @ tokens.transpose(1, 2), -1) @ tokens
        h = tokens.transpose(1, 2).reshape(-1, 8, 16, 16)
        grid = self.grid + 0.1 * self.offset(h).permute(0, 2, 3, 1)
        h = torch.nn.functional.grid_sample(h, grid, align_corners=False)
        h = torch.nn.functional.interpolate(torch.relu(self.up(h)), scale_factor=4.0, mode="bilinear")
        return torch.sigmoid(4 * self.head(h))


def serve(network: nn.Module, config: ServingConfig) -> onnx.ModelProto:
    """The serving graph of a network."""
    core = export_core(network.eval(), ToOnnxConfig(SIZE, SIZE))
    return build_serving(Core(core, SIZE, SIZE, batched=True), config)
