"""The bundled model through the whole path (client, gRPC, batcher, engine) against torch and against rembg."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import tritonclient.grpc as triton
from numpy.typing import NDArray
from PIL import Image

from matteserve_client import Client
from matteserve_export.checkpoints import load_into, read_state_dict
from matteserve_export.demo_model.scenes import generate
from matteserve_export.models import build_model
from matteserve_export.pipeline import ExportConfig, export_model
from matteserve_export.to_onnx import ToOnnxConfig, export_core
from matteserve_export.weights import find_weights
from matteserve_server import EmbeddedServer, ServerOptions
from matteserve_server.control import EngineStatistics

pytestmark = pytest.mark.triton

DEMO = find_weights("demo")
U2NETP = find_weights("u2netp")
SEED = 77  # of scenes that training did not see
WEIGHTS = Path(__file__).parents[1] / "export" / "demo_weights" / "u2netp_demo.safetensors"
ONE_STEP = 1 / 255 + 1e-6


@pytest.fixture(scope="module")
def client(demo_server: EmbeddedServer) -> Iterator[Client]:
    with Client(demo_server.address) as connected:
        yield connected


@pytest.fixture(scope="module")
def network() -> torch.nn.Module:
    model = build_model("u2netp")
    load_into(model, read_state_dict(WEIGHTS))
    return model


def scene(index: int, size: tuple[int, int]) -> NDArray[np.uint8]:
    """A generated picture, uint8 RGB, at (height, width)."""
    height, width = size
    return np.asarray(Image.fromarray(generate(SEED, index, 320).image).resize((width, height)))


def pictures(input_size: tuple[int, int]) -> list[NDArray[np.uint8]]:
    """Scenes at the input's size, larger, smaller, and of another aspect ratio."""
    sizes = [input_size, (640, 480), (160, 256), (333, 517)]
    return [scene(index, size) for index, size in enumerate(sizes)]


@pytest.mark.parametrize("index", range(4))
def test_alpha_equals_torch(client: Client, network: torch.nn.Module, index: int) -> None:
    image = pictures(DEMO.input_size)[index]
    height, width = DEMO.input_size
    resized = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
    pixels = np.asarray(resized, np.float32) / 255
    pixels = (pixels - np.float32([0.485, 0.456, 0.406])) / np.float32([0.229, 0.224, 0.225])
    with torch.inference_mode():
        probability = network(torch.from_numpy(pixels.transpose(2, 0, 1)[None]))[0, 0].numpy()
    stretched = (probability - probability.min()) / (probability.max() - probability.min())
    mask = Image.fromarray(np.round(255 * stretched).astype(np.uint8))
    expected = np.asarray(mask.resize(image.shape[1::-1], Image.Resampling.BILINEAR), np.float32) / 255
    alpha = client.alpha(image)
    assert alpha.shape == image.shape[:2]
    assert np.ptp(expected) > 0.9, "a flat picture would prove nothing"
    assert np.abs(alpha - expected).max() <= ONE_STEP


def infer(connection: triton.InferenceServerClient, model: str, batch: NDArray[np.uint8]) -> NDArray[np.uint8]:
    tensor = triton.InferInput("image", batch.shape, "UINT8")
    tensor.set_data_from_numpy(batch)
    return connection.infer(model, [tensor]).as_numpy("alpha")


def test_every_row_of_a_batch_equals_the_single_request(demo_server: EmbeddedServer) -> None:
    batch = np.stack([scene(i, DEMO.input_size) for i in range(8)])
    with triton.InferenceServerClient(demo_server.address) as connection:
        singles = np.concatenate([infer(connection, "demo", batch[i : i + 1]) for i in range(8)])
        assert np.ptp(singles.astype(int), axis=(1, 2)).min() > 200
        for size in range(1, 9):
            rows = infer(connection, "demo", batch[:size]).astype(int)
            assert np.abs(rows - singles[:size]).max() <= 1, f"batch of {size}"


def counted(server: EmbeddedServer, before: EngineStatistics, at_least: int) -> tuple[int, int]:
    """Inferences and executions since; Triton counts a batch when all of it is done, after its answers are out."""
    deadline = time.monotonic() + 10
    while True:
        after = server.control.statistics("demo_onnx_fp32")
        inferences = after.inferences - before.inferences
        if inferences >= at_least:
            return inferences, after.executions - before.executions
        assert time.monotonic() < deadline, f"{inferences} of {at_least} inferences were counted"
        time.sleep(0.05)


def test_requests_in_flight_are_batched(demo_server: EmbeddedServer, client: Client) -> None:
    image = scene(0, DEMO.input_size)
    client.contract()
    before = demo_server.control.statistics("demo_onnx_fp32")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: client.alpha(image), range(32)))
    inferences, executions = counted(demo_server, before, 32)
    assert inferences / executions > 2, f"{inferences} inferences in {executions} executions"


def test_remove_many_is_batched_too(demo_server: EmbeddedServer, client: Client) -> None:
    before = demo_server.control.statistics("demo_onnx_fp32")
    assert len(list(client.remove_many([scene(0, DEMO.input_size)] * 24, in_flight=8))) == 24
    inferences, executions = counted(demo_server, before, 24)
    assert inferences / executions > 2, f"{inferences} inferences in {executions} executions"


REMBG = """
import sys
import time
import numpy as np
from PIL import Image
from rembg import new_session, remove
session = new_session("u2netp", providers=["CPUExecutionProvider"])
for path in sys.argv[1:]:
    np.save(path + ".npy", np.asarray(remove(Image.open(path), session=session, only_mask=True)))
"""


def rembg_pictures() -> dict[str, NDArray[np.uint8]]:
    """Pictures whose resized maximum is 255, and dark ones, which rembg stretches."""
    bright, dark = [], []
    for picture in pictures(U2NETP.input_size):
        white = picture.copy()
        white[: len(white) // 8, : len(white) // 8] = 255
        bright.append(white)
        dark.append((picture * 0.6).astype(np.uint8))
    return {f"{name}{i}": p for name, group in (("bright", bright), ("dark", dark)) for i, p in enumerate(group)}


@pytest.mark.skipif(importlib.util.find_spec("rembg") is None, reason="rembg is not installed: matteserve[parity]")
def test_parity_mode_equals_rembg(network: torch.nn.Module, tmp_path: Path) -> None:
    core = tmp_path / "u2netp.onnx"
    onnx.save(export_core(network, ToOnnxConfig(*U2NETP.input_size)), core)
    images = rembg_pictures()
    paths = {name: tmp_path / f"{name}.png" for name in images}
    for name, image in images.items():
        Image.fromarray(image).save(paths[name])
    # rembg takes <U2NET_HOME>/u2netp.onnx as its own weights.
    environment = {**os.environ, "U2NET_HOME": str(tmp_path), "MODEL_CHECKSUM_DISABLED": "1"}
    subprocess.run([sys.executable, "-c", REMBG, *map(str, paths.values())], env=environment, check=True)

    repository = tmp_path / "repository"
    export_model(ExportConfig(U2NETP, "onnx", core, repository, "u2netp"))
    with (
        EmbeddedServer(ServerOptions(repository, grpc_port=0, metrics_port=None)) as server,
        Client(server.address, parity="rembg") as client,
    ):
        for name, path in paths.items():
            theirs = np.load(f"{path}.npy").astype(int)
            ours = np.round(255 * client.alpha(path)).astype(int)
            difference = np.abs(ours - theirs)
            assert np.ptp(theirs) > 200, "a flat mask would prove nothing"
            if name.startswith("bright"):
                # Nothing but the server's rounding, where rembg truncates, and Pillow's between its two passes.
                assert (difference > 1).mean() < 0.005, name
                assert difference.max() <= (1 if theirs.shape == U2NETP.input_size else 3), name
            else:
                # The wire is uint8: a dark picture, which rembg stretches, is rounded once more before the network,
                # by up to half a step; what the network makes of that depends on its weights.
                assert difference.mean() < 2, name
                assert difference.max() <= 40, name

    exact = tmp_path / "exact"
    export_model(ExportConfig(U2NETP, "onnx", core, exact, "u2netp", numerics="rembg"))
    with (
        EmbeddedServer(ServerOptions(exact, grpc_port=0, metrics_port=None)) as server,
        Client(server.address) as client,
    ):
        for name, path in paths.items():
            ours = np.round(255 * client.alpha(path)).astype(int)
            difference = np.abs(ours - np.load(f"{path}.npy").astype(int))
            # float32 where rembg has float64: now and then the truncation falls on the other side.
            assert difference.max() <= 2, name
            assert (difference > 0).mean() < 0.01, name
