"""torch → core ONNX: the graph's form, and networks that cannot be exported well."""

from __future__ import annotations

import onnx
import pytest
import torch
from torch import Tensor, nn

from matteserve_export import OnnxError
from matteserve_export.models import build_model
from matteserve_export.to_onnx import ToOnnxConfig, count_nodes, describe_nodes, export_core


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
    with pytest.raises(OnnxError, match=r"computes shapes at run time \(Gather, Shape\)"):
        export_core(_ReadsTheBatch().eval(), ToOnnxConfig(32, 32))


class _Unexportable(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.eigvals(x).real


def test_what_torch_cannot_export() -> None:
    with pytest.raises(OnnxError, match="torch could not export the network at 32x32"):
        export_core(_Unexportable().eval(), ToOnnxConfig(32, 32))
