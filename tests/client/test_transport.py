"""The gRPC transports against a real gRPC server that answers as it is told."""

from __future__ import annotations

import asyncio
import gc
import os
import shutil
import socket
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2_grpc

from matteserve_client import (
    AsyncClient,
    AsyncGrpcTransport,
    Client,
    DeadlineExceededError,
    GrpcTransport,
    InferenceError,
    InvalidRequestError,
    ModelNotFoundError,
    ModelStatus,
    ServerOverloadedError,
    ServerUnavailableError,
    TlsOptions,
)
from matteserve_client._transport import _is_loopback

IMAGE = np.random.default_rng(5).integers(0, 256, (24, 32, 3), np.uint8)
Code = grpc.StatusCode


def alpha(kind: str, address: str, *, model: str = "demo", timeout_s: float = 10.0) -> Any:
    if kind == "sync":
        with Client(address, model=model, timeout_s=timeout_s) as client:
            return client.alpha(IMAGE)

    async def run() -> Any:
        async with AsyncClient(address, model=model, timeout_s=timeout_s) as client:
            return await client.alpha(IMAGE)

    return asyncio.run(run())


@pytest.fixture(params=["sync", "async"])
def kind(request: pytest.FixtureRequest) -> str:
    value: str = request.param
    return value


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def test_round_trip(kind: str, grpc_server: Any) -> None:
    np.testing.assert_array_equal(alpha(kind, grpc_server.address), IMAGE[..., 1].astype(np.float32) / np.float32(255))
    (request,) = grpc_server.servicer.requests
    assert request.model_name == "demo"
    assert [(t.name, t.datatype, list(t.shape)) for t in request.inputs] == [("image", "UINT8", [1, 24, 32, 3])]
    assert [t.name for t in request.outputs] == ["alpha"]
    assert list(request.raw_input_contents) == [IMAGE.tobytes()]


@pytest.mark.parametrize(
    ("code", "details", "error", "message"),
    [
        (
            Code.UNAVAILABLE,
            "Exceeds maximum queue size",
            ServerOverloadedError,
            "{address}, model 'demo': the queue is full (Exceeds maximum queue size); "
            "wait and try again, or send fewer at once",
        ),
        (
            Code.UNAVAILABLE,
            "in ensemble 'demo', Request timeout expired",
            ServerOverloadedError,
            "{address}, model 'demo': the queue is full (in ensemble 'demo', Request timeout expired); "
            "wait and try again, or send fewer at once",
        ),
        (
            Code.UNAVAILABLE,
            "Server is stopping, scheduler not accepting requests",
            ServerUnavailableError,
            "{address}, model 'demo': cannot reach the server, or it went away "
            "(Server is stopping, scheduler not accepting requests); "
            "is `matteserve serve` running there, and is this its gRPC port?",
        ),
        (
            Code.NOT_FOUND,
            "Request for unknown model: 'demo' is not found",
            ModelNotFoundError,
            "{address}, model 'demo': not loaded (Request for unknown model: 'demo' is not found); "
            "`matteserve models --address {address}` lists what the server has",
        ),
        (
            Code.UNAVAILABLE,
            "Request for unknown model: 'demo' has no available versions",
            ModelNotFoundError,
            "{address}, model 'demo': not loaded (Request for unknown model: 'demo' has no available versions); "
            "`matteserve models --address {address}` lists what the server has",
        ),
        (
            Code.INVALID_ARGUMENT,
            "[request id: <id_unknown>] unexpected shape for input 'image'",
            InvalidRequestError,
            "{address}, model 'demo': the server refused the request (unexpected shape for input 'image')",
        ),
        (
            Code.INTERNAL,
            "Stub process 'demo_0' is not healthy.",
            InferenceError,
            "{address}, model 'demo': the server failed with INTERNAL (Stub process 'demo_0' is not healthy.); "
            "its log may say more",
        ),
        (
            Code.UNIMPLEMENTED,
            "",
            InferenceError,
            "{address}, model 'demo': this is a gRPC server, but not a Triton Inference Server (no details)",
        ),
        (
            Code.CANCELLED,
            "stopped",
            ServerUnavailableError,
            "{address}, model 'demo': the request was cancelled before the answer came (stopped)",
        ),
        (
            Code.RESOURCE_EXHAUSTED,
            "too large",
            InferenceError,
            "{address}, model 'demo': the server failed with RESOURCE_EXHAUSTED (too large); its log may say more",
        ),
    ],
    ids=lambda value: value.name if isinstance(value, grpc.StatusCode) else "",
)
def test_status_becomes_error(
    kind: str, grpc_server: Any, code: grpc.StatusCode, details: str, error: type[Exception], message: str
) -> None:
    grpc_server.servicer.status = (code, details)
    with pytest.raises(error) as caught:
        alpha(kind, grpc_server.address)
    assert type(caught.value) is error
    assert str(caught.value) == message.format(address=grpc_server.address)
    assert isinstance(caught.value.__cause__, grpc.RpcError)


def test_unknown_model(kind: str, grpc_server: Any) -> None:
    with pytest.raises(ModelNotFoundError, match="model 'absent': not loaded"):
        alpha(kind, grpc_server.address, model="absent")


def test_deadline(kind: str, grpc_server: Any) -> None:
    grpc_server.servicer.delay_s = 5
    start = time.monotonic()
    with pytest.raises(DeadlineExceededError) as caught:
        alpha(kind, grpc_server.address, timeout_s=0.3)
    assert time.monotonic() - start < 2
    assert str(caught.value) == (
        f"{grpc_server.address}, model 'demo': no answer within 0.3 s; is the server overloaded or the address wrong? "
        "A larger timeout_s waits longer"
    )


def test_nobody_listens(kind: str, free_port: int) -> None:
    with pytest.raises(
        ServerUnavailableError, match=rf"^127\.0\.0\.1:{free_port}, model 'demo': cannot reach the server"
    ):
        alpha(kind, f"127.0.0.1:{free_port}")


def test_ready_is_false_when_nobody_listens(free_port: int) -> None:
    with Client(f"127.0.0.1:{free_port}") as client:
        assert client.ready(timeout_s=2) is False


def test_ready_is_true(grpc_server: Any) -> None:
    with Client(grpc_server.address) as client:
        assert client.ready() is True


def test_not_a_grpc_server() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                connection.recv(1000)

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        with pytest.raises((ServerUnavailableError, DeadlineExceededError)):
            alpha("sync", f"127.0.0.1:{listener.getsockname()[1]}", timeout_s=2)


def test_server_goes_away_during_the_request(kind: str, grpc_server: Any) -> None:
    grpc_server.servicer.delay_s = 20
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(alpha, kind, grpc_server.address)
        assert grpc_server.servicer.started.wait(5)
        grpc_server.server.stop(0)
        with pytest.raises(ServerUnavailableError):
            waiting.result(10)


def test_server_that_comes_back_is_found_within_seconds(grpc_server: Any, free_port: int) -> None:
    with Client(f"127.0.0.1:{free_port}", model="demo") as client:
        for _ in range(3):
            assert client.ready() is False
        server = grpc.server(ThreadPoolExecutor(2))
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(grpc_server.servicer, server)
        server.add_insecure_port(f"127.0.0.1:{free_port}")
        server.start()
        end = time.monotonic() + 5
        while not client.ready():
            assert time.monotonic() < end
            time.sleep(0.05)
        assert client.alpha(IMAGE).shape == (24, 32)
        server.stop(None).wait()


def test_closing_during_a_request(grpc_server: Any) -> None:
    grpc_server.servicer.delay_s = 20
    client = Client(grpc_server.address, model="demo")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(client.alpha, IMAGE)
        assert grpc_server.servicer.started.wait(5)
        client.close()
        with pytest.raises(ServerUnavailableError, match="cancelled"):
            waiting.result(10)


def test_closing_during_a_request_async(grpc_server: Any) -> None:
    grpc_server.servicer.delay_s = 20

    async def run() -> None:
        client = AsyncClient(grpc_server.address, model="demo")
        task = asyncio.create_task(client.alpha(IMAGE))
        await asyncio.to_thread(grpc_server.servicer.started.wait, 5)
        await client.close()
        with pytest.raises(ServerUnavailableError, match="cancelled"):
            await asyncio.wait_for(task, 10)

    asyncio.run(run())


def test_cancelling_a_task_cancels_the_request(grpc_server: Any) -> None:
    grpc_server.servicer.delay_s = 20

    async def run() -> None:
        async with AsyncClient(grpc_server.address, model="demo") as client:
            task = asyncio.create_task(client.alpha(IMAGE))
            await asyncio.to_thread(grpc_server.servicer.started.wait, 5)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(run())


def test_closed_client_says_so(kind: str, grpc_server: Any) -> None:
    if kind == "sync":
        client = Client(grpc_server.address)
        client.close()
        client.close()
        with pytest.raises(RuntimeError, match="this client is closed; create a new one"):
            client.models()
        return

    async def run() -> None:
        client = AsyncClient(grpc_server.address)
        await client.close()
        await client.close()
        with pytest.raises(RuntimeError, match="this client is closed; create a new one"):
            await client.models()

    asyncio.run(run())


def test_another_event_loop_is_refused(grpc_server: Any) -> None:
    client = AsyncClient(grpc_server.address)  # outside of any loop, on purpose
    first, second = asyncio.new_event_loop(), asyncio.new_event_loop()
    try:
        assert first.run_until_complete(client.ready())
        with pytest.raises(RuntimeError, match="belongs to another event loop"):
            second.run_until_complete(client.ready())
        first.run_until_complete(client.close())
    finally:
        first.close()
        second.close()


def test_a_forgotten_async_client_is_no_noise(grpc_server: Any) -> None:
    async def run() -> bool:
        return await AsyncClient(grpc_server.address).ready()

    assert asyncio.run(run())
    gc.collect()


def test_fork_is_refused(monkeypatch: pytest.MonkeyPatch, grpc_server: Any) -> None:
    with Client(grpc_server.address) as client:
        monkeypatch.setattr(os, "getpid", lambda: -1)  # what a forked child would see
        with pytest.raises(RuntimeError, match="created before fork"):
            client.models()
        monkeypatch.undo()


@pytest.mark.parametrize(
    "mangle",
    [
        lambda response: response.ClearField("raw_output_contents"),
        lambda response: setattr(response.outputs[0], "name", "other"),
        lambda response: setattr(response.outputs[0], "datatype", "FP32"),
        lambda response: response.outputs[0].shape.append(2),
    ],
    ids=["nothing", "name", "dtype", "length"],
)
def test_answer_without_the_alpha(kind: str, grpc_server: Any, mangle: Any) -> None:
    grpc_server.servicer.mangle = mangle
    with pytest.raises(InferenceError, match="the answer has no UINT8 tensor 'alpha'; found"):
        alpha(kind, grpc_server.address)


def test_index_has_one_entry_per_model(grpc_server: Any) -> None:
    grpc_server.servicer.index = [
        ("zebra", "1", "UNAVAILABLE", "failed to load"),
        ("zebra", "2", "READY", ""),
        ("broken", "1", "UNAVAILABLE", "no such file"),
        ("idle", "", "", ""),
    ]
    with Client(grpc_server.address) as client:
        assert client.models() == [
            ModelStatus("broken", False, "no such file"),
            ModelStatus("idle", False, ""),
            ModelStatus("zebra", True, ""),
        ]


def test_headers_are_sent(grpc_server: Any) -> None:
    headers = {"Triton-Grpc-Protocol-Inference": "secret"}
    with Client(transport=GrpcTransport(grpc_server.address, headers=headers)) as client:
        client.models()
    assert grpc_server.servicer.metadata["triton-grpc-protocol-inference"] == "secret"

    async def run() -> None:
        async with AsyncClient(transport=AsyncGrpcTransport(grpc_server.address, headers={"x-token": "t"})) as other:
            await other.models()

    asyncio.run(run())
    assert grpc_server.servicer.metadata["x-token"] == "t"


def test_batches_and_messages_beyond_grpcs_4_mib(grpc_server: Any) -> None:
    images = np.random.default_rng(1).integers(0, 256, (3, 1024, 1024, 3), np.uint8)  # 9 MiB
    transport = GrpcTransport(grpc_server.address)
    try:
        answer = transport.infer("demo", images, timeout_s=30).result()
        np.testing.assert_array_equal(answer, images[..., 1])
    finally:
        transport.close()


def test_many_threads_and_many_in_flight(grpc_server: Any) -> None:
    with Client(grpc_server.address, model="demo") as client:
        results = list(client.remove_many([np.full((5, 5, 3), v, np.uint8) for v in range(60)]))
    assert [r.getpixel((0, 0))[0] for r in results] == list(range(60))  # type: ignore[union-attr,index]


def test_stopping_remove_many_early_cancels_on_the_wire(grpc_server: Any) -> None:
    with Client(grpc_server.address, model="demo") as client:
        results = client.remove_many([IMAGE] * 100, in_flight=4)
        next(results)
        grpc_server.servicer.delay_s = 30
        time.sleep(0.1)
        start = time.monotonic()
        results.close()  # type: ignore[attr-defined]
        assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    ("address", "expected"),
    [("127.0.0.1:1", True), ("localhost:1", True), ("[::1]:1", True), ("10.0.0.1:1", False), ("gpu.example:1", False)],
)
def test_proxy_is_bypassed_for_this_machine_only(address: str, expected: bool) -> None:
    assert _is_loopback(address) is expected


def test_an_http_proxy_in_the_environment_does_not_matter(
    monkeypatch: pytest.MonkeyPatch, kind: str, grpc_server: Any
) -> None:
    for name in ("http_proxy", "https_proxy", "grpc_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert alpha(kind, grpc_server.address).shape == (24, 32)


def test_tls_options_belong_together() -> None:
    with pytest.raises(ValueError, match="client_cert and client_key belong together"):
        TlsOptions(client_cert="cert.pem")


def test_tls_file_that_is_not_there() -> None:
    with pytest.raises(FileNotFoundError, match=r"absent\.pem"):
        Client("localhost:8001", tls=TlsOptions(root_ca="absent.pem"))


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[str, str]:
    """A self-signed certificate for localhost and its key, as PEM files."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("makes its certificate with the openssl program, which is not installed")
    cert, key = str(tmp_path / "cert.pem"), str(tmp_path / "key.pem")
    kind = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    name = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    command = [openssl, "req", "-x509", *kind, *name, "-keyout", key, "-out", cert]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    return cert, key


def test_mutual_tls(grpc_server: Any, certificate: tuple[str, str]) -> None:
    cert, key = certificate
    chain, private = Path(cert).read_bytes(), Path(key).read_bytes()
    credentials = grpc.ssl_server_credentials([(private, chain)], root_certificates=chain, require_client_auth=True)
    server = grpc.server(ThreadPoolExecutor(4))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(grpc_server.servicer, server)
    address = f"localhost:{server.add_secure_port('localhost:0', credentials)}"
    server.start()
    mutual = TlsOptions(root_ca=cert, client_cert=cert, client_key=key)
    try:
        with Client(address, tls=mutual) as client:
            assert client.alpha(IMAGE).shape == (24, 32)
        for wrong in (None, TlsOptions(), TlsOptions(root_ca=cert)):
            with Client(address, tls=wrong) as client:
                assert client.ready(timeout_s=5) is False

        async def run() -> None:
            async with AsyncClient(address, tls=mutual) as other:
                assert (await other.alpha(IMAGE)).shape == (24, 32)

        asyncio.run(run())
    finally:
        server.stop(None).wait()
