"""A real Triton Inference Server: found, started with matteserve's models, supervised."""

from matteserve_server._errors import (
    ControlError,
    EngineMismatchError,
    InstallError,
    ModelLoadError,
    RepositoryError,
    ResourceError,
    RolledBackError,
    ServerError,
    StartError,
    SwapBusyError,
    SwapError,
    TritonNotFoundError,
    UnknownModelError,
    VerificationError,
)
from matteserve_server.binary import TritonBinary, find_tritonserver, install_triton
from matteserve_server.embedded import EmbeddedServer
from matteserve_server.options import ServerOptions
from matteserve_server.swapping import Swap, SwapOptions, SwapResult, rollback, swap

__all__ = [
    "ControlError",
    "EmbeddedServer",
    "EngineMismatchError",
    "InstallError",
    "ModelLoadError",
    "RepositoryError",
    "ResourceError",
    "RolledBackError",
    "ServerError",
    "ServerOptions",
    "StartError",
    "Swap",
    "SwapBusyError",
    "SwapError",
    "SwapOptions",
    "SwapResult",
    "TritonBinary",
    "TritonNotFoundError",
    "UnknownModelError",
    "VerificationError",
    "find_tritonserver",
    "install_triton",
    "rollback",
    "swap",
]
