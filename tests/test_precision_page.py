"""The tables of docs/precision.md are what was measured, and what was measured is within what is promised."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

from matteserve_export.precision import KEPT, TOLERANCES

DOCS = Path(__file__).parents[1] / "docs"


def test_the_table_is_the_measurement() -> None:
    spec = importlib.util.spec_from_file_location("measure", DOCS / "precision" / "measure.py")
    assert spec is not None
    assert spec.loader is not None
    measure = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(measure)
    figures = json.loads((DOCS / "precision" / "figures.json").read_text())
    page = (DOCS / "precision.md").read_text(encoding="utf-8")
    assert page.split(measure.BEGIN)[1].split(measure.END)[0].strip() == measure.render(figures)
    assert {f["precision"] for f in figures} == set(TOLERANCES) - {"fp32"}
    for figure in figures:
        if figure["precision"] != "fp16":
            continue
        tolerance = TOLERANCES["fp16"]
        assert figure["passed"]
        assert figure["not_finite"] == 0
        assert figure["max"] <= tolerance.max_abs * 255
        assert figure["mean"] <= tolerance.mean_abs * 255
        assert figure["iou"] >= tolerance.min_iou


def test_what_is_kept_is_on_the_page() -> None:
    page = (DOCS / "precision.md").read_text(encoding="utf-8").lower()
    assert [reason for reason in KEPT if f"**{reason}**" not in page and f"**the {reason}**" not in page] == []


def test_the_sections_that_others_link_to() -> None:
    headings = [line for line in (DOCS / "precision.md").read_text(encoding="utf-8").splitlines() if line[:2] == "##"]
    for heading in ("## When FP16 fails", "## Rebuild after a TensorRT upgrade", "## Swap and roll back"):
        assert heading in headings
