"""Thin gRPC client of matteserve, the background-removal inference server."""

from matteserve_client._contract import INPUT_NAME, OUTPUT_NAME, ModelContract
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
from matteserve_client._version import __version__

__all__ = [
    "INPUT_NAME",
    "OUTPUT_NAME",
    "ContractError",
    "DeadlineExceededError",
    "ImageTooLargeError",
    "InferenceError",
    "InvalidImageError",
    "InvalidRequestError",
    "MatteserveError",
    "ModelContract",
    "ModelNotFoundError",
    "ServerOverloadedError",
    "ServerUnavailableError",
    "UnsupportedFormatError",
    "__version__",
]
