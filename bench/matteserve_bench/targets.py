"""Ways to send one request and be called back: tensors over gRPC, tensors in shared memory, whole pictures.

Sending costs little, so that the load generator is faster than what it measures: requests are serialised once, before
the clock starts; the stub passes bytes on as they are; answers are checked by status and size and not parsed.
"""

from __future__ import annotations

import contextlib
import io
import os
import secrets
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import shared_memory
from typing import Any, NamedTuple, Protocol

import grpc
import numpy as np
from numpy.typing import NDArray
from tritonclient.grpc import service_pb2, service_pb2_grpc

from matteserve_bench._errors import TargetError
from matteserve_client import INPUT_NAME, OUTPUT_NAME, Client, MatteserveError, ModelContract
from matteserve_client._transport import check_address, translate

_INFER = "/inference.GRPCInferenceService/ModelInfer"
# Answers of requests that are on their way together may share a place: nobody reads them.
_OUTPUT_PLACES = 16


class Outcome(NamedTuple):
    """How a request went.

    Attributes:
        error: Class name of the failure; empty if it was answered.
        bytes_out: Bytes sent.
        bytes_in: Bytes received.
        sent_s: When it really left, on `time.perf_counter`; None if it left when `send` was called.
        stages: See `Record`.
    """

    error: str = ""
    bytes_out: int = 0
    bytes_in: int = 0
    sent_s: float | None = None
    stages: dict[str, float] | None = None


Done = Callable[[Outcome], None]


class Target(Protocol):
    """Takes requests. `send` may be called from several threads, and from within a `done`."""

    rows: int

    def check(self) -> None:
        """Send one request and wait for it; raises `MatteserveError` if it cannot be served like this."""

    def send(self, index: int, done: Done) -> None:
        """Send request number `index` and return at once; `done` is called once, from any thread."""

    def close(self) -> None:
        """Release connections, memory and threads."""


class TensorTarget:
    """Prepared tensors over gRPC, on several channels in turn.

    Args:
        address: `host:port`.
        model: Model to call.
        tensors: Pool of inputs, each (rows, height, width, 3), uint8.
        contract: The model's contract.
        channels: Connections to use.
        timeout_s: Limit of each request.
    """

    def __init__(
        self,
        address: str,
        model: str,
        tensors: Sequence[NDArray[np.uint8]],
        contract: ModelContract,
        *,
        channels: int = 2,
        timeout_s: float = 60.0,
    ) -> None:
        self._address, self._model, self._timeout_s = check_address(address), model, timeout_s
        self._output_shape = (len(tensors[0]), contract.height, contract.width)
        self.rows = len(tensors[0])
        self._channels = [grpc.insecure_channel(address, _CHANNEL_OPTIONS) for _ in range(channels)]
        # Neither serialiser: bytes go out and come back as they are.
        self._calls = [channel.unary_unary(_INFER) for channel in self._channels]
        self._requests = [request.SerializeToString() for request in self._prepare(tensors)]
        self._least_answer = int(np.prod(self._output_shape))

    def check(self) -> None:
        """See `Target.check`."""
        try:
            answer = self._calls[0](self._requests[0], timeout=self._timeout_s, wait_for_ready=False)
        except grpc.RpcError as exc:
            raise self._translated(exc) from exc
        response = service_pb2.ModelInferResponse.FromString(answer)
        found = [(tensor.name, tensor.datatype, tuple(tensor.shape)) for tensor in response.outputs]
        if found != [(OUTPUT_NAME, "UINT8", self._output_shape)]:
            raise TargetError(
                f"{self._address}, model {self._model!r}: answers with {found}, expected {OUTPUT_NAME!r} UINT8 "
                f"{self._output_shape}"
            )

    def send(self, index: int, done: Done) -> None:
        """See `Target.send`."""
        request = self._requests[index % len(self._requests)]
        call = self._calls[index % len(self._calls)].future(request, timeout=self._timeout_s)
        call.add_done_callback(lambda finished: done(self._outcome(finished, len(request))))

    def close(self) -> None:
        """See `Target.close`; requests on their way fail."""
        for channel in self._channels:
            channel.close()

    def _prepare(self, tensors: Sequence[NDArray[np.uint8]]) -> list[Any]:
        requests = []
        for tensor in tensors:
            request = self._request(tensor.shape)
            request.raw_input_contents.append(tensor.tobytes())
            requests.append(request)
        return requests

    def _request(self, shape: Sequence[int]) -> Any:
        message = service_pb2.ModelInferRequest
        return message(
            model_name=self._model,
            inputs=[message.InferInputTensor(name=INPUT_NAME, datatype="UINT8", shape=shape)],
            outputs=[message.InferRequestedOutputTensor(name=OUTPUT_NAME)],
        )

    def _outcome(self, call: Any, bytes_out: int) -> Outcome:
        try:
            answer = call.result()
        except grpc.FutureCancelledError:
            return Outcome("ServerUnavailableError", bytes_out)
        except grpc.RpcError as exc:
            return Outcome(type(self._translated(exc)).__name__, bytes_out)
        if len(answer) < self._least_answer:
            return Outcome("InferenceError", bytes_out, len(answer))
        return Outcome("", bytes_out, len(answer))

    def _translated(self, exc: Any) -> MatteserveError:
        return translate(
            exc.code(), exc.details() or "", address=self._address, model=self._model, timeout_s=self._timeout_s
        )


class SharedMemoryTarget(TensorTarget):
    """Prepared tensors in system shared memory; only names go over gRPC. The server must be on this machine.

    Raises:
        TargetError: There is no room for the pool in /dev/shm, or the server does not take shared memory.
    """

    def __init__(
        self,
        address: str,
        model: str,
        tensors: Sequence[NDArray[np.uint8]],
        contract: ModelContract,
        *,
        channels: int = 2,
        timeout_s: float = 60.0,
    ) -> None:
        self._regions: list[shared_memory.SharedMemory] = []
        self._registered: list[str] = []
        try:
            super().__init__(address, model, tensors, contract, channels=channels, timeout_s=timeout_s)
            self._least_answer = 0
            self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channels[0])
            for region in self._regions:
                self._register(region)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """See `Target.close`; the server forgets the regions, and they are removed."""
        for name in self._registered:
            with contextlib.suppress(grpc.RpcError):
                self._stub.SystemSharedMemoryUnregister(
                    service_pb2.SystemSharedMemoryUnregisterRequest(name=name), timeout=5
                )
        self._registered = []
        super().close()
        for region in self._regions:
            region.close()
            region.unlink()
        self._regions = []

    def _prepare(self, tensors: Sequence[NDArray[np.uint8]]) -> list[Any]:
        size, answer_size = tensors[0].nbytes, int(np.prod(self._output_shape))
        inputs = self._create("in", size * len(tensors))
        outputs = self._create("out", answer_size * _OUTPUT_PLACES)
        requests = []
        memory = np.ndarray((len(tensors), *tensors[0].shape), np.uint8, inputs.buf)
        for index, tensor in enumerate(tensors):
            memory[index] = tensor
        del memory  # a region with a view of it cannot be closed
        # One request for each pair of an input and a place for its answer.
        for index in range(int(np.lcm(len(tensors), _OUTPUT_PLACES))):
            request = self._request(tensors[0].shape)
            _point_to(request.inputs[0].parameters, inputs.name, size, index % len(tensors))
            _point_to(request.outputs[0].parameters, outputs.name, answer_size, index % _OUTPUT_PLACES)
            requests.append(request)
        return requests

    def _create(self, purpose: str, size: int) -> shared_memory.SharedMemory:
        name = f"matteserve-bench-{os.getpid()}-{secrets.token_hex(4)}-{purpose}"
        try:
            region = shared_memory.SharedMemory(name, create=True, size=size)
            self._regions.append(region)
            os.posix_fallocate(region._fd, 0, size)  # type: ignore[attr-defined]  # else a full /dev/shm is a SIGBUS
        except OSError as exc:
            raise TargetError(
                f"no room for {size / 2**20:.0f} MiB in /dev/shm ({exc.strerror}); use --transport grpc, a smaller "
                "pool, or Docker's --shm-size"
            ) from exc
        return region

    def _register(self, region: shared_memory.SharedMemory) -> None:
        request = service_pb2.SystemSharedMemoryRegisterRequest(
            name=region.name, key=f"/{region.name}", offset=0, byte_size=region.size
        )
        try:
            self._stub.SystemSharedMemoryRegister(request, timeout=10)
        except grpc.RpcError as exc:
            raise TargetError(
                f"{self._address}: the server does not take shared memory ({exc.details()}). It must run on this "  # type: ignore[attr-defined,unused-ignore]
                "machine and see its /dev/shm (Docker: --ipc=host), and Triton 2.68 and newer must be started with "
                "--allow-client-shm=true. --transport grpc works everywhere"
            ) from exc
        self._registered.append(region.name)


class ImageTarget:
    """Pictures in, cut-outs out, through the real client: JPEG bytes to PNG bytes in a pool of threads.

    Args:
        address: `host:port`.
        model: Model to call.
        pictures: Pool of encoded pictures.
        workers: Threads; a picture that finds none free waits, and that counts.
        timeout_s: Limit of each request to the server.
    """

    rows = 1

    def __init__(
        self, address: str, model: str, pictures: Sequence[bytes], *, workers: int = 8, timeout_s: float = 60.0
    ) -> None:
        self._client = Client(address, model=model, timeout_s=timeout_s)
        self._pictures = pictures
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="picture")

    def check(self) -> None:
        """See `Target.check`."""
        self._client.remove(self._pictures[0])

    def send(self, index: int, done: Done) -> None:
        """See `Target.send`."""
        data = self._pictures[index % len(self._pictures)]
        self._pool.submit(lambda: done(self._cut_out(data)))

    def close(self) -> None:
        """See `Target.close`."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._client.close()

    def _cut_out(self, data: bytes) -> Outcome:
        sent_s = time.perf_counter()
        try:
            matte = self._client.matte(data)
            began = time.perf_counter()
            encoded = io.BytesIO()
            matte.cutout().save(encoded, "PNG")
        except MatteserveError as exc:
            return Outcome(type(exc).__name__, len(data), sent_s=sent_s)
        times = matte.timings
        stages = {
            "decode": times.decode,
            "preprocess": times.preprocess,
            "request": times.request,
            "postprocess": times.postprocess,
            "encode": time.perf_counter() - began,
        }
        return Outcome("", len(data), encoded.tell(), sent_s, stages)


# Without a pool of its own each channel to the same address would be the same connection.
_CHANNEL_OPTIONS = [
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.enable_http_proxy", 0),
]


def _point_to(parameters: Any, region: str, size: int, place: int) -> None:
    parameters["shared_memory_region"].string_param = region
    parameters["shared_memory_byte_size"].int64_param = size
    if place:
        parameters["shared_memory_offset"].int64_param = place * size
