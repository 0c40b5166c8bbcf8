"""Stage torch → core ONNX: float NCHW pixel values in, one float map out, symbolic batch, fixed height and width."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnxslim
import torch

from matteserve_export._errors import OnnxError
from matteserve_export._names import BATCH_DIMENSION

__all__ = ["CORE_INPUT_NAME", "ToOnnxConfig", "count_nodes", "describe_nodes", "export_core"]

_LOG = logging.getLogger(__name__)

CORE_INPUT_NAME = "pixel_values"

# A graph with a fixed size needs none of these; one that has them computes shapes at run time, which costs time on
# every request and is where TensorRT's parser gives up.
_SHAPE_OPERATORS = frozenset({"Shape", "Gather", "If", "Loop", "Range", "NonZero", "ConstantOfShape"})


@dataclass(frozen=True)
class ToOnnxConfig:
    """How a network becomes a core ONNX.

    Attributes:
        height: Input height in pixels.
        width: Input width in pixels.
        output_name: "probability", or "logits" where the sigmoid is still to come.
        opset: ONNX operator set; 17 is what TensorRT's parser and ONNX Runtime both take without surprises.
    """

    height: int
    width: int
    output_name: str = "probability"
    opset: int = 17


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
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "core.onnx"
        _trace(model, raw, config)
        core: onnx.ModelProto = onnxslim.slim(onnx.load(str(raw)))
    # The exporter invents names for output dimensions.
    output = core.graph.output[0].type.tensor_type
    for index, size in enumerate((None, 1, config.height, config.width)):
        dimension = output.shape.dim[index]
        dimension.Clear()
        if size is None:
            dimension.dim_param = BATCH_DIMENSION
        else:
            dimension.dim_value = size
    found = sorted(count_nodes(core).keys() & _SHAPE_OPERATORS)
    if found:
        raise OnnxError(
            f"the exported graph computes shapes at run time ({', '.join(found)}); write the network so that sizes "
            "are plain numbers"
        )
    onnx.checker.check_model(core, full_check=True)
    _LOG.info("core ONNX: %s", describe_nodes(core))
    return core


def _trace(model: torch.nn.Module, path: Path, config: ToOnnxConfig) -> None:
    """Run torch's exporter."""
    names = [CORE_INPUT_NAME, config.output_name]
    try:
        with torch.no_grad(), warnings.catch_warnings():
            # The TorchScript exporter is chosen on purpose: it keeps the batch symbolic for every network here, the
            # newer one does not. Only its own announcement of retirement is silenced.
            warnings.filterwarnings("ignore", "You are using the legacy TorchScript-based ONNX", DeprecationWarning)
            warnings.filterwarnings("ignore", "The feature will be removed", DeprecationWarning)
            torch.onnx.export(
                model,
                (torch.zeros(1, 3, config.height, config.width),),
                str(path),
                dynamo=False,
                opset_version=config.opset,
                input_names=names[:1],
                output_names=names[1:],
                dynamic_axes={name: {0: BATCH_DIMENSION} for name in names},
            )
    except (RuntimeError, torch.onnx.OnnxExporterError) as exc:
        raise OnnxError(f"torch could not export the network at {config.height}x{config.width}: {exc}") from exc


def count_nodes(model: onnx.ModelProto) -> Counter[str]:
    """Number of nodes by operator."""
    return Counter(node.op_type for node in model.graph.node)


def describe_nodes(model: onnx.ModelProto) -> str:
    """One line: number of nodes, then the operators by frequency."""
    counts = count_nodes(model)
    return f"{counts.total()} nodes: " + ", ".join(f"{name} {count}" for name, count in counts.most_common())
