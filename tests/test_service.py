"""Client and real server together: the bad-input table, faults in the middle of a request, and a soak.

The model's alpha is the picture's red channel, so every answer is known.
"""

from __future__ import annotations

import asyncio
import io
import os
import random
import signal
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from matteserve_client import (
    AsyncClient,
    Client,
    DeadlineExceededError,
    ImageTooLargeError,
    InferenceError,
    InvalidImageError,
    MatteserveError,
    ModelNotFoundError,
    ServerOverloadedError,
    ServerUnavailableError,
    UnsupportedFormatError,
)
from matteserve_server import EmbeddedServer, ServerOptions
from support.tiny_model import SIZE, write_repository

pytestmark = pytest.mark.triton


def server_for(repository: Path) -> EmbeddedServer:
    return EmbeddedServer(ServerOptions(repository, grpc_port=0, metrics_port=None, exit_timeout_s=10.0))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    with server_for(write_repository(tmp_path_factory.mktemp("fast"))) as running:
        yield running


@pytest.fixture
def client(server: EmbeddedServer) -> Iterator[Client]:
    with Client(server.address) as connected:
        yield connected


@pytest.fixture
def slow_server(tmp_path: Path) -> Iterator[EmbeddedServer]:
    """One request at a time, each of about half a second; a queue of two."""
    with server_for(write_repository(tmp_path, delay=1500, max_queue_size=2, batch=1)) as running:
        yield running


def noise(seed: int, height: int = SIZE, width: int = SIZE) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def encoded(image: np.ndarray, fmt: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, fmt)
    return buffer.getvalue()


def expected_alpha(image: np.ndarray) -> np.ndarray:
    return image[..., 0].astype(np.float32) / 255


@dataclass(frozen=True)
class Bad:
    name: str
    image: Callable[[], Any]
    error: type[MatteserveError]
    message: str


BAD_INPUTS = [
    Bad("not_an_image", lambda: b"just some text, no pixels", InvalidImageError, "image bytes: is not an image"),
    Bad("empty_file", lambda: b"", InvalidImageError, r"image bytes: is empty \(0 bytes\)"),
    Bad(
        "truncated_jpeg",
        lambda: encoded(noise(0, 200, 200), "JPEG")[:3000],
        InvalidImageError,
        "the JPEG data is truncated or damaged",
    ),
    Bad("truncated_header", lambda: encoded(noise(0))[:20], InvalidImageError, "the PNG header is damaged or cut off"),
    Bad("missing_file", lambda: "no/such/file.jpg", InvalidImageError, r"'no/such/file\.jpg': cannot be read: No such"),
    Bad("other_format", lambda: encoded(noise(0), "ICO"), UnsupportedFormatError, "is ICO, which is not read; allowed"),
    Bad(
        "bomb",
        lambda: bomb(40_000, 40_000),
        ImageTooLargeError,
        r"is 40000 x 40000 = 1,600,000,000 pixels, the limit is 100,000,000",
    ),
    Bad("float_array", lambda: noise(0) / 255, InvalidImageError, "dtype is float64, must be uint8"),
    Bad("nan_array", lambda: np.full((8, 8, 3), np.nan, np.float32), InvalidImageError, "float32 with NaN or infinity"),
    Bad("shape", lambda: np.zeros((1, 8, 8, 3), np.uint8), InvalidImageError, r"shape is \(1, 8, 8, 3\), must be"),
    Bad("no_pixels", lambda: np.zeros((0, 8, 3), np.uint8), InvalidImageError, "it has no pixels"),
    Bad("other_type", lambda: 42, InvalidImageError, "cannot take an image from int"),
]


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header promises a huge picture."""
    data = bytearray(encoded(noise(0)))
    data[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    return bytes(data)


@pytest.mark.parametrize("bad", BAD_INPUTS, ids=lambda bad: bad.name)
def test_bad_input_is_refused_clearly_and_the_next_one_works(client: Client, bad: Bad) -> None:
    with pytest.raises(bad.error, match=bad.message):
        client.remove(bad.image())
    np.testing.assert_array_equal(client.alpha(noise(1)), expected_alpha(noise(1)))


@pytest.mark.parametrize(("height", "width"), [(1, 1), (10, 20_000), (20_000, 10), (33, 31)])
def test_any_shape_comes_back_at_its_size(client: Client, height: int, width: int) -> None:
    image = np.full((height, width, 3), 128, np.uint8)
    alpha = client.alpha(image)
    assert alpha.shape == (height, width)
    assert alpha.dtype == np.float32
    np.testing.assert_allclose(alpha, 128 / 255, atol=1e-6)


def test_straight_alpha_leaves_rgb_untouched(client: Client) -> None:
    cutout = client.remove(noise(2))
    assert cutout.mode == "RGBA"
    np.testing.assert_array_equal(np.asarray(cutout)[..., :3], noise(2))
    np.testing.assert_array_equal(np.asarray(cutout)[..., 3], noise(2)[..., 0])


def test_unknown_model(client: Client) -> None:
    with pytest.raises(ModelNotFoundError, match="u3net"):
        client.alpha(noise(0), model="u3net")


def test_server_down() -> None:
    with Client("127.0.0.1:9", timeout_s=5) as client:
        assert client.ready() is False
        with pytest.raises(ServerUnavailableError, match=r"127\.0\.0\.1:9"):
            client.alpha(noise(0))


def test_models_and_readiness(client: Client) -> None:
    assert client.ready()
    assert [(model.name, model.ready) for model in client.models()] == [("tiny", True), ("tiny_onnx_fp32", True)]
    assert client.contract().input_shape == (SIZE, SIZE, 3)


def test_many_keep_their_order_and_lose_nobody(client: Client) -> None:
    images: list[Any] = [noise(seed) for seed in range(40)]
    images[7] = b"broken"
    results = list(client.remove_many(images, in_flight=8))
    assert isinstance(results[7], InvalidImageError)
    for index, result in enumerate(results):
        if index != 7:
            assert isinstance(result, Image.Image)
            np.testing.assert_array_equal(np.asarray(result)[..., 3], images[index][..., 0])


def test_async_client_answers_the_same(server: EmbeddedServer) -> None:
    async def run() -> list[np.ndarray]:
        async with AsyncClient(server.address) as client:
            return list(await asyncio.gather(*(client.alpha(noise(seed)) for seed in range(16))))

    for seed, alpha in enumerate(asyncio.run(run())):
        np.testing.assert_array_equal(alpha, expected_alpha(noise(seed)))


def test_deadline_passed(slow_server: EmbeddedServer) -> None:
    with Client(slow_server.address) as client:
        client.contract()
        (pid,) = slow_server.process.stubs()
        os.kill(pid, signal.SIGSTOP)  # slower than any deadline, on any machine
        with pytest.raises(DeadlineExceededError, match=r"0\.05 s"):
            client.alpha(noise(0), timeout_s=0.05)
        os.kill(pid, signal.SIGCONT)
        np.testing.assert_array_equal(client.alpha(noise(1)), expected_alpha(noise(1)))


def test_queue_full(slow_server: EmbeddedServer) -> None:
    with Client(slow_server.address) as client:
        client.contract()
        with ThreadPoolExecutor(12) as pool:
            futures = [pool.submit(client.alpha, noise(seed)) for seed in range(12)]
        errors = [error for future in futures if (error := future.exception()) is not None]
        answered = [(seed, future.result()) for seed, future in enumerate(futures) if future.exception() is None]
        assert errors
        assert answered
        for error in errors:
            assert isinstance(error, ServerOverloadedError), error
            assert "queue" in str(error)
        for seed, alpha in answered:
            np.testing.assert_array_equal(alpha, expected_alpha(noise(seed)))


def test_stub_killed_in_the_middle_of_a_request(slow_server: EmbeddedServer) -> None:
    with Client(slow_server.address) as client:
        client.contract()
        with ThreadPoolExecutor(1) as pool:
            (pid,) = slow_server.process.stubs()
            os.kill(pid, signal.SIGSTOP)  # so that the request is in its middle, however fast the machine is
            pending = pool.submit(client.alpha, noise(0))
            time.sleep(0.3)
            os.kill(pid, signal.SIGKILL)
            with pytest.raises(InferenceError, match="tiny"):
                pending.result(timeout=30)
        killed = time.monotonic()
        while True:
            try:
                alpha = client.alpha(noise(1))
                break
            except MatteserveError:
                assert time.monotonic() - killed < 10, "the model is not back within 10 s"
                time.sleep(0.1)
        np.testing.assert_array_equal(alpha, expected_alpha(noise(1)))


def test_server_killed_in_the_middle_of_a_request(tmp_path: Path) -> None:
    repository = write_repository(tmp_path, delay=1500, batch=1)
    before = set(os.listdir("/dev/shm"))
    with server_for(repository) as first, Client(first.address) as client:
        client.contract()
        with ThreadPoolExecutor(1) as pool:
            (pid,) = first.process.stubs()
            os.kill(pid, signal.SIGSTOP)
            pending = pool.submit(client.alpha, noise(0))
            time.sleep(0.3)
            first.process.kill()
            with pytest.raises(ServerUnavailableError, match="tiny"):
                pending.result(timeout=30)
        port = first.options.grpc_port
        first.stop()
        # The same client goes on once the server is back at its address.
        with EmbeddedServer(ServerOptions(repository, grpc_port=port, metrics_port=None)):
            deadline = time.monotonic() + 20
            while not client.ready():
                assert time.monotonic() < deadline
                time.sleep(0.1)
            np.testing.assert_array_equal(client.alpha(noise(1)), expected_alpha(noise(1)))
    assert set(os.listdir("/dev/shm")) <= before


def resident_bytes(pids: list[int]) -> int:
    pages = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids)
    return pages * os.sysconf("SC_PAGE_SIZE")


def test_soak_of_good_and_bad_requests(tmp_path: Path) -> None:
    before = set(os.listdir("/dev/shm"))
    with server_for(write_repository(tmp_path)) as server, Client(server.address) as client:
        wrong: list[str] = []
        answered = threading.Semaphore(0)

        def one(index: int) -> None:
            if random.Random(index).random() < 0.3:
                bad = BAD_INPUTS[index % len(BAD_INPUTS)]
                try:
                    client.remove(bad.image())
                    wrong.append(f"{index}: {bad.name} was accepted")
                except bad.error:
                    return
            elif not np.array_equal(client.alpha(encoded(noise(index))), expected_alpha(noise(index))):
                wrong.append(f"{index}: wrong alpha")
            else:
                answered.release()

        def run(count: int, offset: int) -> int:
            with ThreadPoolExecutor(16) as pool:
                list(pool.map(one, range(offset, offset + count)))
            return resident_bytes([server.process.pid, *server.process.stubs()])

        warm = run(300, 0)
        grown = run(1000, 300) - warm
        assert wrong == []
        assert grown < 16 << 20, f"the server grew by {grown >> 20} MiB in 1,000 requests"
        assert client.ready()
        assert server.supervisor is not None
        assert server.supervisor.recoveries == []
        count = 0
        while answered.acquire(blocking=False):
            count += 1
        # The probe of an idle supervisor may add a few.
        assert 0 <= server.control.statistics("tiny_onnx_fp32").inferences - count <= 5
    left = {name for name in os.listdir("/dev/shm") if name.startswith("matteserve_")} - before
    assert left == set()
