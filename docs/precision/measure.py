"""Measures the tables of docs/precision.md: `python docs/precision/measure.py MODEL:SIZE:PRECISION,… …`.

Without arguments it only writes the page again.
MODEL is an architecture, which then has the conformance tests' weights, or `demo` for the bundled, trained model. Every
run adds to figures.json beside this file, replaces what it measured again, and writes the tables into the page.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parent
FIGURES, PAGE, ROOT = HERE / "figures.json", HERE.parent / "precision.md", HERE.parents[1]
BEGIN, END = "<!-- begin: docs/precision/measure.py -->", "<!-- end -->"
_HEAD = (
    "| model | size | precision | method | max | 99.9 % | mean | IoU | file | time |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
)
_ORDER = (
    *("demo", "u2netp", "u2net", "isnet"),
    *("birefnet_lite", "birefnet_pvt_v2_b2", "birefnet_swin_s", "birefnet_swin_b", "birefnet"),
)
_REPEATS = 3


def measure(name: str, size: int, precision: str, pictures: int = 2) -> list[dict[str, Any]]:
    """Compare one precision of one model with its FP32 graph; differences in levels of 255."""
    import onnx

    sys.path.insert(0, str(ROOT / "tests"))
    from matteserve_export._session import make_runner
    from matteserve_export.compare import gate_graph, make_scenes
    from matteserve_export.precision import convert, tolerance_for
    from support.serving_graphs import exported

    if name == "demo":
        serving = onnx.load(ROOT / "model_repository" / "demo_onnx_fp32" / "1" / "model.onnx")
    else:
        serving = exported(name, size)
    reduced = convert(serving, precision, make_scenes(8, size, size, seed=12))
    images = make_scenes(pictures, size, size, seed=2)
    ratio = None
    if precision != "bf16":  # interleaved, because other processes share the machine
        runs, ratios = (make_runner(serving), make_runner(reduced)), []
        for _ in range(_REPEATS):
            seconds = []
            for run in runs:
                started = time.perf_counter()
                run(images[:1])
                seconds.append(time.perf_counter() - started)
            ratios.append(seconds[1] / seconds[0])
        ratio = round(median(ratios), 2)
    outcomes = gate_graph(reduced, serving, images, tolerance_for(precision, name), batch_sizes=(1, 2))
    return [
        {
            "model": name,
            "size": size,
            "precision": precision,
            "method": outcome.method,
            "passed": outcome.passed,
            "max": round(outcome.difference.max_abs * 255),
            "p999": round(outcome.difference.p999_abs * 255),
            "mean": round(outcome.difference.mean_abs * 255, 3),
            "iou": round(outcome.difference.iou, 4),
            "not_finite": outcome.not_finite,
            "bytes_of_fp32": round(reduced.ByteSize() / serving.ByteSize(), 2),
            "time_of_fp32": ratio if outcome.method == "ort-cpu" else None,
        }
        for outcome in outcomes
    ]


def render(figures: list[dict[str, Any]]) -> str:
    """The table, in Markdown."""
    rows = [_HEAD]
    for f in figures:
        name = f["model"] if f["passed"] else f"{f['model']} (fails)"
        speed = "" if f["time_of_fp32"] is None else f"{f['time_of_fp32']:.2f}"
        rows.append(
            f"| {name} | {f['size']} | {f['precision']} | {f['method']} | {f['max']} | {f['p999']} | {f['mean']:.3f} | "
            f"{f['iou']:.4f} | {f['bytes_of_fp32']:.2f} | {speed} |"
        )
    return "\n".join(rows)


def _key(figure: dict[str, Any]) -> tuple[Any, ...]:
    name = figure["model"]
    place = _ORDER.index(name) if name in _ORDER else len(_ORDER)
    precisions = ("fp16", "bf16", "int8")
    return place, name, figure["size"], precisions.index(figure["precision"]), figure["method"] != "ort-cpu"


def main(specifications: list[str]) -> None:
    """Measure, store, write the page."""
    warnings.simplefilter("ignore")
    figures = json.loads(FIGURES.read_text()) if FIGURES.exists() else []
    for specification in specifications:
        name, size, precisions = specification.split(":")
        for precision in precisions.split(","):
            found = measure(name, int(size), precision)
            print(*found, sep="\n", flush=True)
            same = (name, int(size), precision)
            figures = [f for f in figures if (f["model"], f["size"], f["precision"]) != same] + found
            figures.sort(key=_key)
            FIGURES.write_text(json.dumps(figures, indent=1) + "\n")
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{render(figures)}\n{END}{rest.partition(END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
