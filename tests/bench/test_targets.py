"""Ways to send, against the real server."""

from __future__ import annotations

import io
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from matteserve_bench import Session, Setup, TargetError
from matteserve_bench.payloads import generate_jpeg, load_pictures, tensors_of
from matteserve_bench.targets import ImageTarget, Outcome, SharedMemoryTarget, Target, TensorTarget
from matteserve_client import ContractError, ModelContract, ModelNotFoundError, ServerUnavailableError
from matteserve_server import EmbeddedServer
from support.tiny_model import SIZE

CONTRACT = ModelContract(SIZE, SIZE, 8, "bilinear", "bilinear", architecture="red", weights="tiny")


def send(target: Target, count: int) -> list[Outcome]:
    """Send requests all at once and wait for their outcomes."""
    outcomes: list[Outcome] = []
    all_done = threading.Semaphore(0)

    def done(outcome: Outcome) -> None:
        outcomes.append(outcome)
        all_done.release()

    for index in range(count):
        target.send(index, done)
    for _ in range(count):
        assert all_done.acquire(timeout=30)
    return outcomes


def tensors(rows: int = 1) -> list[np.ndarray[Any, Any]]:
    return tensors_of([generate_jpeg(seed, (SIZE, SIZE)) for seed in range(3)], CONTRACT, rows)


@pytest.mark.triton
@pytest.mark.parametrize("kind", [TensorTarget, SharedMemoryTarget])
def test_tensors_reach_the_model(bench_server: EmbeddedServer, kind: type[TensorTarget]) -> None:
    before = bench_server.control.statistics("tiny_onnx_fp32").inferences
    target = kind(bench_server.address, "tiny", tensors(rows=2), CONTRACT)
    try:
        target.check()
        outcomes = send(target, 20)
    finally:
        target.close()
    assert {outcome.error for outcome in outcomes} == {""}
    assert bench_server.control.statistics("tiny_onnx_fp32").inferences - before == 2 * 21
    wire = outcomes[0].bytes_out
    assert (wire > 2 * SIZE * SIZE * 3) == (kind is TensorTarget)
    assert not [name for name in os.listdir("/dev/shm") if name.startswith(f"matteserve-bench-{os.getpid()}")]


@pytest.mark.triton
def test_the_answer_in_shared_memory_is_the_models(bench_server: EmbeddedServer) -> None:
    """The tiny model's alpha is the red channel."""
    inputs = tensors()
    target = SharedMemoryTarget(bench_server.address, "tiny", inputs, CONTRACT)
    try:
        send(target, 16)
        output = np.ndarray((16, SIZE, SIZE), np.uint8, target._regions[1].buf).copy()
    finally:
        target.close()
    for place in range(16):
        np.testing.assert_array_equal(output[place], inputs[place % 3][0, ..., 0])


@pytest.mark.triton
def test_pictures_come_back_as_cut_outs(bench_server: EmbeddedServer) -> None:
    target = ImageTarget(bench_server.address, "tiny", [generate_jpeg(0, (60, 80))], workers=2)
    try:
        target.check()
        (outcome,) = send(target, 1)
    finally:
        target.close()
    assert outcome.error == ""
    assert outcome.bytes_in > 1000
    assert outcome.stages is not None
    assert list(outcome.stages) == ["decode", "preprocess", "request", "postprocess", "encode"]
    assert all(seconds > 0 for seconds in outcome.stages.values())


def test_a_server_that_is_not_there() -> None:
    target = TensorTarget("127.0.0.1:1", "tiny", tensors(), CONTRACT)
    with pytest.raises(ServerUnavailableError):
        target.check()
    assert {outcome.error for outcome in send(target, 2)} == {"ServerUnavailableError"}
    target.close()
    with pytest.raises(TargetError, match=r"does not take shared memory .*--allow-client-shm=true"):
        SharedMemoryTarget("127.0.0.1:1", "tiny", tensors(), CONTRACT)
    assert not [name for name in os.listdir("/dev/shm") if name.startswith(f"matteserve-bench-{os.getpid()}")]
    pictures = ImageTarget("127.0.0.1:1", "tiny", [generate_jpeg(0, (60, 80))])
    assert send(pictures, 1)[0].error == "ServerUnavailableError"
    pictures.close()


@pytest.mark.triton
def test_a_model_with_another_output(bench_server: EmbeddedServer) -> None:
    other = ModelContract(SIZE // 2, SIZE, 8, "bilinear", "bilinear", architecture="red", weights="tiny")
    target = TensorTarget(bench_server.address, "tiny", tensors(), other)
    with pytest.raises(TargetError, match=r"answers with .*32, 32.*expected 'alpha' UINT8 \(1, 16, 32\)"):
        target.check()
    target.close()


def test_no_room_for_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, offset: int, size: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(TargetError, match=r"no room for 0 MiB in /dev/shm \(No space left on device\)"):
        SharedMemoryTarget("127.0.0.1:1", "tiny", tensors(), CONTRACT)
    assert not [name for name in os.listdir("/dev/shm") if name.startswith(f"matteserve-bench-{os.getpid()}")]


@pytest.mark.triton
def test_a_session_refuses_what_cannot_be(bench_server: EmbeddedServer) -> None:
    with pytest.raises(TargetError, match="takes at most 8 images in a request, 9 were asked for"):
        Session(Setup(bench_server.address, "tiny", rows=9))
    with pytest.raises(ModelNotFoundError):
        Session(Setup(bench_server.address, "nothing"))
    with pytest.raises(ValueError, match="whole pictures go one by one"):
        Setup(bench_server.address, "tiny", what="images", transport="shm")
    assert issubclass(ContractError, Exception)


def test_pictures_are_distinct_and_the_same_each_time() -> None:
    assert generate_jpeg(0, (40, 60)) == generate_jpeg(0, (40, 60)) != generate_jpeg(1, (40, 60))
    assert Image.open(io.BytesIO(generate_jpeg(0, (40, 60)))).size == (60, 40)
    pool = tensors(rows=2)
    assert [tensor.shape for tensor in pool] == [(2, SIZE, SIZE, 3)] * 3
    np.testing.assert_array_equal(pool[0][1], pool[1][0])
    assert (pool[0][0] != pool[0][1]).any()


def test_pictures_of_a_folder(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"has no picture; looked for \.jpeg, \.jpg, \.png, \.webp"):
        load_pictures(tmp_path)
    (tmp_path / "a.JPG").write_bytes(b"a")
    (tmp_path / "b.png").write_bytes(b"b")
    (tmp_path / "notes.txt").write_bytes(b"c")
    assert load_pictures(tmp_path) == [b"a", b"b"]
    assert load_pictures(tmp_path, count=1) == [b"a"]
