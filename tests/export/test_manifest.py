"""The manifest: what an export and a build write, what is read back, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import onnx
import pytest

from matteserve_client import AlphaTolerance, ModelContract
from matteserve_export import RepositoryError
from matteserve_export.manifest import build_manifest, export_manifest, onnx_record, read_manifest
from matteserve_export.weights import find_weights

BUNDLED = Path(__file__).parents[2] / "model_repository" / "demo_onnx_fp32"
TOLERANCE = AlphaTolerance(max_abs=0.1, p999_abs=0.05, mean_abs=0.01, min_iou=0.9)


@pytest.fixture
def contract() -> ModelContract:
    return ModelContract(64, 96, 8, "bilinear", "lanczos", "u2netp", "u2netp", weights_sha256="ab" * 32)


@pytest.fixture
def exported(contract: ModelContract, op_model: Any) -> dict[str, Any]:
    model: onnx.ModelProto = op_model()
    serialized = model.SerializeToString()
    return export_manifest(
        model="u2netp",
        contract=contract,
        weights=find_weights("u2netp"),
        kind="checkpoint",
        weights_file="u2netp.pth",
        record=onnx_record(model, sha256(serialized).hexdigest(), len(serialized)),
        parity=[{"name": "a gate", "passed": True}],
        tolerance=TOLERANCE,
    )


def _write(folder: Path, manifest: object) -> Path:
    (folder / "1").mkdir(parents=True, exist_ok=True)
    (folder / "1" / "manifest.json").write_text(manifest if isinstance(manifest, str) else json.dumps(manifest))
    return folder


def test_an_export_describes_itself(exported: dict[str, Any], contract: ModelContract, tmp_path: Path) -> None:
    assert read_manifest(_write(tmp_path, exported)) == exported
    assert exported["file"]["sha256"] == exported["onnx"]["sha256"]
    assert (exported["schema_version"], exported["builder"]) == (2, None)
    assert "source" not in exported
    assert AlphaTolerance.from_dict(exported["tolerance"]) == TOLERANCE
    assert exported["weights"]["sha256"] == contract.weights_sha256
    assert exported["input"]["width"] == 96
    assert exported["producer"]["onnx"] == onnx.__version__


def test_a_build_names_its_source(exported: dict[str, Any], contract: ModelContract, tmp_path: Path) -> None:
    plan = tmp_path / "built"
    plan.write_bytes(b"plan")
    compiled = onnx_record(onnx.load(BUNDLED / "1" / "model.onnx"), "cd" * 32, 17)
    manifest = build_manifest(
        model="u2netp",
        contract=dataclasses.replace(contract, engine="rtx", precision="fp16", max_batch_size=2),
        source_engine="u2netp_onnx_fp32",
        source=exported,
        file=plan,
        file_name="model.plan",
        compiled=compiled,
        parity=[],
        tolerance=TOLERANCE,
        builder={"name": "tensorrt_rtx", "version": "1.7.1.116"},
    )
    assert read_manifest(_write(tmp_path / "engine", manifest)) == manifest
    assert manifest["file"] == {"name": "model.plan", "bytes": 4, "sha256": sha256(b"plan").hexdigest()}
    assert manifest["source"] == {"engine": "u2netp_onnx_fp32", "onnx_sha256": exported["onnx"]["sha256"]}
    assert (manifest["onnx"]["sha256"], manifest["onnx"]["opset"], manifest["onnx"]["bytes"]) == ("cd" * 32, 17, 17)
    assert (manifest["engine"], manifest["precision"], manifest["input"]["max_batch_size"]) == ("rtx", "fp16", 2)
    assert manifest["weights"] == exported["weights"]
    assert manifest["input"]["mean"] == exported["input"]["mean"]


def test_schema_1_is_read_as_2(exported: dict[str, Any], tmp_path: Path) -> None:
    """The form of the engines that were exported before there were plans."""
    old = {key: value for key, value in exported.items() if key not in ("file", "builder", "tolerance")}
    manifest = read_manifest(_write(tmp_path, {**old, "schema_version": 1}))
    assert manifest["file"] == exported["file"]
    assert (manifest["schema_version"], manifest["builder"]) == (2, None)
    assert "tolerance" not in manifest  # nobody stated one


def test_the_bundled_model_is_readable() -> None:
    manifest = read_manifest(BUNDLED)
    assert (manifest["schema_version"], manifest["file"]["name"]) == (2, "model.onnx")
    assert manifest["file"]["bytes"] == (BUNDLED / "1" / "model.onnx").stat().st_size


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"manifest.json: No such file or directory; make the engine again with `matteserve export`"),
        ("{", r"manifest.json is not JSON \("),
        ("[]", "has schema version None; this exporter knows 1 and 2"),
        ({"schema_version": 3}, r"has schema version 3; this exporter knows 1 and 2. Is it newer than this matteserve"),
        ({"schema_version": 2, "model": "m"}, "lacks engine, precision, onnx, weights, input, parity; make the engine"),
    ],
)
def test_what_cannot_be_read(content: object, message: str, tmp_path: Path) -> None:
    if content is not None:
        _write(tmp_path, content)
    with pytest.raises(RepositoryError, match=message):
        read_manifest(tmp_path)
