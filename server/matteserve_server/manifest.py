"""Reading `manifest.json`, which the exporter writes beside an engine: what its file is, and what it was built for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matteserve_client import AlphaTolerance
from matteserve_server._errors import RepositoryError
from matteserve_server.plan_backend.fit import Builder

MANIFEST_FILE = "manifest.json"
_NEWEST_SCHEMA = 2


@dataclass(frozen=True)
class EngineFile:
    """The engine's file as it was written.

    Attributes:
        name: File name, e.g. "model.plan".
        sha256: Hex digest.
        size_bytes: Length.
    """

    name: str
    sha256: str
    size_bytes: int


@dataclass(frozen=True)
class Manifest:
    """What the server reads of a manifest.

    Attributes:
        engine: "onnx", "trt" or "rtx".
        precision: "fp32", "fp16", "bf16" or "int8".
        file: The engine's file; None if the manifest does not say.
        tolerance: How far its alphas may be from the FP32 graph's; None if the manifest does not say.
        builder: What compiled it; None for an ONNX file.
    """

    engine: str
    precision: str
    file: EngineFile | None = None
    tolerance: AlphaTolerance | None = None
    builder: Builder | None = None


def read_manifest(version_directory: Path) -> Manifest | None:
    """Read the manifest in a version directory (`<engine>/1`); None if there is none.

    Raises:
        RepositoryError: It cannot be read, or a newer matteserve wrote it.
    """
    path = version_directory / MANIFEST_FILE
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        schema = int(fields["schema_version"])
        if schema > _NEWEST_SCHEMA:
            raise RepositoryError(
                f"{path} has schema version {schema}, this matteserve reads up to {_NEWEST_SCHEMA}; upgrade it"
            )
        tolerance = fields.get("tolerance")
        return Manifest(
            engine=str(fields["engine"]),
            precision=str(fields["precision"]),
            file=_read_file(fields),
            tolerance=AlphaTolerance.from_dict(tolerance) if tolerance else None,
            builder=Builder.from_dict(fields["builder"]) if fields.get("builder") else None,
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
        raise RepositoryError(
            f"{path} is not a manifest ({type(exc).__name__}: {exc}); build or export the engine again"
        ) from exc


def _read_file(fields: Mapping[str, Any]) -> EngineFile | None:
    described = fields.get("file")
    if described is None and "onnx" in fields:  # schema 1 knew ONNX files only
        described = {"name": "model.onnx", **fields["onnx"]}
    if described is None:
        return None
    return EngineFile(str(described["name"]), str(described["sha256"]), int(described["bytes"]))
