"""torch → core ONNX: the graph's form, and networks that cannot be exported well."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from matteserve_export import OnnxError
from matteserve_export.lowering import lower_deform_conv
from matteserve_export.models import build_model, deform_conv
from matteserve_export.models.deform_conv import DeformableConv2d
from matteserve_export.to_onnx import ToOnnxConfig, count_nodes, describe_nodes, export_core
from support.conformance import fill, pixel_values


def run(core: onnx.ModelProto, x: Tensor) -> NDArray[np.float32]:
    session = onnxruntime.InferenceSession(core.SerializeToString(), providers=["CPUExecutionProvider"])
    (out,) = session.run(None, {"pixel_values": x.numpy()})
    return out


def _shape(value: onnx.ValueInfoProto) -> list[int | str]:
    return [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]


def test_form_of_the_core() -> None:
    core = export_core(build_model("u2netp"), ToOnnxConfig(64, 96, output_name="logits"))
    assert [(v.name, _shape(v)) for v in core.graph.input] == [("pixel_values", ["batch", 3, 64, 96])]
    assert [(v.name, _shape(v)) for v in core.graph.output] == [("logits", ["batch", 1, 64, 96])]
    assert [(entry.domain, entry.version) for entry in core.opset_import] == [("", 17)]
    assert not {"Shape", "Gather", "If", "BatchNormalization", "Constant", "Identity"} & count_nodes(core).keys()
    assert describe_nodes(core).startswith("365 nodes: Conv 119, Relu 112, Concat 51, ")


def test_training_mode_is_refused() -> None:
    with pytest.raises(OnnxError, match=r"training mode; call \.eval\(\)"):
        export_core(nn.Conv2d(3, 1, 1).train(), ToOnnxConfig(32, 32))


class _ReadsTheBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1, keepdim=True) * x.shape[0]


def test_shape_arithmetic_in_the_graph_is_refused() -> None:
    with pytest.raises(OnnxError, match=r"computes shapes at run time \(Shape\)"):
        export_core(_ReadsTheBatch().eval(), ToOnnxConfig(32, 32))


class _Unexportable(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.eigvals(x).real


def test_what_torch_cannot_export() -> None:
    with pytest.raises(OnnxError, match="torch could not export the network at 32x32"):
        export_core(_Unexportable().eval(), ToOnnxConfig(32, 32))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"opset": 16}, "operator set 16 is not supported; allowed are 17 to 19"),
        ({"opset": 20}, "operator set 20 is not supported; allowed are 17 to 19"),
    ],
)
def test_unknown_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(OnnxError, match=message):
        ToOnnxConfig(32, 32, **settings)


class _Deformable(nn.Module):
    """One deformable convolution, with what may follow it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = DeformableConv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.head = nn.Conv2d(4, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.bn(self.conv(x))))


@pytest.mark.parametrize("asked", [None, 17])
def test_a_deformable_convolution_is_one_node(asked: int | None) -> None:
    model = _Deformable().eval()
    fill(model, seed=2)
    core = export_core(model, ToOnnxConfig(32, 64, "logits", asked))
    assert [(entry.domain, entry.version) for entry in core.opset_import] == [("", 19)]
    assert dict(count_nodes(core)) == {"Conv": 3, "Sigmoid": 1, "DeformConv": 1, "Relu": 1}
    x = pixel_values(1, (2, 3, 32, 64))
    with torch.no_grad():
        expected = model(x).numpy()
    np.testing.assert_allclose(run(core, x), expected, rtol=0, atol=2e-5)
    # For compilers without the operator.
    lowered = lower_deform_conv(core)
    assert "DeformConv" not in count_nodes(lowered)
    np.testing.assert_allclose(run(lowered, x), expected, rtol=0, atol=2e-5)


def test_a_large_deformable_convolution_is_a_sum_over_groups_of_its_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deform_conv, "_MOST_GATHERED", 9 * 32 * 64)  # one channel's
    model = _Deformable().eval()
    fill(model, seed=2)
    core = export_core(model, ToOnnxConfig(32, 64, "logits"))
    assert dict(count_nodes(core)) == {"Split": 1, "Conv": 3, "Sigmoid": 1, "DeformConv": 3, "Add": 2, "Relu": 1}
    x = pixel_values(1, (2, 3, 32, 64))
    with torch.no_grad():
        expected = model(x).numpy()
    for graph in (core, lower_deform_conv(core)):
        np.testing.assert_allclose(run(graph, x), expected, rtol=0, atol=2e-5)


class _Sums(nn.Module):
    """A batch norm after a sum of convolutions that share an input; one of the sums is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 4, kernel, padding=kernel // 2) for kernel in (1, 3, 1))
        self.pooled = nn.Conv2d(3, 4, 1, bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.other_bn = nn.BatchNorm2d(4)
        self.wide = nn.Conv2d(4, 8, 3, padding=1)
        self.narrow = nn.Conv2d(8, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.convs[0](x) + self.convs[1](x)
        h = torch.relu(self.bn(h + self.pooled(x.mean((2, 3), keepdim=True))))
        twice = self.convs[2](x)
        h = h + self.other_bn(twice) + twice
        return self.narrow(self.wide(h))


def test_batch_norms_and_narrowing_convolutions_become_part_of_what_is_before() -> None:
    model = _Sums().eval()
    fill(model, seed=2)
    core = export_core(model, ToOnnxConfig(32, 32, "logits"))
    # A value that something else reads too stays as it is.
    assert dict(count_nodes(core)) == {"Conv": 5, "Add": 4, "ReduceMean": 1, "Relu": 1, "BatchNormalization": 1}
    x = pixel_values(1, (2, 3, 32, 32))
    with torch.no_grad():
        np.testing.assert_allclose(run(core, x), model(x).numpy(), rtol=0, atol=2e-5)


class _Twice(nn.Module):
    """Weights used twice, and something derived from weights used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = torch.relu(self.conv(x))
            x = nn.functional.conv2d(x, 2 * self.conv.weight, padding=1)
        return x.sum(1, keepdim=True)


def test_what_is_used_twice_is_stored_once() -> None:
    model = _Twice().eval()
    core = export_core(model, ToOnnxConfig(32, 32))
    shapes = [tuple(entry.dims) for entry in core.graph.initializer]
    assert sorted(shapes) == [(1,), (3,), (3, 3, 3, 3), (3, 3, 3, 3)]
    assert {"conv.weight", "conv.bias"} < {entry.name for entry in core.graph.initializer}
    x = pixel_values(1, (1, 3, 32, 32))
    with torch.no_grad():
        np.testing.assert_allclose(run(core, x), model(x).numpy(), rtol=0, atol=2e-5)
