"""A real Triton Inference Server: found, started with matteserve's models, supervised."""

from matteserve_server._errors import (
    InstallError,
    ModelLoadError,
    RepositoryError,
    ResourceError,
    ServerError,
    StartError,
    TritonNotFoundError,
    UnknownModelError,
)
from matteserve_server.binary import TritonBinary, find_tritonserver, install_triton
from matteserve_server.embedded import EmbeddedServer
from matteserve_server.options import ServerOptions

__all__ = [
    "EmbeddedServer",
    "InstallError",
    "ModelLoadError",
    "RepositoryError",
    "ResourceError",
    "ServerError",
    "ServerOptions",
    "StartError",
    "TritonBinary",
    "TritonNotFoundError",
    "UnknownModelError",
    "find_tritonserver",
    "install_triton",
]
