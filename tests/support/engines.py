"""More engines for the tiny model of `tiny_model`, told apart by their answers: alpha is another channel, or wrong."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf import text_format
from onnx import numpy_helper
from tritonclient.grpc import model_config_pb2 as pb

from support.tiny_model import red_channel, write_config

LOOSE = {"max_abs": 1.0, "p999_abs": 1.0, "mean_abs": 1.0, "min_iou": 0.0}
"""A tolerance that any answer meets but a flat one, so that engines with different answers can be swapped."""


def add_engine(
    repository: Path,
    suffix: str,
    *,
    model: str = "tiny",
    channel: int = 0,
    tolerance: Mapping[str, float] | None = LOOSE,
    manifest: Mapping[str, Any] | None = None,
) -> Path:
    """Write the engine `<model>_<suffix>` beside `<model>_onnx_fp32`; return its folder.

    Args:
        repository: Where `tiny_model.write_repository` wrote.
        suffix: `<engine>_<precision>`, e.g. "onnx_fp16".
        model: Name of the alias.
        channel: Which channel of the picture is the alpha.
        tolerance: What the manifest says about it; None writes no manifest.
        manifest: More entries of the manifest.
    """
    kind, _, precision = suffix.partition("_")
    folder = repository / f"{model}_{suffix}"
    (folder / "1").mkdir(parents=True)
    source = (repository / f"{model}_onnx_fp32" / "config.pbtxt").read_text()
    config = text_format.Parse(source, pb.ModelConfig())
    config.name = folder.name
    config.parameters["matteserve.engine"].string_value = kind
    config.parameters["matteserve.precision"].string_value = precision
    write_config(repository, config)
    onnx.save(channel_model(channel), folder / "1" / "model.onnx")
    if tolerance is not None:
        write_manifest(folder, tolerance=tolerance, **(manifest or {}))
    return folder


def write_manifest(folder: Path, **entries: Any) -> None:
    """Write `1/manifest.json` of an engine."""
    described = {"schema_version": 2, "engine": "onnx", "precision": "fp16", **entries}
    (folder / "1" / "manifest.json").write_text(json.dumps(described))


def channel_model(channel: int) -> onnx.ModelProto:
    """uint8 [B, S, S, 3] -> uint8 [B, S, S], one channel."""
    model = red_channel(0)
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.array(channel, np.int64), "zero"))
    return model
