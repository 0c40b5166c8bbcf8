"""The same weights for both sides: one float ONNX each, under rembg's name for rembg and exported for matteserve."""

from __future__ import annotations

import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from matteserve_client._contract import Numerics

_DEMO_WEIGHTS = Path(__file__).parents[3] / "export" / "demo_weights" / "u2netp_demo.safetensors"

REMBG_NAMES = {
    "u2netp": "u2netp",
    "u2net": "u2net",
    "isnet": "isnet-general-use",
    "birefnet_lite": "birefnet-general-lite",
    "birefnet": "birefnet-general",
}
"""The models that both sides have, by our name."""


@dataclass(frozen=True)
class PreparedModel:
    """One model, ready for every side.

    Attributes:
        name: Our name.
        rembg_name: rembg's.
        repository: Model repository that serves it, as `matteserve export` writes it.
        per_core_repository: The same for many requests at once on a CPU: an instance with one thread for every core,
            which takes each request by itself.
        rembg_repository: The same with rembg's numerics.
        serving_onnx: The engine's graph in the first.
    """

    name: str
    rembg_name: str
    repository: Path
    per_core_repository: Path
    rembg_repository: Path
    serving_onnx: Path


def prepare_model(name: str, cache: Path) -> PreparedModel:
    """Fill, export and wrap a model, unless the cache has it already.

    U²-Net-P gets the weights of the demonstration model, so that its masks mean something; the others get weights that
    follow from their entries' names. The time of an inference does not depend on them.

    Args:
        name: Key of `REMBG_NAMES`.
        cache: Folder; rembg's home is `cache / "rembg"`.
    """
    rembg_name = REMBG_NAMES[name]
    core = cache / "rembg" / f"{rembg_name}.onnx"
    repositories = [cache / "repositories" / f"{name}{suffix}" for suffix in ("", "-per-core", "-rembg")]
    as_written, per_core, rembg = repositories
    engine = f"{name}_onnx_fp32"
    if not core.exists():
        _export_core(name, core)
    if not (as_written / engine).exists():
        _export_serving(name, core, as_written, "reference")
    if not (rembg / engine).exists():
        _export_serving(name, core, rembg, "rembg")
    shutil.rmtree(per_core, ignore_errors=True)
    shutil.copytree(as_written, per_core)
    _one_instance_per_core(per_core / engine / "config.pbtxt")
    return PreparedModel(name, rembg_name, as_written, per_core, rembg, as_written / engine / "1" / "model.onnx")


def _one_instance_per_core(path: Path) -> None:
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    config = text_format.Parse(path.read_text(), model_config_pb2.ModelConfig())
    config.instance_group[0].count = len(os.sched_getaffinity(0))
    config.parameters["intra_op_thread_count"].string_value = "1"
    config.ClearField("dynamic_batching")
    path.write_text(text_format.MessageToString(config))


def _export_core(name: str, path: Path) -> None:
    import onnx

    from matteserve_export.checkpoints import load_into, read_state_dict
    from matteserve_export.models import build_model
    from matteserve_export.to_onnx import ToOnnxConfig, export_core
    from matteserve_export.weights import find_weights

    entry = find_weights(name)
    model = build_model(entry.architecture, **entry.options)
    if name == "u2netp":
        load_into(model, read_state_dict(_DEMO_WEIGHTS))
    else:
        from matteserve_export.conformance import fill_module

        fill_module(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part")
    onnx.save(export_core(model, ToOnnxConfig(*entry.input_size)), partial)
    partial.replace(path)


def _export_serving(name: str, core: Path, repository: Path, numerics: Numerics) -> None:
    from matteserve_export.pipeline import ExportConfig, export_model
    from matteserve_export.weights import find_weights

    logging.getLogger("matteserve_export").setLevel(logging.ERROR)  # that these are not the released weights
    shutil.rmtree(repository, ignore_errors=True)
    export_model(ExportConfig(find_weights(name), "onnx", core, repository, name, numerics=numerics))
