"""The blocking client."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, TypeVar, overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from matteserve_client._contract import ModelContract
from matteserve_client._core import AskReady, Compute, Core, Infer, ReadConfig, ReadIndex, Step, Steps
from matteserve_client._errors import MatteserveError
from matteserve_client._images import DEFAULT_MAX_PIXELS, ImageSource
from matteserve_client._postprocess import Matte
from matteserve_client._preprocess import Parity
from matteserve_client._protocols import ModelStatus, PendingAlpha, TlsOptions, Transport

DEFAULT_ADDRESS = "127.0.0.1:8001"
DEFAULT_TIMEOUT_S = 30.0
CPU_WORKERS = min(4, os.cpu_count() or 1)

R = TypeVar("R")
T = TypeVar("T")


class Client:
    """Cuts out pictures on a matteserve server; threads may share one client.

    ::

        with Client("127.0.0.1:8001", model="u2netp") as client:
            client.remove("photo.jpg").save("cutout.png")
            alpha = client.alpha(image)  # image: (H, W, 3) uint8 RGB; alpha: (H, W) float32 in [0, 1]

    Create it in the process that uses it: gRPC does not survive `fork()`.

    Args:
        address: `host:port` of the server's gRPC endpoint.
        model: Model to use where a call names none. None takes the one alias that the server has loaded.
        timeout_s: Time limit of each request in seconds, where a call gives none. Reading a model's contract, once
            per model, has the same limit of its own.
        parity: "rembg" follows rembg's numerics, for u2net and u2netp: Lanczos filters both ways and division by
            the resized picture's maximum. Masks agree with rembg's to 1/255 before they are brought back to the
            picture's size (rembg truncates, the server rounds). None follows the model's contract.
        max_pixels: Largest picture that is decoded.
        tls: Encrypt the connection; None sends in the clear.
        transport: Use this instead of gRPC to `address`; closed together with the client.

    Raises:
        ValueError: An argument is out of range, or `address` is not `host:port`.
    """

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        model: str | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        parity: Parity | None = None,
        max_pixels: int = DEFAULT_MAX_PIXELS,
        tls: TlsOptions | None = None,
        transport: Transport | None = None,
    ) -> None:
        address = address if transport is None else transport.address
        self._core = Core(address=address, model=model, timeout_s=timeout_s, parity=parity, max_pixels=max_pixels)
        if transport is None:
            # Here and not above: gRPC takes longer to import than all the rest, and `matteserve --help` needs none.
            from matteserve_client._transport import GrpcTransport

            transport = GrpcTransport(address, tls=tls)
        self._transport = transport

    def matte(
        self,
        image: ImageSource,
        *,
        model: str | None = None,
        timeout_s: float | None = None,
        alpha_only: bool = False,
    ) -> Matte:
        """Estimate the alpha of one picture.

        Args:
            image: A path, encoded bytes, a binary file object, a PIL image, or a uint8 array: (H, W, 3) RGB,
                (H, W, 4) RGBA with straight alpha, (H, W) grey. EXIF orientation is applied; alpha in the input
                multiplies the result.
            model: Model to use; None uses the client's.
            timeout_s: Seconds to wait for the answer; None uses the client's.
            alpha_only: The colours are not wanted, so the matte has no cut-out. An encoded JPEG of at least four times
                the model's size is then decoded at a half, a quarter or an eighth, whatever leaves twice the model's
                size: half the time, and an input that differs by 0.3/255 on average. Not with `parity`.

        Returns:
            Alpha, cut-out on demand, and timings.

        Raises:
            InvalidImageError: The picture cannot be used; nothing was sent.
            ModelNotFoundError: The server has no such model, or it is not loaded.
            ServerUnavailableError: No connection, or it broke; `ServerOverloadedError` if the queue is full.
            DeadlineExceededError: No answer within `timeout_s`.
            InferenceError: The server failed.
            ContractError: The model's configuration was not written by matteserve.
        """
        return self._drive(self._core.matte(image, model, timeout_s, alpha_only))

    def alpha(
        self, image: ImageSource, *, model: str | None = None, timeout_s: float | None = None
    ) -> NDArray[np.float32]:
        """Estimate the alpha of one picture.

        Args and errors are those of `matte` with `alpha_only`; `matte(image).alpha` is that of a full decode.

        Returns:
            Alpha, shape (H, W), float32 in [0, 1], at the size of the upright picture.
        """
        return self.matte(image, model=model, timeout_s=timeout_s, alpha_only=True).alpha

    def remove(self, image: ImageSource, *, model: str | None = None, timeout_s: float | None = None) -> Image.Image:
        """Cut out one picture.

        Args and errors are those of `matte`.

        Returns:
            PIL image, mode "RGBA", straight alpha; RGB and ICC profile are the input's.
        """
        return self.matte(image, model=model, timeout_s=timeout_s).cutout()

    @overload
    def remove_many(
        self,
        images: Iterable[ImageSource],
        *,
        in_flight: int = 8,
        model: str | None = None,
        timeout_s: float | None = None,
        alpha_only: bool = False,
    ) -> Iterator[Image.Image | MatteserveError]: ...

    @overload
    def remove_many(
        self,
        images: Iterable[ImageSource],
        *,
        in_flight: int = 8,
        model: str | None = None,
        timeout_s: float | None = None,
        alpha_only: bool = False,
        output: Callable[[Matte], R],
    ) -> Iterator[R | MatteserveError]: ...

    def remove_many(
        self,
        images: Iterable[ImageSource],
        *,
        in_flight: int = 8,
        model: str | None = None,
        timeout_s: float | None = None,
        alpha_only: bool = False,
        output: Callable[[Matte], Any] = Matte.cutout,
    ) -> Iterator[Any]:
        """Cut out many pictures, with several requests on their way, so that the server can batch.

        Pictures are decoded, and what is wanted of them is made, in threads meanwhile. `images` is read only a few
        ahead of what was taken from the iterator, so memory stays bounded. Stop early by closing the iterator:
        requests on their way are given up.

        ::

            for png in client.remove_many(paths, output=Matte.encode): ...

        Args:
            images: What `matte` takes, any number of them.
            in_flight: Most requests on their way at once.
            model: Model to use; None uses the client's.
            timeout_s: Seconds to wait for each answer; None uses the client's.
            alpha_only: See `matte`; `output` must then be one of those that need no colours.
            output: What to make of each matte, in one of the threads; the cut-out, unless told otherwise.

        Yields:
            For each picture, in order, its output (as a rule the cut-out as `remove` returns it), or the error that
            `remove` would raise.

        Raises:
            ValueError: `in_flight` is below 1.
        """
        if in_flight < 1:
            raise ValueError(f"in_flight is {in_flight}, must be at least 1")
        self._core.timeout(timeout_s)
        return self._many(
            iter(images), in_flight, lambda image: self._core.matte(image, model, timeout_s, alpha_only), output
        )

    def contract(self, model: str | None = None, *, timeout_s: float | None = None) -> ModelContract:
        """Return the contract of a model; read from the server once, then cached.

        Raises:
            ModelNotFoundError: The server has no such model, or it is not loaded.
            ContractError: The model's configuration was not written by matteserve.
            ServerUnavailableError: No connection.
            DeadlineExceededError: No answer within `timeout_s`.
        """
        return self._drive(self._core.contract(model, timeout_s))

    def models(self, *, timeout_s: float | None = None) -> list[ModelStatus]:
        """Return the models of the server's repository, sorted by name.

        Raises:
            ServerUnavailableError: No connection.
            DeadlineExceededError: No answer within `timeout_s`.
        """
        return self._drive(self._core.models(timeout_s))

    def ready(self, *, timeout_s: float | None = None) -> bool:
        """Return whether the server is reachable and says that it is ready; an unreachable one is not an error."""
        return self._drive(self._core.ready(timeout_s))

    def close(self) -> None:
        """Close the connection; requests on their way fail. May be called twice."""
        self._transport.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _drive(self, steps: Steps[T], window: _Window | None = None) -> T:
        """Perform an operation's steps one after the other, and return its result."""
        advance: Callable[[Any], Step] = steps.send
        result: Any = None
        while True:
            try:
                step = advance(result)
            except StopIteration as stop:
                value: T = stop.value
                return value
            try:
                result = self._perform(step) if window is None else window.perform(step, self._perform)
                advance = steps.send
            except Exception as exc:
                result, advance = exc, steps.throw

    def _perform(self, step: Step, watch: Callable[[PendingAlpha], None] | None = None) -> Any:
        match step:
            case Compute():
                return step.run()
            case Infer(model, image, timeout_s):
                pending = self._transport.infer(model, image, timeout_s=timeout_s)
                if watch is not None:
                    watch(pending)
                return pending.result()
            case ReadConfig(model, timeout_s):
                return self._transport.model_config(model, timeout_s=timeout_s)
            case ReadIndex(timeout_s):
                return self._transport.repository_index(timeout_s=timeout_s)
            case AskReady(timeout_s):
                return self._transport.server_ready(timeout_s=timeout_s)

    def _many(
        self,
        images: Iterator[ImageSource],
        in_flight: int,
        start: Callable[[ImageSource], Steps[Matte]],
        output: Callable[[Matte], R],
    ) -> Iterator[R | MatteserveError]:
        window = _Window(in_flight, CPU_WORKERS)

        def remove(image: ImageSource) -> R | MatteserveError:
            try:
                matte = self._drive(start(image), window)
                with window.cpu:
                    return output(matte)
            except MatteserveError as error:
                return error

        size = in_flight + CPU_WORKERS
        slots: deque[Future[R | MatteserveError]] = deque()
        broken: Exception | None = None
        # A thread per slot: most of them wait, for their answer or for a place at one of the two gates.
        pool = ThreadPoolExecutor(size, thread_name_prefix="matteserve")
        try:
            while True:
                while broken is None and len(slots) < size:
                    try:
                        slots.append(pool.submit(remove, next(images)))
                    except StopIteration:
                        break
                    except Exception as exc:  # the caller's iterator failed: first give out what was begun
                        broken = exc
                if not slots:
                    break
                yield slots.popleft().result()
            if broken is not None:
                raise broken
        finally:
            for slot in slots:
                slot.cancel()
            window.give_up()
            pool.shutdown()


class _Window:
    """Bounds what the threads of one `remove_many` do at once, and lets it be given up."""

    def __init__(self, in_flight: int, cpu_workers: int) -> None:
        self.cpu = threading.BoundedSemaphore(cpu_workers)
        self._requests = threading.BoundedSemaphore(in_flight)
        self._lock = threading.Lock()
        self._pending: set[PendingAlpha] = set()
        self._given_up = False

    def perform(self, step: Step, perform: Callable[..., Any]) -> Any:
        """Perform a step when there is a place for it."""
        if isinstance(step, Compute):
            with self.cpu:
                return perform(step)
        if not isinstance(step, Infer):
            return perform(step)
        mine: list[PendingAlpha] = []

        def watch(pending: PendingAlpha) -> None:
            mine.append(pending)
            with self._lock:
                self._pending.add(pending)
                if self._given_up:
                    pending.cancel()

        with self._requests:
            try:
                return perform(step, watch)
            finally:
                with self._lock:
                    self._pending.difference_update(mine)

    def give_up(self) -> None:
        """Cancel every request on its way, and those still to come."""
        with self._lock:
            self._given_up = True
            pending = list(self._pending)
        for request in pending:
            request.cancel()
