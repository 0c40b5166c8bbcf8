"""What running a server can raise on purpose.

::

    MatteserveError
    └── ServerError
        ├── TritonNotFoundError      no usable tritonserver on this machine
        ├── InstallError             `matteserve install-triton` could not finish
        ├── RepositoryError          the model repository is missing, empty or broken
        │   ├── UnknownModelError    a model was asked for that the repository does not have
        │   └── EngineMismatchError  an engine's file or build does not fit its manifest, this TensorRT or this GPU
        ├── ResourceError            a port is taken, or /dev/shm is too small
        ├── StartError               tritonserver ended or did not become ready
        │   └── ModelLoadError       the server runs, a model does not load
        └── SwapError                an alias was not moved to another engine; the old one serves
            ├── ControlError         the running server cannot be reached or does not let itself be controlled
            ├── SwapBusyError        another swap of the same model is going on
            ├── VerificationError    the new engine's answers are not those of the old one
            └── RolledBackError      the new engine served, did not do well, and the old one serves again
"""

from matteserve_client import MatteserveError


class ServerError(MatteserveError):
    """Base of everything that starting or supervising a server raises."""


class TritonNotFoundError(ServerError):
    """No usable `tritonserver` was found."""


class InstallError(ServerError):
    """The Triton binary could not be installed."""


class RepositoryError(ServerError):
    """The model repository is missing, empty or broken."""


class UnknownModelError(RepositoryError):
    """The repository has no such model."""


class EngineMismatchError(RepositoryError):
    """An engine was built for another TensorRT or another GPU, or its file is not the one that was built."""


class ResourceError(ServerError):
    """A resource of the machine is taken or too small."""


class StartError(ServerError):
    """`tritonserver` ended early or did not become ready in time."""


class ModelLoadError(StartError):
    """The server runs, but a model does not load."""


class SwapError(ServerError):
    """An alias could not be moved to another engine; the one that served goes on serving."""


class ControlError(SwapError):
    """The running server cannot be reached, or refuses to be controlled."""


class SwapBusyError(SwapError):
    """Another swap or rollback of the same model is going on."""


class VerificationError(SwapError):
    """The new engine answers, but not what the old one answers."""


class RolledBackError(SwapError):
    """The new engine served for a while and did not do well; the old one serves again."""
