"""Compares casters to fp16, the table of docs/precision.md: `python docs/precision/casters.py model.onnx …`.

Takes FP32 serving graphs (`…_onnx_fp32/1/model.onnx`). Needs `nvidia-modelopt` and `onnx-graphsurgeon` beside
matteserve[export,rtx], best in an environment of its own.
"""

from __future__ import annotations

import logging
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto

from matteserve_export._mixed import value_types
from matteserve_export._session import make_runner
from matteserve_export.compare import gate_engine, make_scenes
from matteserve_export.emulate import emulate
from matteserve_export.engine import EngineConfig, build_plan
from matteserve_export.lowering import lower_deform_conv
from matteserve_export.precision import TOLERANCES, check_serving, convert, kept_nodes


def casters(serving: onnx.ModelProto, folder: Path, images: np.ndarray) -> Iterator[tuple[str, onnx.ModelProto, float]]:
    """Name, result and seconds of each caster."""
    from modelopt.onnx.autocast import convert_to_mixed_precision
    from onnxruntime.transformers.float16 import convert_float_to_float16

    source, calibration = folder / "fp32.onnx", folder / "calibration.npz"
    onnx.save(serving, source)
    np.savez(calibration, image=images[:1])
    kept = kept_nodes(serving)
    names = [node.name for node in serving.graph.node if node.output[0] in kept]
    exact = [f"^{re.escape(name)}$" for name in names]
    auto = {"low_precision_type": "fp16", "keep_io_types": True, "calibration_data": str(calibration)}
    tools = {
        "ours": lambda: convert(serving, "fp16"),
        "ONNX Runtime": lambda: convert_float_to_float16(onnx.load(source), keep_io_types=True, node_block_list=names),
        "AutoCast, our list": lambda: convert_to_mixed_precision(str(source), nodes_to_exclude=exact, **auto),
        "AutoCast, own choice": lambda: convert_to_mixed_precision(str(source), **auto),
    }
    for name, cast in tools.items():
        started = time.monotonic()
        yield name, cast(), time.monotonic() - started


def row(name: str, cast: onnx.ModelProto, seconds: float, serving: onnx.ModelProto, images: np.ndarray) -> str:
    """One line of the table."""
    types, nodes = value_types(cast), [node for node in cast.graph.node if node.op_type != "Constant"]
    kept = kept_nodes(serving)
    asked = {node.name for node in serving.graph.node if node.output[0] in kept}
    casts = [node for node in nodes if node.op_type == "Cast"]
    full = [node for node in nodes if node.op_type != "Cast" and types.get(node.output[0]) == TensorProto.FLOAT]
    # Of a graph whose nodes are out of order no types can be told, only what was asked for.
    full = full or [node for node in nodes if node.name in asked and node.output[0] not in types]
    cells = [name, len(casts), len(full), f"{seconds:.1f}"]
    for graph, method in ((cast, "ort-cpu"), (emulate(cast), "emulated")):
        outcome = gate_engine(
            make_runner(graph), make_runner(serving), images, TOLERANCES["fp16"], method, batch_sizes=(1, 2)
        )
        cells.append(f"{outcome.difference.mean_abs * 255:.3f}")
    try:
        onnx.checker.check_model(cast, full_check=True)
        valid = ""
    except onnx.checker.ValidationError:
        valid = ", not valid"
    cells.append(f"{cast.ByteSize() / 2**20:.1f}{valid}")
    with tempfile.TemporaryDirectory() as folder:
        onnx.save(cast, Path(folder) / "model.onnx")
        plan = build_plan(Path(folder) / "model.onnx", Path(folder) / "model.plan", EngineConfig("rtx", "fp16"))
    cells.append(f"{plan.builder['seconds']} s, {plan.size / 2**20:.1f}")
    return f"| {' | '.join(map(str, cells))} |"


def main(paths: list[str]) -> None:
    """Print the rows of each graph."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    for path in paths:
        serving = lower_deform_conv(onnx.load(path))
        images = make_scenes(2, *check_serving(serving), seed=2)
        with tempfile.TemporaryDirectory() as folder:
            for name, cast, seconds in casters(serving, Path(folder), images):
                print(path, row(name, cast, seconds, serving, images), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
