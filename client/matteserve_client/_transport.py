"""gRPC transports over the stubs that NVIDIA generates, and the one place where statuses become exceptions.

The stubs are used directly: tritonclient's own client copies every tensor through typed wrappers and has no window
of futures; a raw stub costs less than half as much CPU per request.

gRPC does not survive `fork()`: create clients after forking, in the process that uses them.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from numpy.typing import NDArray
from tritonclient.grpc import service_pb2, service_pb2_grpc

from matteserve_client._contract import INPUT_NAME, OUTPUT_NAME
from matteserve_client._errors import (
    DeadlineExceededError,
    InferenceError,
    InvalidRequestError,
    MatteserveError,
    ModelNotFoundError,
    ServerOverloadedError,
    ServerUnavailableError,
)
from matteserve_client._protocols import ModelStatus, PendingAlpha, TlsOptions

# Triton's wording, which alone tells these cases from a broken connection: all of them are UNAVAILABLE.
_OVERLOADED = ("exceeds maximum queue size", "request timeout expired")
_NOT_LOADED = ("unknown model", "has no available versions", "is not at ready state", "is not ready")


def translate(
    code: grpc.StatusCode, details: str, *, address: str, model: str | None = None, timeout_s: float | None = None
) -> MatteserveError:
    """Turn a gRPC status into an exception of the tree.

    Args:
        code: Status of the call.
        details: The server's words, or gRPC's.
        address: Server that was called.
        model: Model that the call was about, if any.
        timeout_s: Time limit of the call.
    """
    about = f"{address}, model {model!r}" if model else address
    said = details.removeprefix("[request id: <id_unknown>]").strip() or "no details"
    lowered = said.lower()
    status = grpc.StatusCode
    if code is status.DEADLINE_EXCEEDED:
        limit = "its time limit" if timeout_s is None else f"{timeout_s:g} s"
        return DeadlineExceededError(
            f"{about}: no answer within {limit}; is the server overloaded or the address wrong? "
            "A larger timeout_s waits longer"
        )
    if code is status.UNAVAILABLE and any(phrase in lowered for phrase in _OVERLOADED):
        return ServerOverloadedError(f"{about}: the queue is full ({said}); wait and try again, or send fewer at once")
    if code is status.NOT_FOUND or (code is status.UNAVAILABLE and any(phrase in lowered for phrase in _NOT_LOADED)):
        return ModelNotFoundError(
            f"{about}: not loaded ({said}); `matteserve models --address {address}` lists what the server has"
        )
    if code is status.UNAVAILABLE:
        return ServerUnavailableError(
            f"{about}: cannot reach the server, or it went away ({said}); "
            "is `matteserve serve` running there, and is this its gRPC port?"
        )
    if code is status.CANCELLED:
        return ServerUnavailableError(f"{about}: the request was cancelled before the answer came ({said})")
    if code is status.INVALID_ARGUMENT:
        return InvalidRequestError(f"{about}: the server refused the request ({said})")
    if code is status.UNIMPLEMENTED:
        return InferenceError(f"{about}: this is a gRPC server, but not a Triton Inference Server ({said})")
    return InferenceError(f"{about}: the server failed with {code.name} ({said}); its log may say more")


def _from_rpc(exc: grpc.RpcError, address: str, model: str | None, timeout_s: float) -> MatteserveError:
    # Every RpcError that a call raises is also a grpc.Call; the class itself declares neither method.
    code, details = exc.code(), exc.details() or ""  # type: ignore[attr-defined,unused-ignore]
    return translate(code, details, address=address, model=model, timeout_s=timeout_s)


def _infer_request(model: str, image: NDArray[np.uint8]) -> Any:
    tensor = service_pb2.ModelInferRequest.InferInputTensor(name=INPUT_NAME, datatype="UINT8", shape=image.shape)
    output = service_pb2.ModelInferRequest.InferRequestedOutputTensor(name=OUTPUT_NAME)
    return service_pb2.ModelInferRequest(
        model_name=model, inputs=[tensor], outputs=[output], raw_input_contents=[image.tobytes()]
    )


def _infer_answer(response: Any, address: str, model: str) -> NDArray[np.uint8]:
    for tensor, raw in zip(response.outputs, response.raw_output_contents, strict=False):
        if tensor.name == OUTPUT_NAME and tensor.datatype == "UINT8" and int(np.prod(tensor.shape)) == len(raw):
            return np.frombuffer(raw, np.uint8).reshape(tuple(tensor.shape))
    found = [(tensor.name, tensor.datatype, tuple(tensor.shape)) for tensor in response.outputs]
    raise InferenceError(f"{address}, model {model!r}: the answer has no UINT8 tensor {OUTPUT_NAME!r}; found {found}")


def _index(response: Any) -> list[ModelStatus]:
    """One entry per model: ready if any of its versions is."""
    models: dict[str, ModelStatus] = {}
    for entry in response.models:
        status = ModelStatus(entry.name, entry.state == "READY", "" if entry.state == "READY" else entry.reason)
        known = models.get(entry.name)
        if known is None or (status.ready and not known.ready) or (status.reason and not known.reason):
            models[entry.name] = known if known is not None and known.ready else status
    return [models[name] for name in sorted(models)]


def _channel_options(address: str) -> list[tuple[str, int]]:
    options = [
        ("grpc.max_send_message_length", -1),
        ("grpc.max_receive_message_length", -1),
        # Only while a request is on its way, and at most two without data (gRPC's default): a Triton with default
        # settings hangs up on the third ping within five minutes ("too_many_pings").
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        # A restarted server is found again within seconds; gRPC's default backs off for up to two minutes.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 1_000),
        ("grpc.max_reconnect_backoff_ms", 2_000),
    ]
    if _is_loopback(address):
        options.append(("grpc.enable_http_proxy", 0))  # no proxy can reach this machine's loopback
    return options


def _is_loopback(address: str) -> bool:
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_address(address: str) -> str:
    """Return the address, or say what is wrong with it.

    Raises:
        ValueError: It has an HTTP scheme, or no port.
    """
    if address.startswith(("http://", "https://")):
        raise ValueError(f"address {address!r}: gRPC takes host:port without a scheme, e.g. '127.0.0.1:8001'")
    if not address.startswith(("unix:", "dns:", "ipv4:", "ipv6:", "xds:")) and not address.rpartition(":")[2].isdigit():
        raise ValueError(f"address {address!r}: must be host:port, e.g. '127.0.0.1:8001'")
    return address


def _credentials(tls: TlsOptions) -> grpc.ChannelCredentials:
    root, key, chain = (
        None if path is None else Path(path).read_bytes() for path in (tls.root_ca, tls.client_key, tls.client_cert)
    )
    return grpc.ssl_channel_credentials(root, key, chain)


class _PendingCall:
    """A gRPC future whose failure is already translated."""

    def __init__(self, call: Any, address: str, model: str, timeout_s: float) -> None:
        self._call, self._about = call, (address, model, timeout_s)

    def result(self) -> NDArray[np.uint8]:
        address, model, timeout_s = self._about
        try:
            return _infer_answer(self._call.result(), address, model)
        except grpc.FutureCancelledError as exc:
            raise translate(grpc.StatusCode.CANCELLED, "cancelled here", address=address, model=model) from exc
        except grpc.RpcError as exc:
            raise _from_rpc(exc, address, model, timeout_s) from exc

    def cancel(self) -> None:
        self._call.cancel()


class GrpcTransport:
    """`Transport` over one gRPC channel; threads may share it.

    Connects on the first call, and again by itself whenever the connection broke.

    Args:
        address: `host:port` of the server's gRPC endpoint, or any gRPC target such as `dns:///host:port`.
        tls: Encrypt; None sends in the clear.
        headers: Sent with every call, e.g. a token or a `triton-grpc-protocol-...` key.

    Raises:
        ValueError: `address` is not a gRPC target.
        OSError: A file of `tls` cannot be read.
    """

    def __init__(
        self,
        address: str = "127.0.0.1:8001",
        *,
        tls: TlsOptions | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self._address = check_address(address)
        self._metadata = tuple((key.lower(), value) for key, value in (headers or {}).items())
        options = _channel_options(address)
        self._channel = (
            grpc.insecure_channel(address, options)
            if tls is None
            else grpc.secure_channel(address, _credentials(tls), options)
        )
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        self._closed = False
        self._pid = os.getpid()

    @property
    def address(self) -> str:
        """Where the server is."""
        return self._address

    def infer(self, model: str, image: NDArray[np.uint8], *, timeout_s: float) -> PendingAlpha:
        """See `Transport.infer`."""
        self._check_usable()
        call = self._stub.ModelInfer.future(_infer_request(model, image), timeout=timeout_s, metadata=self._metadata)
        return _PendingCall(call, self._address, model, timeout_s)

    def model_config(self, model: str, *, timeout_s: float) -> Any:
        """See `Transport.model_config`."""
        request = service_pb2.ModelConfigRequest(name=model)
        return self._call("ModelConfig", request, timeout_s, model).config

    def repository_index(self, *, timeout_s: float) -> list[ModelStatus]:
        """See `Transport.repository_index`."""
        return _index(self._call("RepositoryIndex", service_pb2.RepositoryIndexRequest(), timeout_s))

    def server_ready(self, *, timeout_s: float) -> bool:
        """See `Transport.server_ready`."""
        return bool(self._call("ServerReady", service_pb2.ServerReadyRequest(), timeout_s).ready)

    def close(self) -> None:
        """See `Transport.close`; may be called twice."""
        self._closed = True
        self._channel.close()

    def _call(self, method: str, request: Any, timeout_s: float, model: str | None = None) -> Any:
        self._check_usable()
        try:
            return getattr(self._stub, method)(request, timeout=timeout_s, metadata=self._metadata)
        except grpc.RpcError as exc:
            raise _from_rpc(exc, self._address, model, timeout_s) from exc

    def _check_usable(self) -> None:
        if self._closed:
            raise RuntimeError("this client is closed; create a new one")
        if os.getpid() != self._pid:
            raise RuntimeError("this client was created before fork(), which gRPC does not survive; create it after")


class AsyncGrpcTransport:
    """`AsyncTransport` over one gRPC channel; belongs to the event loop that first calls it.

    Args:
        address: As for `GrpcTransport`.
        tls: As for `GrpcTransport`.
        headers: As for `GrpcTransport`.

    Raises:
        ValueError: `address` is not a gRPC target.
        OSError: A file of `tls` cannot be read.
    """

    def __init__(
        self,
        address: str = "127.0.0.1:8001",
        *,
        tls: TlsOptions | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self._address = check_address(address)
        self._metadata = tuple((key.lower(), value) for key, value in (headers or {}).items())
        self._credentials = None if tls is None else _credentials(tls)
        self._channel: Any = None
        self._stub: Any = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False

    @property
    def address(self) -> str:
        """Where the server is."""
        return self._address

    async def infer(self, model: str, image: NDArray[np.uint8], *, timeout_s: float) -> NDArray[np.uint8]:
        """See `AsyncTransport.infer`."""
        response = await self._call("ModelInfer", _infer_request(model, image), timeout_s, model)
        return _infer_answer(response, self._address, model)

    async def model_config(self, model: str, *, timeout_s: float) -> Any:
        """See `AsyncTransport.model_config`."""
        return (await self._call("ModelConfig", service_pb2.ModelConfigRequest(name=model), timeout_s, model)).config

    async def repository_index(self, *, timeout_s: float) -> list[ModelStatus]:
        """See `AsyncTransport.repository_index`."""
        return _index(await self._call("RepositoryIndex", service_pb2.RepositoryIndexRequest(), timeout_s))

    async def server_ready(self, *, timeout_s: float) -> bool:
        """See `AsyncTransport.server_ready`."""
        return bool((await self._call("ServerReady", service_pb2.ServerReadyRequest(), timeout_s)).ready)

    async def close(self) -> None:
        """See `AsyncTransport.close`; may be called twice."""
        self._closed = True
        if self._channel is not None:
            channel, self._channel = self._channel, None
            await channel.close()

    async def _call(self, method: str, request: Any, timeout_s: float, model: str | None = None) -> Any:
        self._open()
        try:
            return await getattr(self._stub, method)(request, timeout=timeout_s, metadata=self._metadata)
        except grpc.RpcError as exc:
            raise _from_rpc(exc, self._address, model, timeout_s) from exc
        except asyncio.CancelledError as exc:
            if not self._closed:
                raise
            # close() cancels the calls, not the tasks that wait for them; to those it is a failed request.
            raise translate(grpc.StatusCode.CANCELLED, "client closed", address=self._address, model=model) from exc

    def _open(self) -> None:
        """Create the channel late: gRPC ties it to the running loop, and a constructor may run outside of any."""
        if self._closed:
            raise RuntimeError("this client is closed; create a new one")
        loop = asyncio.get_running_loop()
        if self._channel is None:
            options = _channel_options(self._address)
            self._loop = loop
            self._channel = (
                grpc.aio.insecure_channel(self._address, options)
                if self._credentials is None
                else grpc.aio.secure_channel(self._address, self._credentials, options)
            )
            self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        elif loop is not self._loop:
            raise RuntimeError("this client belongs to another event loop; create one AsyncClient per loop")
