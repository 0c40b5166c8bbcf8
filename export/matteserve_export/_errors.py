"""Everything the exporter raises on purpose.

::

    MatteserveError
    └── ExportError
        ├── CheckpointError (ValueError)   the weights cannot be read, or do not fit the architecture
        ├── OnnxError (ValueError)         the ONNX cannot be read, made or wrapped
        ├── EngineBuildError               a plan cannot be compiled here, or not from this ONNX
        ├── ParityError                    a stage's result differs from the stage before it; nothing was published
        ├── PrecisionError (ValueError)    the ONNX cannot be brought to that precision
        ├── DownloadError                  the weights could not be fetched, or are not what they should be
        └── RepositoryError                the model repository cannot be written

A message says what was wrong, what was found, what is allowed and what to do.
"""

from __future__ import annotations

from matteserve_client import MatteserveError


class ExportError(MatteserveError):
    """Base of every error that the exporter raises on purpose."""


class CheckpointError(ExportError, ValueError):
    """A checkpoint cannot be read, or its entries do not fit the architecture."""


class OnnxError(ExportError, ValueError):
    """An ONNX model cannot be read, exported or wrapped for serving."""


class EngineBuildError(ExportError):
    """A plan cannot be compiled on this machine, or not from this ONNX."""


class ParityError(ExportError):
    """A stage's output differs from its reference by more than the tolerance; nothing was published."""


class PrecisionError(ExportError, ValueError):
    """A serving ONNX cannot be brought to the precision that was asked for."""


class DownloadError(ExportError):
    """Weights could not be downloaded, or the file is not the expected one."""


class RepositoryError(ExportError):
    """The model repository cannot be written."""
