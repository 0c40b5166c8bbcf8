"""What running a server can raise on purpose.

::

    MatteserveError
    └── ServerError
        ├── TritonNotFoundError      no usable tritonserver on this machine
        ├── InstallError             `matteserve install-triton` could not finish
        ├── RepositoryError          the model repository is missing, empty or broken
        │   └── UnknownModelError    a model was asked for that the repository does not have
        ├── ResourceError            a port is taken, or /dev/shm is too small
        └── StartError               tritonserver ended or did not become ready
            └── ModelLoadError       the server runs, a model does not load
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


class ResourceError(ServerError):
    """A resource of the machine is taken or too small."""


class StartError(ServerError):
    """`tritonserver` ended early or did not become ready in time."""


class ModelLoadError(StartError):
    """The server runs, but a model does not load."""
