"""What a client needs from a transport; `matteserve_client._transport` has the gRPC ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class ModelStatus:
    """One model of the server's repository.

    Attributes:
        name: Name to ask for.
        ready: Whether a version of it is loaded and takes requests.
        reason: Why it is not ready, in the server's words; empty if it is, or if it was never loaded.
    """

    name: str
    ready: bool
    reason: str = ""


class PendingAlpha(Protocol):
    """A request on its way; a `concurrent.futures.Future` of the array is one."""

    def result(self) -> NDArray[np.uint8]:
        """Wait for the answer: alpha, shape (B, H, W), uint8. Raises `MatteserveError`."""

    def cancel(self) -> object:
        """Give the request up; `result()` then raises."""


class Transport(Protocol):
    """Carries requests to a server. All methods may be called from several threads at once.

    Every method raises only subclasses of `MatteserveError` for what goes wrong on the way or at the server.
    """

    @property
    def address(self) -> str:
        """Where the server is, for messages."""

    def infer(self, model: str, image: NDArray[np.uint8], *, timeout_s: float) -> PendingAlpha:
        """Send images, shape (B, H, W, 3), uint8, RGB, and return at once."""

    def model_config(self, model: str, *, timeout_s: float) -> Any:
        """Return the model's configuration, an `inference.ModelConfig` message."""

    def repository_index(self, *, timeout_s: float) -> list[ModelStatus]:
        """Return the models of the server's repository, sorted by name."""

    def server_ready(self, *, timeout_s: float) -> bool:
        """Return whether the server says that it is ready."""

    def close(self) -> None:
        """Release the connection; requests on their way fail."""


class AsyncTransport(Protocol):
    """`Transport` for asyncio, used from one event loop."""

    @property
    def address(self) -> str:
        """Where the server is, for messages."""

    async def infer(self, model: str, image: NDArray[np.uint8], *, timeout_s: float) -> NDArray[np.uint8]:
        """Send images, shape (B, H, W, 3), uint8, RGB; return alpha, shape (B, H, W), uint8."""

    async def model_config(self, model: str, *, timeout_s: float) -> Any:
        """Return the model's configuration, an `inference.ModelConfig` message."""

    async def repository_index(self, *, timeout_s: float) -> list[ModelStatus]:
        """Return the models of the server's repository, sorted by name."""

    async def server_ready(self, *, timeout_s: float) -> bool:
        """Return whether the server says that it is ready."""

    async def close(self) -> None:
        """Release the connection; requests on their way fail."""


@dataclass(frozen=True)
class TlsOptions:
    """TLS for the connection; without any file, the system's root certificates are trusted.

    Attributes:
        root_ca: PEM file with the certificates to trust.
        client_cert: PEM file with the client's certificate chain, for mutual TLS.
        client_key: PEM file with the client's private key; given exactly if `client_cert` is.
    """

    root_ca: str | None = None
    client_cert: str | None = None
    client_key: str | None = None

    def __post_init__(self) -> None:
        if (self.client_cert is None) != (self.client_key is None):
            raise ValueError("TlsOptions: client_cert and client_key belong together; give both or neither")
