"""The comparison's own arithmetic and plumbing; rembg and the models take part in the run itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from matteserve_bench.comparisons import client_cost, encoders, worker
from matteserve_bench.comparisons.pictures import PictureFile, make_pictures, some
from matteserve_bench.comparisons.processes import ComparisonError, MemoryWatch, Worker, rembg_environment, rembg_server
from matteserve_bench.comparisons.vs_rembg import OURS, REMBG, Plan, Turns, table

SMALL = ((0.01, 3), (0.02, 2), (0.05, 1))


def picture(megapixels: float) -> PictureFile:
    return PictureFile(Path("p.jpg"), 1000, round(1000 * megapixels))


def test_pictures_are_made_once_largest_first(tmp_path: Path) -> None:
    made = make_pictures(tmp_path, SMALL)
    assert [round(one.megapixels, 2) for one in made] == [0.05, 0.02, 0.02, 0.01, 0.01, 0.01]
    for one in made:
        with Image.open(one.path) as image:
            assert image.size == (one.width, one.height)
    assert {one.path.suffix for one in made} == {".jpg", ".png"}
    written = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert make_pictures(tmp_path, SMALL) == made
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == written


def test_some_pictures_are_of_all_sizes_but_the_largest() -> None:
    pictures = [picture(size) for size in (24, 12, 5, 5, 2, 2, 0.8, 0.8, 0.3)]
    assert some(pictures, 9) == pictures
    assert [one.megapixels for one in some(pictures, 4)] == [12, 5, 2, 0.8]


def test_worker_keeps_order_and_counts_failures(tmp_path: Path) -> None:
    paths = [tmp_path / f"{index}.bin" for index in range(5)]
    for index, path in enumerate(paths):
        path.write_bytes(bytes([index]) * (index + 1))

    def work(data: bytes) -> bytes:
        if data[0] == 2:
            raise ValueError("no")
        return data * 10

    answer = worker.run(work, [str(path) for path in paths], 2, str(tmp_path))
    assert [record[2:] for record in answer["records"]] == [
        *[[10, ""], [20, ""], [0, "ValueError: no"], [40, ""], [50, ""]]
    ]
    assert all(0 <= end - start <= answer["seconds"] for start, end, *_ in answer["records"])
    assert (tmp_path / "4.png").read_bytes() == paths[4].read_bytes() * 10


def test_turns_add_up() -> None:
    turns = Turns()
    first = {"seconds": 2.0, "records": [[0.0, 1.0, 100, ""], [0.0, 2.0, 300, ""]]}
    second = {"seconds": 2.0, "records": [[5.0, 8.0, 200, ""], [5.0, 7.0, 0, "OSError: gone"]]}
    turns.add(first, [picture(1), picture(2)], 5_000_000, 1.5)
    turns.add(second, [picture(3), picture(4)], 4_000_000, 3.0)
    assert turns.row() == {
        "images": 3,
        "images_per_s": 0.75,
        "megapixels_per_s": 1.5,
        "p50_ms": 2000.0,
        "p99_ms": 3000.0,
        "peak_mb": 5.0,
        "bytes_per_pixel": pytest.approx(0.0001),
        "cpu_s_per_image": 1.5,
        "rates": [1.0, 0.5],
        "errors": ["OSError: gone"],
    }


def test_nothing_finished() -> None:
    turns = Turns()
    turns.add({"seconds": 1.0, "records": [[0.0, 1.0, 0, "E"]]}, [picture(1)], 0, 0.0)
    assert (turns.row()["images_per_s"], turns.row()["bytes_per_pixel"]) == (0.0, 0.0)


def row(side: str, rate: float, errors: tuple[str, ...] = ()) -> dict[str, Any]:
    turns = Turns(images=4, seconds=4 / rate, latencies_s=[1.0] * 4, megapixels=[1.0] * 4, errors=list(errors))
    return {"side": side, "concurrency": 8, **turns.row()}


def test_table_relates_every_side_to_rembg() -> None:
    masks = {"rembg's numerics": {"max": 2.0, "p999": 1.0, "mean": 0.25, "iou": 0.999, "pictures": 8}}
    serving = {"bare_per_s": 4.0, "served_per_s": 3.8, "tax": 0.05, "session_ms": 250.0}
    results = {"u2netp": {"throughput": [row(REMBG, 2), row(OURS, 5, ("E",))], "masks": masks, "serving": serving}}
    text = table(results)
    assert f"| 8 | {REMBG} | 2.00 | 1.00 | 1000 | 1000 |" in text
    assert f"| 8 | {OURS}, 1 failed | 5.00 | 2.50 |" in text
    assert "at most 2, 99.9 % within 1, mean 0.25; IoU at least 0.9990." in text
    assert "a bare session 4.00/s (250 ms), through the server 3.80/s: +5.0 % of time." in text


def test_quick_plan_knows_the_same_models() -> None:
    assert Plan.quick().pictures.keys() == Plan().pictures.keys()


def test_rembg_gets_its_defaults(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    environment = rembg_environment(tmp_path)
    assert "OMP_NUM_THREADS" not in environment
    assert environment["U2NET_HOME"] == str(tmp_path)


def test_a_worker_that_cannot_start() -> None:
    with pytest.raises(ComparisonError, match="the worker of bare ended with code 1"):
        Worker("bare", {"path": "absent.onnx"})


def test_a_rembg_server_that_cannot_start(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'No module named fastapi' >&2\nexit 1\n")
    python.chmod(0o755)
    message = r"`rembg s` did not start \(No module named fastapi\); its Python needs rembg\[cpu,cli\]"
    with pytest.raises(ComparisonError, match=message), rembg_server(str(python), {}):
        raise AssertionError("it started")


def test_memory_of_a_process_is_seen() -> None:
    with MemoryWatch([os.getpid()], interval_s=0.005) as memory:
        held = bytearray(b"x" * 50_000_000)
        for _ in range(50):
            held[0] = 1
            if memory.peak_bytes > 50_000_000:
                break
            time.sleep(0.02)
    assert memory.peak_bytes > 50_000_000


def test_encoders_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoders, "_ROUNDS", 1)
    rows = encoders.measure(0.02)  # decodes every result and compares
    assert len(rows) >= 9
    assert encoders.table(rows).count("\n") == len(rows) + 1


def test_client_cost_table(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rembg", reason="rembg is not installed: matteserve[parity]")
    monkeypatch.setattr(client_cost, "_SIZES", (0.02,))
    monkeypatch.setattr(client_cost, "_INPUTS", (64,))
    monkeypatch.setattr(client_cost, "_ROUNDS", 1)
    rows = client_cost.measure()
    assert [one["side"] for one in rows] == ["libjpeg-turbo", "ours", "ours, alpha only", "rembg"]
    assert all(one[step] > 0 for one in rows[1:] for step in ("decode", "pre", "post", "encode"))
    assert "| 0.02 | 64 | ours |" in client_cost.table(rows)


def test_the_worker_needs_nothing_of_matteserve() -> None:
    code = (
        f"import runpy, sys; runpy.run_path({worker.__file__!r}); print([m for m in sys.modules if 'matteserve' in m])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []
