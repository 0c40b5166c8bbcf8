"""From a checkpoint or a public ONNX to a verified, servable model: the export half of matteserve.

The stages, each a function from artefact to artefact with a frozen configuration::

    checkpoint ──► torch ──► core ONNX ──► serving ONNX ──► comparison ──► model repository
    checkpoints    models    to_onnx       serving          compare        repository

`matteserve_export.pipeline` chains them. Importing this package imports neither torch nor onnx.
"""

from matteserve_export._errors import (
    CheckpointError,
    DownloadError,
    ExportError,
    OnnxError,
    ParityError,
    PrecisionError,
    RepositoryError,
)

__all__ = [
    "CheckpointError",
    "DownloadError",
    "ExportError",
    "OnnxError",
    "ParityError",
    "PrecisionError",
    "RepositoryError",
]
