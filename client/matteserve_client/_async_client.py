"""The asyncio client."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable
from types import TracebackType
from typing import Any, TypeVar, overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from matteserve_client._client import CPU_WORKERS, DEFAULT_ADDRESS, DEFAULT_TIMEOUT_S
from matteserve_client._contract import ModelContract
from matteserve_client._core import AskReady, Compute, Core, Infer, ReadConfig, ReadIndex, Step, Steps
from matteserve_client._errors import MatteserveError
from matteserve_client._images import DEFAULT_MAX_PIXELS, ImageSource
from matteserve_client._postprocess import Matte
from matteserve_client._preprocess import Parity
from matteserve_client._protocols import AsyncTransport, ModelStatus, TlsOptions

R = TypeVar("R")
T = TypeVar("T")


class AsyncClient:
    """`Client` for asyncio; tasks of one event loop may share it, loops may not.

    ::

        async with AsyncClient("127.0.0.1:8001", model="u2netp") as client:
            cutout = await client.remove("photo.jpg")
            async for result in client.remove_many(paths): ...

    Decoding and resizing run in threads, so the loop stays responsive. Methods, arguments and errors are those of
    `Client`.

    Args:
        address: As for `Client`.
        model: As for `Client`.
        timeout_s: As for `Client`.
        parity: As for `Client`.
        max_pixels: As for `Client`.
        tls: As for `Client`.
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
        transport: AsyncTransport | None = None,
    ) -> None:
        address = address if transport is None else transport.address
        self._core = Core(address=address, model=model, timeout_s=timeout_s, parity=parity, max_pixels=max_pixels)
        if transport is None:
            from matteserve_client._transport import AsyncGrpcTransport

            transport = AsyncGrpcTransport(address, tls=tls)
        self._transport = transport

    async def matte(
        self,
        image: ImageSource,
        *,
        model: str | None = None,
        timeout_s: float | None = None,
        alpha_only: bool = False,
    ) -> Matte:
        """See `Client.matte`."""
        return await self._drive(self._core.matte(image, model, timeout_s, alpha_only))

    async def alpha(
        self, image: ImageSource, *, model: str | None = None, timeout_s: float | None = None
    ) -> NDArray[np.float32]:
        """See `Client.alpha`: shape (H, W), float32 in [0, 1]."""
        matte = await self.matte(image, model=model, timeout_s=timeout_s, alpha_only=True)
        return await asyncio.to_thread(lambda: matte.alpha)

    async def remove(
        self, image: ImageSource, *, model: str | None = None, timeout_s: float | None = None
    ) -> Image.Image:
        """See `Client.remove`: PIL image, mode "RGBA", straight alpha."""
        matte = await self.matte(image, model=model, timeout_s=timeout_s)
        return await asyncio.to_thread(matte.cutout)

    @overload
    def remove_many(
        self,
        images: Iterable[ImageSource] | AsyncIterable[ImageSource],
        *,
        in_flight: int = 8,
        model: str | None = None,
        timeout_s: float | None = None,
        alpha_only: bool = False,
    ) -> AsyncIterator[Image.Image | MatteserveError]: ...

    @overload
    def remove_many(
        self,
        images: Iterable[ImageSource] | AsyncIterable[ImageSource],
        *,
        in_flight: int = 8,
        model: str | None = None,
        timeout_s: float | None = None,
        alpha_only: bool = False,
        output: Callable[[Matte], R],
    ) -> AsyncIterator[R | MatteserveError]: ...

    def remove_many(
        self,
        images: Iterable[ImageSource] | AsyncIterable[ImageSource],
        *,
        in_flight: int = 8,
        model: str | None = None,
        timeout_s: float | None = None,
        alpha_only: bool = False,
        output: Callable[[Matte], Any] = Matte.cutout,
    ) -> AsyncIterator[Any]:
        """See `Client.remove_many`; `images` may be an asynchronous iterable too."""
        if in_flight < 1:
            raise ValueError(f"in_flight is {in_flight}, must be at least 1")
        self._core.timeout(timeout_s)
        source = aiter(images) if isinstance(images, AsyncIterable) else _as_async(images)
        return self._many(
            source, in_flight, lambda image: self._core.matte(image, model, timeout_s, alpha_only), output
        )

    async def contract(self, model: str | None = None, *, timeout_s: float | None = None) -> ModelContract:
        """See `Client.contract`."""
        return await self._drive(self._core.contract(model, timeout_s))

    async def models(self, *, timeout_s: float | None = None) -> list[ModelStatus]:
        """See `Client.models`."""
        return await self._drive(self._core.models(timeout_s))

    async def ready(self, *, timeout_s: float | None = None) -> bool:
        """See `Client.ready`."""
        return await self._drive(self._core.ready(timeout_s))

    async def close(self) -> None:
        """See `Client.close`."""
        await self._transport.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def _drive(self, steps: Steps[T], gates: _Gates | None = None) -> T:
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
                gate = None if gates is None else gates.of(step)
                if gate is None:
                    result = await self._perform(step)
                else:
                    async with gate:
                        result = await self._perform(step)
                advance = steps.send
            except Exception as exc:
                result, advance = exc, steps.throw

    async def _perform(self, step: Step) -> Any:
        match step:
            case Compute():
                return await asyncio.to_thread(step.run)
            case Infer(model, image, timeout_s):
                return await self._transport.infer(model, image, timeout_s=timeout_s)
            case ReadConfig(model, timeout_s):
                return await self._transport.model_config(model, timeout_s=timeout_s)
            case ReadIndex(timeout_s):
                return await self._transport.repository_index(timeout_s=timeout_s)
            case AskReady(timeout_s):
                return await self._transport.server_ready(timeout_s=timeout_s)

    async def _many(
        self,
        images: AsyncIterator[ImageSource],
        in_flight: int,
        start: Callable[[ImageSource], Steps[Matte]],
        output: Callable[[Matte], R],
    ) -> AsyncIterator[R | MatteserveError]:
        gates = _Gates(in_flight)

        async def remove(image: ImageSource) -> R | MatteserveError:
            try:
                matte = await self._drive(start(image), gates)
                async with gates.cpu:
                    return await asyncio.to_thread(output, matte)
            except MatteserveError as error:
                return error

        size = in_flight + CPU_WORKERS
        slots: deque[asyncio.Task[R | MatteserveError]] = deque()
        broken: Exception | None = None
        try:
            while True:
                while broken is None and len(slots) < size:
                    try:
                        slots.append(asyncio.create_task(remove(await anext(images))))
                    except StopAsyncIteration:
                        break
                    except Exception as exc:  # the caller's iterator failed: first give out what was begun
                        broken = exc
                if not slots:
                    break
                yield await slots[0]
                slots.popleft()
            if broken is not None:
                raise broken
        finally:
            for slot in slots:
                slot.cancel()
            await asyncio.gather(*slots, return_exceptions=True)


class _Gates:
    """Bounds what the tasks of one `remove_many` do at once."""

    def __init__(self, in_flight: int) -> None:
        self.cpu = asyncio.Semaphore(CPU_WORKERS)
        self._requests = asyncio.Semaphore(in_flight)

    def of(self, step: Step) -> asyncio.Semaphore | None:
        if isinstance(step, Compute):
            return self.cpu
        return self._requests if isinstance(step, Infer) else None


async def _as_async(images: Iterable[ImageSource]) -> AsyncIterator[ImageSource]:
    for image in images:
        yield image
