"""From a checkpoint or a public ONNX to a verified, servable model: the export half of matteserve.

The stages, each a function from artefact to artefact with a frozen configuration::

    checkpoint ──► torch ──► core ONNX ──► serving ONNX ──► comparison ──► model repository
    checkpoints    models    to_onnx       serving          compare        repository

    serving ONNX ──► lowered ──► fp16, bf16, int8 ──► plan ──► comparison ──► model repository
    (repository)     lowering    precision            engine   compare        repository

`matteserve_export.pipeline` chains the first row, `matteserve_export.build` the second. Importing this
package imports neither torch nor onnx.
"""

from matteserve_export._errors import (
    CheckpointError,
    DownloadError,
    EngineBuildError,
    ExportError,
    OnnxError,
    ParityError,
    PrecisionError,
    RepositoryError,
)

__all__ = [
    "CheckpointError",
    "DownloadError",
    "EngineBuildError",
    "ExportError",
    "OnnxError",
    "ParityError",
    "PrecisionError",
    "RepositoryError",
]
