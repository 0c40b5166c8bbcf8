"""What the exporter writes loads on a real Triton and answers as the reference does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as triton
from numpy.typing import NDArray

from matteserve_client import ModelContract
from matteserve_export._session import make_runner
from matteserve_export.compare import reference_alpha, run_maps
from matteserve_export.pipeline import ExportConfig, export_model
from matteserve_export.serving import ServingConfig, load_core
from matteserve_export.weights import find_weights
from matteserve_server import EmbeddedServer, ServerOptions

pytestmark = pytest.mark.triton


def _infer(connection: triton.InferenceServerClient, model: str, images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    tensor = triton.InferInput("image", images.shape, "UINT8")
    tensor.set_data_from_numpy(images)
    return connection.infer(model, [tensor], client_timeout=30).as_numpy("alpha")


def test_exported_models_answer(public_onnx: Callable[..., Path], scenes: NDArray[np.uint8], tmp_path: Path) -> None:
    """One model that takes batches, one whose ONNX has batch 1 written into it; the alias and the engine."""
    weights = find_weights("u2netp")
    files = {"batched": public_onnx(), "single": public_onnx(baked_batch=True)}
    for model, path in files.items():
        export_model(ExportConfig(weights, "onnx", path, tmp_path / "models", model))
    wrap = ServingConfig(weights.mean, weights.std, weights.sigmoid, weights.min_max)
    maps = run_maps(make_runner(load_core(files["batched"])), scenes, wrap)
    expected = {"batched": reference_alpha(maps, wrap)}
    expected["single"] = reference_alpha(run_maps(make_runner(load_core(files["single"])), scenes, wrap), wrap)

    options = ServerOptions(tmp_path / "models", tuple(files), grpc_port=0, metrics_port=None)
    with EmbeddedServer(options) as server, triton.InferenceServerClient(server.address) as connection:
        for model in files:
            contract = ModelContract.from_config(connection.get_model_config(model).config)
            assert contract.max_batch_size == {"batched": 8, "single": 1}[model]
            for name in (model, f"{model}_onnx_fp32"):
                step = contract.max_batch_size
                rows = [_infer(connection, name, scenes[i : i + step]) for i in range(0, len(scenes), step)]
                alpha = np.concatenate(rows).astype(int)
                assert np.abs(alpha - expected[model]).max() <= 1
