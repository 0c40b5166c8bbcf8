"""Stage torch → core ONNX: float NCHW pixel values in, one float map out, symbolic batch, fixed height and width."""

from __future__ import annotations

import io
import logging
import warnings
from collections import Counter
from dataclasses import dataclass

import onnx
import torch

from matteserve_export._errors import OnnxError
from matteserve_export._names import BATCH_DIMENSION
from matteserve_export.graph import attach_weights, clean_graph
from matteserve_export.models.deform_conv import DeformableConv2d

__all__ = ["CORE_INPUT_NAME", "ToOnnxConfig", "count_nodes", "describe_nodes", "export_core"]

_LOG = logging.getLogger(__name__)

CORE_INPUT_NAME = "pixel_values"

# A graph with a fixed size needs none of these; one that has them computes shapes at run time, which costs time on
# every request and is where TensorRT's parser gives up.
_SHAPE_OPERATORS = frozenset({"Shape", "Size", "If", "Loop", "Range", "NonZero", "ConstantOfShape"})

# TensorRT's parser takes 16 to 19 without surprises: at 20 some versions read GridSample's mode wrongly, and GELU is a
# node of its own. LayerNormalization is one node from 17 on, DeformConv takes what torch means by it from 19 on.
_OPSETS = range(17, 20)
_DEFORM_CONV_OPSET = 19


@dataclass(frozen=True)
class ToOnnxConfig:
    """How a network becomes a core ONNX.

    Attributes:
        height: Input height in pixels.
        width: Input width in pixels.
        output_name: "probability", or "logits" where the sigmoid is still to come.
        opset: ONNX operator set, 17 to 19; None, and too small a number, means the least that the network needs.
    """

    height: int
    width: int
    output_name: str = "probability"
    opset: int | None = None

    def __post_init__(self) -> None:
        if self.opset is not None and self.opset not in _OPSETS:
            raise OnnxError(f"operator set {self.opset} is not supported; allowed are {_OPSETS[0]} to {_OPSETS[-1]}")


def export_core(model: torch.nn.Module, config: ToOnnxConfig) -> onnx.ModelProto:
    """Export a network in evaluation mode.

    Args:
        model: Maps normalised pixel values, (B, 3, H, W) float32 RGB, to one map (B, 1, H, W) float32.
        config: Size, output name, operator set.

    Returns:
        The simplified graph with input `pixel_values` [batch, 3, H, W] and one output [batch, 1, H, W].

    Raises:
        OnnxError: The network is in training mode, the exporter failed, or the graph computes shapes at run time.
    """
    if model.training:
        raise OnnxError("the network is in training mode; call .eval() before the export")
    # Without weights, which are added at the end: they are never copied in between, and stay shared where they are.
    core = _trace(model, config)
    weights = clean_graph(core, {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()})
    found = sorted(count_nodes(core).keys() & _SHAPE_OPERATORS)
    if found:
        raise OnnxError(
            f"the exported graph computes shapes at run time ({', '.join(found)}); write the network so that sizes "
            "are plain numbers"
        )
    # The exporter invents names for output dimensions.
    output = core.graph.output[0]
    shape = (BATCH_DIMENSION, 1, config.height, config.width)
    output.CopyFrom(onnx.helper.make_tensor_value_info(output.name, onnx.TensorProto.FLOAT, shape))
    onnx.checker.check_model(core, full_check=True)
    attach_weights(core, weights)
    _LOG.info("core ONNX: %s", describe_nodes(core))
    return core


def _trace(model: torch.nn.Module, config: ToOnnxConfig) -> onnx.ModelProto:
    """Run torch's exporter; weights become inputs of the graph."""
    names = [CORE_INPUT_NAME, config.output_name]
    deformable = any(isinstance(module, DeformableConv2d) for module in model.modules())
    needed = _DEFORM_CONV_OPSET if deformable else _OPSETS[0]
    stream = io.BytesIO()
    try:
        with torch.no_grad(), warnings.catch_warnings():
            # The TorchScript exporter is chosen on purpose: it keeps the batch symbolic for every network here, the
            # newer one does not. Only its own announcement of retirement is silenced.
            warnings.filterwarnings("ignore", "You are using the legacy TorchScript-based ONNX", DeprecationWarning)
            warnings.filterwarnings("ignore", "The feature will be removed", DeprecationWarning)
            # It tries to fold even so, says what it cannot, and `clean_graph` does it.
            warnings.filterwarnings("ignore", "Constant folding - Only steps=1", UserWarning)
            torch.onnx.export(
                model,
                (torch.zeros(1, 3, config.height, config.width),),
                stream,  # type: ignore[arg-type]  # the exporter takes streams; its annotation does not say so
                dynamo=False,
                export_params=False,
                do_constant_folding=False,
                opset_version=max(config.opset or needed, needed),
                input_names=names[:1],
                output_names=names[1:],
                dynamic_axes={name: {0: BATCH_DIMENSION} for name in names},
            )
    except (RuntimeError, torch.onnx.OnnxExporterError) as exc:
        raise OnnxError(f"torch could not export the network at {config.height}x{config.width}: {exc}") from exc
    return onnx.load_from_string(stream.getvalue())


def count_nodes(model: onnx.ModelProto) -> Counter[str]:
    """Number of nodes by operator."""
    return Counter(node.op_type for node in model.graph.node)


def describe_nodes(model: onnx.ModelProto) -> str:
    """One line: number of nodes, then the operators by frequency."""
    counts = count_nodes(model)
    return f"{counts.total()} nodes: " + ", ".join(f"{name} {count}" for name, count in counts.most_common())
