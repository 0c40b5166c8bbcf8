"""Everything the client raises on purpose.

::

    MatteserveError
    ├── InvalidImageError (ValueError)         the picture cannot be used; nothing was sent
    │   ├── UnsupportedFormatError             not one of the formats the client reads
    │   └── ImageTooLargeError                 more pixels than the limit, or a decompression bomb
    ├── ContractError                          the model's config does not say what a client must know
    ├── ModelNotFoundError (LookupError)       the server has no such model, or it is not loaded
    ├── ServerUnavailableError (ConnectionError)   no connection, or it broke during the request
    │   └── ServerOverloadedError              the model's queue is full; try again later
    ├── DeadlineExceededError (TimeoutError)   no answer within the timeout
    └── InferenceError (RuntimeError)          the server answered with a failure
        └── InvalidRequestError                … because it refused the tensor (dtype, shape, name)

A message says what was wrong, what was found, what is allowed and what to do. gRPC statuses become these classes
in one place, :mod:`matteserve_client._transport`.
"""


class MatteserveError(Exception):
    """Base of every error that matteserve raises on purpose."""


class InvalidImageError(MatteserveError, ValueError):
    """The input is not an image that can be used; nothing was sent to the server."""


class UnsupportedFormatError(InvalidImageError):
    """The input is an image file of a format outside the allow-list."""


class ImageTooLargeError(InvalidImageError):
    """The input has more pixels than the client accepts."""


class ContractError(MatteserveError):
    """A model's `config.pbtxt` lacks what a client must know, or contradicts it."""


class ModelNotFoundError(MatteserveError, LookupError):
    """The server does not know the model, or has not loaded it."""


class ServerUnavailableError(MatteserveError, ConnectionError):
    """The server cannot be reached, or the connection broke during the request."""


class ServerOverloadedError(ServerUnavailableError):
    """The model's queue is full or the request waited in it too long; back off and try again."""


class DeadlineExceededError(MatteserveError, TimeoutError):
    """The answer did not arrive within the timeout."""


class InferenceError(MatteserveError, RuntimeError):
    """The server accepted the request and then failed."""


class InvalidRequestError(InferenceError):
    """The server refused the tensor: wrong dtype, shape, batch size or name."""
