"""A transport without a network, and a real gRPC server that answers as it is told."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray
from tritonclient.grpc import model_config_pb2, service_pb2, service_pb2_grpc

from matteserve_client import INPUT_NAME, OUTPUT_NAME, ModelContract, ModelStatus


def make_config(
    name: str = "demo", size: tuple[int, int] = (24, 32), *, platform: str = "ensemble", **changes: Any
) -> Any:
    """An `inference.ModelConfig` as the exporter writes it."""
    fields = {"resample": "bilinear", "alpha_resample": "bilinear", "architecture": "u2netp", "weights": "demo"}
    contract = ModelContract(height=size[0], width=size[1], max_batch_size=8, **{**fields, **changes})
    config = model_config_pb2.ModelConfig(name=name, platform=platform, max_batch_size=8)
    config.input.add(name=INPUT_NAME, data_type=model_config_pb2.TYPE_UINT8, dims=[*size, 3])
    config.output.add(name=OUTPUT_NAME, data_type=model_config_pb2.TYPE_UINT8, dims=size)
    for key, value in contract.to_parameters().items():
        config.parameters[key].string_value = value
    return config


def green(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The model of these tests: alpha is the green channel."""
    return np.ascontiguousarray(images[..., 1])


class FakeTransport:
    """Carries requests nowhere: a function answers them, in threads, after a delay."""

    def __init__(self) -> None:
        self.address = "fake:8001"
        self.configs = {"demo": make_config()}
        self.extra_statuses: list[ModelStatus] = []
        self.answer: Callable[[NDArray[np.uint8]], NDArray[np.uint8]] = green
        self.delay_s = 0.0
        self.hold: Callable[[NDArray[np.uint8]], bool] = lambda images: False
        self.calls: list[tuple[str, Any]] = []
        self.is_ready: bool | Exception = True
        self.closed = False
        self.outstanding = self.most_outstanding = self.cancelled = 0
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(32)

    def infer(self, model: str, image: NDArray[np.uint8], *, timeout_s: float) -> Any:
        with self._lock:
            self.calls.append(("infer", (model, image.shape, timeout_s)))
            self.outstanding += 1
            self.most_outstanding = max(self.most_outstanding, self.outstanding)
        pending: Future[NDArray[np.uint8]] = Future()

        def work() -> None:
            try:
                time.sleep(self.delay_s)
                while self.hold(image) and not pending.cancelled():
                    time.sleep(0.002)
                result: Any = self.answer(image)
            except Exception as exc:
                result = exc
            with self._lock:
                self.outstanding -= 1
            if not pending.set_running_or_notify_cancel():
                self.cancelled += 1
            elif isinstance(result, Exception):
                pending.set_exception(result)
            else:
                pending.set_result(result)

        self._pool.submit(work)
        return pending

    def model_config(self, model: str, *, timeout_s: float) -> Any:
        self.calls.append(("config", model))
        return self.configs[model]

    def repository_index(self, *, timeout_s: float) -> list[ModelStatus]:
        self.calls.append(("index", None))
        return [*(ModelStatus(name, True) for name in self.configs), *self.extra_statuses]

    def server_ready(self, *, timeout_s: float) -> bool:
        if isinstance(self.is_ready, Exception):
            raise self.is_ready
        return self.is_ready

    def close(self) -> None:
        self.closed = True
        self._pool.shutdown()

    def count(self, kind: str) -> int:
        return sum(name == kind for name, _ in self.calls)


class AsyncFakeTransport:
    """The same, awaited."""

    def __init__(self, fake: FakeTransport) -> None:
        self.fake = fake
        self.address = fake.address

    async def infer(self, model: str, image: NDArray[np.uint8], *, timeout_s: float) -> NDArray[np.uint8]:
        import asyncio

        result: NDArray[np.uint8] = await asyncio.wrap_future(self.fake.infer(model, image, timeout_s=timeout_s))
        return result

    async def model_config(self, model: str, *, timeout_s: float) -> Any:
        return self.fake.model_config(model, timeout_s=timeout_s)

    async def repository_index(self, *, timeout_s: float) -> list[ModelStatus]:
        return self.fake.repository_index(timeout_s=timeout_s)

    async def server_ready(self, *, timeout_s: float) -> bool:
        return self.fake.server_ready(timeout_s=timeout_s)

    async def close(self) -> None:
        self.fake.close()


class Servicer(service_pb2_grpc.GRPCInferenceServiceServicer):
    """Answers as Triton would, or fails as it is told."""

    def __init__(self) -> None:
        self.configs = {"demo": make_config()}
        self.index = [("demo", "1", "READY", "")]
        self.status: tuple[grpc.StatusCode, str] | None = None
        self.delay_s = 0.0
        self.started = threading.Event()
        self.requests: list[Any] = []
        self.metadata: dict[str, str] = {}
        self.mangle: Callable[[Any], None] = lambda response: None

    def _enter(self, context: grpc.ServicerContext) -> None:
        self.metadata = dict(context.invocation_metadata())
        self.started.set()
        end = time.monotonic() + self.delay_s
        while time.monotonic() < end and context.is_active():
            time.sleep(0.01)
        if self.status is not None:
            context.abort(*self.status)

    def ModelInfer(self, request: Any, context: grpc.ServicerContext) -> Any:
        self.requests.append(request)
        self._enter(context)
        images = np.frombuffer(request.raw_input_contents[0], np.uint8).reshape(tuple(request.inputs[0].shape))
        alpha = green(images)
        response = service_pb2.ModelInferResponse(model_name=request.model_name)
        response.outputs.add(name=OUTPUT_NAME, datatype="UINT8", shape=alpha.shape)
        response.raw_output_contents.append(alpha.tobytes())
        self.mangle(response)
        return response

    def ModelConfig(self, request: Any, context: grpc.ServicerContext) -> Any:
        if request.name not in self.configs:
            context.abort(grpc.StatusCode.NOT_FOUND, f"Request for unknown model: '{request.name}' is not found")
        return service_pb2.ModelConfigResponse(config=self.configs[request.name])

    def RepositoryIndex(self, request: Any, context: grpc.ServicerContext) -> Any:
        self._enter(context)
        response = service_pb2.RepositoryIndexResponse()
        for name, version, state, reason in self.index:
            response.models.add(name=name, version=version, state=state, reason=reason)
        return response

    def ServerReady(self, request: Any, context: grpc.ServicerContext) -> Any:
        self._enter(context)
        return service_pb2.ServerReadyResponse(ready=True)


@pytest.fixture
def config() -> Callable[..., Any]:
    return make_config


@pytest.fixture
def fake() -> Iterator[FakeTransport]:
    transport = FakeTransport()
    yield transport
    transport.close()


@pytest.fixture
def async_fake(fake: FakeTransport) -> AsyncFakeTransport:
    return AsyncFakeTransport(fake)


@pytest.fixture
def grpc_server() -> Iterator[Any]:
    """A real gRPC server on a free port: `.address`, `.servicer`, `.server`."""
    servicer = Servicer()
    server = grpc.server(ThreadPoolExecutor(8), options=[("grpc.max_receive_message_length", -1)])
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield SimpleNamespace(address=f"127.0.0.1:{port}", servicer=servicer, server=server)
    server.stop(None).wait()
