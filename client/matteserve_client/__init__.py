"""Thin gRPC client of matteserve, the background-removal inference server."""

from typing import TYPE_CHECKING, Any

from matteserve_client._async_client import AsyncClient
from matteserve_client._client import Client
from matteserve_client._contract import INPUT_NAME, OUTPUT_NAME, ModelContract
from matteserve_client._difference import TOLERANCES, AlphaDifference, AlphaTolerance, alpha_difference
from matteserve_client._errors import (
    ContractError,
    DeadlineExceededError,
    ImageTooLargeError,
    InferenceError,
    InvalidImageError,
    InvalidRequestError,
    MatteserveError,
    ModelNotFoundError,
    ServerOverloadedError,
    ServerUnavailableError,
    UnsupportedFormatError,
)
from matteserve_client._images import ImageSource
from matteserve_client._postprocess import Matte, Timings
from matteserve_client._preprocess import Parity
from matteserve_client._protocols import AsyncTransport, ModelStatus, PendingAlpha, TlsOptions, Transport
from matteserve_client._version import __version__

if TYPE_CHECKING:
    from matteserve_client._transport import AsyncGrpcTransport, GrpcTransport

__all__ = [
    "INPUT_NAME",
    "OUTPUT_NAME",
    "TOLERANCES",
    "AlphaDifference",
    "AlphaTolerance",
    "AsyncClient",
    "AsyncGrpcTransport",
    "AsyncTransport",
    "Client",
    "ContractError",
    "DeadlineExceededError",
    "GrpcTransport",
    "ImageSource",
    "ImageTooLargeError",
    "InferenceError",
    "InvalidImageError",
    "InvalidRequestError",
    "Matte",
    "MatteserveError",
    "ModelContract",
    "ModelNotFoundError",
    "ModelStatus",
    "Parity",
    "PendingAlpha",
    "ServerOverloadedError",
    "ServerUnavailableError",
    "Timings",
    "TlsOptions",
    "Transport",
    "UnsupportedFormatError",
    "__version__",
    "alpha_difference",
]


def __getattr__(name: str) -> Any:
    """Import the gRPC transports when they are first named: gRPC takes longer to import than all the rest."""
    if name in ("AsyncGrpcTransport", "GrpcTransport"):
        from matteserve_client import _transport

        return getattr(_transport, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
