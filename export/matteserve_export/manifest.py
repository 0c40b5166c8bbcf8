"""`1/manifest.json`, which lies beside every engine: what it was made from, by what, and the gates that it passed.

::

    schema_version  2
    created_utc, model, engine, precision
    file            name, bytes and sha256 of model.onnx or model.plan
    onnx            sha256, bytes, opset and nodes of the graph that was compiled; for an ONNX engine the file itself
    source          name and ONNX sha256 of the FP32 engine that it was derived from; not there for an export
    weights         name, architecture, file, sha256, licences, paper
    input           height, width, max_batch_size, normalisation, post-processing
    parity          the gates, each with name, method, figures, tolerance and whether it passed
    tolerance       how far its alphas may lie from those of the FP32 graph (`matteserve_client.AlphaTolerance`)
    builder         null for an ONNX engine; else compiler, version, compute capabilities, GPU, profile, flags, seconds
    producer        versions of the packages that had a part in it

Schema 1, before there were plans, had no `file`, `source`, `tolerance` and `builder`; it is read as 2.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import onnx

from matteserve_client import AlphaTolerance, ModelContract, __version__
from matteserve_export._errors import RepositoryError
from matteserve_export._files import digest
from matteserve_export.weights import Weights

__all__ = ["SCHEMA_VERSION", "build_manifest", "export_manifest", "onnx_record", "read_manifest"]

SCHEMA_VERSION = 2
_REQUIRED = ("model", "engine", "precision", "onnx", "weights", "input", "parity")
_PRODUCERS = ("torch", "onnx", "onnxruntime", "onnxslim", "modelopt")


def export_manifest(
    *,
    model: str,
    contract: ModelContract,
    weights: Weights,
    kind: str,
    weights_file: str | None,
    record: Mapping[str, Any],
    parity: Sequence[Mapping[str, Any]],
    tolerance: AlphaTolerance,
) -> dict[str, Any]:
    """Manifest of an FP32 ONNX engine that an export made from weights.

    Args:
        model: Name that clients call.
        contract: What the repository promises to clients.
        weights: Entry of the registry.
        kind: What the weights came as.
        weights_file: Name of their file; None for random ones.
        record: `onnx_record` of the serving graph as it is written.
        parity: Gates passed, as plain data.
        tolerance: For comparisons with it, through a server for example.
    """
    return {
        **_header(model, contract),
        "file": {"name": "model.onnx", "sha256": record["sha256"], "bytes": record["bytes"]},
        "onnx": dict(record),
        "weights": {
            "name": contract.weights,
            "random": weights_file is None,
            "architecture": weights.architecture,
            "source": kind,
            "file": weights_file,
            "sha256": contract.weights_sha256,
            "licence": contract.weights_licence,
            "code_licence": weights.code_licence,
            "paper": weights.paper,
        },
        "input": {
            **_shape(contract),
            "mean": list(weights.mean),
            "std": list(weights.std),
            "sigmoid": weights.sigmoid,
            "min_max": weights.min_max,
            "numerics": contract.numerics,
        },
        "parity": list(parity),
        "tolerance": asdict(tolerance),
        "builder": None,
        "producer": _producer(),
    }


def build_manifest(
    *,
    model: str,
    contract: ModelContract,
    source_engine: str,
    source: Mapping[str, Any],
    file: Path,
    file_name: str,
    compiled: Mapping[str, Any],
    parity: Sequence[Mapping[str, Any]],
    tolerance: AlphaTolerance,
    builder: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Manifest of an engine that was derived from another one.

    Args:
        model: Name that clients call.
        contract: What the repository promises to clients.
        source_engine: Name of the engine that it was derived from.
        source: That engine's manifest, as `read_manifest` gives it.
        file: The engine's file, as it will be moved into the repository.
        file_name: Its name there.
        compiled: `onnx_record` of the graph that was compiled.
        parity: Gates passed, as plain data.
        tolerance: Against the source.
        builder: What compiled it; None for an ONNX engine.
    """
    return {
        **_header(model, contract),
        "file": {"name": file_name, "sha256": digest(file, "sha256"), "bytes": file.stat().st_size},
        "onnx": dict(compiled),
        "source": {"engine": source_engine, "onnx_sha256": source["onnx"]["sha256"]},
        "weights": source["weights"],
        "input": {**source["input"], **_shape(contract)},
        "parity": list(parity),
        "tolerance": asdict(tolerance),
        "builder": None if builder is None else dict(builder),
        "producer": _producer(),
    }


def onnx_record(model: onnx.ModelProto, sha256_hex: str, size: int) -> dict[str, Any]:
    """What a manifest says about a graph."""
    return {
        "sha256": sha256_hex,
        "bytes": size,
        "opset": next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")),
        "nodes": len(model.graph.node),
    }


def read_manifest(engine_path: Path) -> dict[str, Any]:
    """Read an engine's manifest, as schema 2 whichever it was written in.

    Args:
        engine_path: Folder of the engine.

    Raises:
        RepositoryError: There is none, it is not one, or it is newer than this exporter.
    """
    path = engine_path / "1" / "manifest.json"
    again = "make the engine again with `matteserve export` or `matteserve build`"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise RepositoryError(f"{path}: {exc.strerror or exc}; {again}") from exc
    except ValueError as exc:  # not UTF-8, not JSON
        raise RepositoryError(f"{path} is not JSON ({exc}); {again}") from exc
    version = manifest.get("schema_version") if isinstance(manifest, dict) else None
    if version not in (1, SCHEMA_VERSION):
        raise RepositoryError(
            f"{path} has schema version {version}; this exporter knows 1 and {SCHEMA_VERSION}. Is it newer than this "
            f"matteserve ({__version__})? Otherwise {again}"
        )
    missing = [key for key in _REQUIRED if key not in manifest]
    if missing:
        raise RepositoryError(f"{path} lacks {', '.join(missing)}; {again}")
    if version == 1:
        record = manifest["onnx"]
        file = {"name": "model.onnx", "sha256": record["sha256"], "bytes": record["bytes"]}
        manifest = {**manifest, "schema_version": SCHEMA_VERSION, "file": file, "builder": None}
    return dict(manifest)


def _header(model: str, contract: ModelContract) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "created_utc": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "model": model,
        "engine": contract.engine,
        "precision": contract.precision,
    }


def _shape(contract: ModelContract) -> dict[str, int]:
    return {"height": contract.height, "width": contract.width, "max_batch_size": contract.max_batch_size}


def _producer() -> dict[str, str]:
    """Versions of what was really imported; a build needs no torch."""
    found = {name: sys.modules[name] for name in _PRODUCERS if name in sys.modules}
    return {"matteserve": __version__, **{name: str(module.__version__) for name, module in found.items()}}
