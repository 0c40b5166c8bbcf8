"""What the exporter writes loads on a real Triton and answers as the reference does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import tritonclient.grpc as triton
from click.testing import CliRunner
from numpy.typing import NDArray
from PIL import Image

from matteserve_client import ModelContract
from matteserve_client._cli import cli
from matteserve_export._session import make_runner
from matteserve_export.compare import normalise, reference_alpha, run_maps
from matteserve_export.conformance import fill_module
from matteserve_export.models import build_model
from matteserve_export.pipeline import ExportConfig, export_model
from matteserve_export.serving import ServingConfig, load_core
from matteserve_export.weights import find_weights
from matteserve_server import EmbeddedServer, ServerOptions

pytestmark = pytest.mark.triton

SCENE = Path(__file__).parents[2] / "examples" / "scene.jpg"


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


def _matteserve(*arguments: object) -> str:
    """Run a command; return what it printed."""
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "names",
    [
        pytest.param(("u2netp", "isnet", "birefnet_lite"), id="light"),
        pytest.param(("u2net", "birefnet_pvt_v2_b2", "birefnet_swin_s"), id="heavier", marks=pytest.mark.slow),
        pytest.param(("birefnet_swin_b",), id="swin_b", marks=pytest.mark.slow),
        pytest.param(("birefnet",), id="swin_l", marks=pytest.mark.slow),
    ],
)
def test_every_architecture_answers_as_torch_does_in_batches_of_one_to_four(
    names: tuple[str, ...], scenes: NDArray[np.uint8], tmp_path: Path
) -> None:
    """From the command line to the wire, without a checkpoint."""
    repository = tmp_path / "models"
    for name in names:
        size = f"{scenes.shape[1]}x{scenes.shape[2]}"
        arguments = ["--init", "conformance", "--size", size, "--max-batch-size", 4, "--model-repository", repository]
        assert "licence none" in _matteserve("export", name, *arguments)
    images = scenes[:4]
    options = ServerOptions(repository, names, grpc_port=0, metrics_port=None)
    with EmbeddedServer(options) as server, triton.InferenceServerClient(server.address) as connection:
        for name in names:
            weights = find_weights(name)
            model = build_model(weights.architecture)
            fill_module(model, 0)
            wrap = ServingConfig(weights.mean, weights.std, weights.sigmoid, weights.min_max)
            with torch.inference_mode():
                expected = reference_alpha(model(torch.from_numpy(normalise(images, wrap))).numpy(), wrap)
            assert np.ptp(expected) > 50  # flat masks would prove nothing
            singles = np.concatenate([_infer(connection, name, images[i : i + 1]) for i in range(4)]).astype(int)
            assert np.abs(singles - expected).max() <= 1, name
            for batch in (2, 3, 4):
                assert np.abs(_infer(connection, name, images[:batch]) - singles[:batch]).max() <= 1, (name, batch)


def _free_gigabytes() -> float:
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) / 2**20


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("name", "gigabytes"), [("u2net", 4), ("isnet", 6), ("birefnet_lite", 9), ("birefnet", 14)])
def test_full_size_models_cut_out_a_picture(name: str, gigabytes: float, tmp_path: Path) -> None:
    """The whole way at the size of the released weights: export, serve, `matteserve remove`."""
    if _free_gigabytes() < gigabytes:
        pytest.skip(f"{name} at full size needs about {gigabytes} GB of free memory, there are {_free_gigabytes():.1f}")
    _matteserve("export", name, "--init", "conformance", "--model-repository", tmp_path / "models")
    options = ServerOptions(tmp_path / "models", (name,), grpc_port=0, metrics_port=None, start_timeout_s=600)
    with EmbeddedServer(options) as server:
        cutout = tmp_path / "cutout.png"
        _matteserve("remove", SCENE, "-o", cutout, "--address", server.address, "--model", name, "--timeout-s", 600)
    with Image.open(cutout) as image, Image.open(SCENE) as scene:
        assert (image.mode, image.size) == ("RGBA", scene.size)
        assert np.ptp(np.asarray(image.getchannel("A"))) > 50
