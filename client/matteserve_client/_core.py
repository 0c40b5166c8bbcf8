"""What a client does, without doing any of it: no sockets, no threads, no event loop.

Each operation is a generator. It yields *steps* (compute this, ask the server that), is sent each step's result or
thrown its exception, and returns the operation's result. `Client` performs the steps by blocking, `AsyncClient` by
awaiting; the order of things, the contract cache and the second attempt stand here once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from matteserve_client._contract import ModelContract
from matteserve_client._errors import (
    ContractError,
    DeadlineExceededError,
    InferenceError,
    InvalidRequestError,
    ModelNotFoundError,
    ServerUnavailableError,
)
from matteserve_client._images import ImageSource, load_picture
from matteserve_client._postprocess import Matte, Timings, full_size_alpha
from matteserve_client._preprocess import Parity, check_parity, image_tensor
from matteserve_client._protocols import ModelStatus

T = TypeVar("T")

# Where only the alpha is wanted, a JPEG is decoded no smaller than so many times the model's input: at twice its size
# the input differs by 0.3/255 on average from that of a full decode, at once its size by 0.5 and in places by 12.
_MARGIN = 2


@dataclass(frozen=True)
class Compute:
    """Call a function that keeps a CPU core busy; the result is `(what it returned, seconds it took)`."""

    function: Callable[[], Any]

    def run(self) -> tuple[Any, float]:
        """Call it here and now."""
        start = time.perf_counter()
        return self.function(), time.perf_counter() - start


@dataclass(frozen=True)
class Infer:
    """Send `image`, shape (1, H, W, 3), uint8; the result is the alpha, shape (1, H, W), uint8."""

    model: str
    image: NDArray[np.uint8]
    timeout_s: float


@dataclass(frozen=True)
class ReadConfig:
    """The result is the model's `inference.ModelConfig` message."""

    model: str
    timeout_s: float


@dataclass(frozen=True)
class ReadIndex:
    """The result is a list of `ModelStatus`."""

    timeout_s: float


@dataclass(frozen=True)
class AskReady:
    """The result is whether the server says that it is ready."""

    timeout_s: float


Step: TypeAlias = Compute | Infer | ReadConfig | ReadIndex | AskReady
Steps: TypeAlias = Generator[Step, Any, T]


class Core:
    """Options and caches of one client, and its operations as generators of steps.

    Threads may share it: the caches are single dictionary operations, and the worst that a race can do is to read
    a contract twice.
    """

    def __init__(
        self, *, address: str, model: str | None, timeout_s: float, parity: Parity | None, max_pixels: int
    ) -> None:
        if parity not in (None, "rembg"):
            raise ValueError(f"parity is {parity!r}, must be None or 'rembg'")
        if max_pixels < 1:
            raise ValueError(f"max_pixels is {max_pixels}, must be at least 1")
        self.address = address
        self._model = model
        self._timeout_s = _check_timeout(timeout_s)
        self._parity = parity
        self._max_pixels = max_pixels
        self._contracts: dict[str, ModelContract] = {}
        self._found_model: str | None = None

    def timeout(self, timeout_s: float | None) -> float:
        """The time limit to use, in seconds."""
        return self._timeout_s if timeout_s is None else _check_timeout(timeout_s)

    def matte(
        self, image: ImageSource, model: str | None, timeout_s: float | None, alpha_only: bool = False
    ) -> Steps[Matte]:
        """Alpha of one picture."""
        limit = self.timeout(timeout_s)
        enough: int | None = None
        if alpha_only and self._parity is None:
            contract = yield from self.contract(model, timeout_s)
            if contract.numerics == "reference":
                enough = _MARGIN * max(contract.height, contract.width)
        picture, decode = yield Compute(lambda: load_picture(image, max_pixels=self._max_pixels, at_least=enough))
        name = yield from self._name(model, limit)
        for attempt in (1, 2):
            contract = yield from self._contract(name, limit)
            check_parity(self._parity, contract, name)
            tensor, preprocess = yield Compute(lambda c=contract: image_tensor(picture, c, parity=self._parity))  # type: ignore[misc]
            sent = time.perf_counter()
            try:
                answer = yield Infer(name, tensor, limit)
            except ModelNotFoundError:
                self._forget(name)
                raise
            except InvalidRequestError:
                # Perhaps the model was exported again with another size. If its contract is the same, it was not that.
                self._forget(name)
                if attempt == 2 or (yield from self._contract(name, limit)) == contract:
                    raise
                continue
            request = time.perf_counter() - sent
            break
        alpha, postprocess = yield Compute(
            lambda: full_size_alpha(self._single(answer, contract, name), picture, contract, parity=self._parity)
        )
        timings = Timings(decode, preprocess, request, postprocess)
        return Matte(name, timings, alpha, None if alpha_only else picture)

    def contract(self, model: str | None, timeout_s: float | None) -> Steps[ModelContract]:
        """Contract of a model, from the cache or the server."""
        limit = self.timeout(timeout_s)
        name = yield from self._name(model, limit)
        return (yield from self._contract(name, limit))

    def models(self, timeout_s: float | None) -> Steps[list[ModelStatus]]:
        """What the server's repository has."""
        statuses: list[ModelStatus] = yield ReadIndex(self.timeout(timeout_s))
        return statuses

    def ready(self, timeout_s: float | None) -> Steps[bool]:
        """Whether the server is reachable and ready."""
        try:
            answer: bool = yield AskReady(self.timeout(timeout_s))
        except (ServerUnavailableError, DeadlineExceededError):
            return False
        return answer

    def _contract(self, name: str, limit: float) -> Steps[ModelContract]:
        known = self._contracts.get(name)
        if known is None:
            config = yield ReadConfig(name, limit)
            known = self._contracts[name] = ModelContract.from_config(config)
        return known

    def _forget(self, name: str) -> None:
        self._contracts.pop(name, None)
        if self._found_model == name:
            self._found_model = None

    def _name(self, model: str | None, limit: float) -> Steps[str]:
        """The model to use: the one asked for, the client's, or the only alias that the server has loaded."""
        chosen = model or self._model or self._found_model
        if chosen is not None:
            return chosen
        statuses: list[ModelStatus] = yield ReadIndex(limit)
        aliases: list[str] = []
        others: list[str] = []
        for name in (status.name for status in statuses if status.ready):
            try:
                config = yield ReadConfig(name, limit)
                contract = ModelContract.from_config(config)
            except (ContractError, ModelNotFoundError):
                continue  # some other model of this server, none of ours; or unloaded since
            self._contracts[name] = contract
            (aliases if config.platform == "ensemble" else others).append(name)
        candidates = aliases or others
        if len(candidates) != 1:
            found = f"it serves {', '.join(candidates)}" if candidates else "it serves none"
            raise ModelNotFoundError(f"{self.address}: which model? {found}; name one with model=... or --model")
        self._found_model = candidates[0]
        return candidates[0]

    def _single(self, answer: NDArray[np.uint8], contract: ModelContract, name: str) -> NDArray[np.uint8]:
        expected = (1, contract.height, contract.width)
        if answer.shape != expected or answer.dtype != np.uint8:
            self._forget(name)
            raise InferenceError(
                f"{self.address}, model {name!r}: the answer is {answer.dtype} {answer.shape}, "
                f"its contract says uint8 {expected}; try again if the model was just replaced"
            )
        single: NDArray[np.uint8] = answer[0]
        return single


def _check_timeout(timeout_s: float) -> float:
    if not timeout_s > 0:
        raise ValueError(f"timeout_s is {timeout_s!r}, must be a number of seconds above 0")
    return timeout_s
