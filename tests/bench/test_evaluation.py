"""`matteserve eval`: masks, pairs and summaries, then the whole command on the real server.

The model `tiny` answers with the red channel of a 32x32 picture, so every alpha that comes back is known.
"""

from __future__ import annotations

import contextlib
import csv
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from numpy.typing import NDArray
from PIL import Image

from matteserve_bench import EvaluationError, cli_eval
from matteserve_bench.evaluation import (
    MEASURES,
    Pair,
    Row,
    bootstrap_difference,
    evaluate,
    find_pairs,
    load_mask,
    load_trimap,
    score,
    summarise,
)
from matteserve_bench.evaluation.sheet import Worst, make_tiles, write_contact_sheet
from matteserve_bench.evaluation.summary import format_summary
from matteserve_client import Client
from matteserve_server import EmbeddedServer
from support.commands import command

SIZE = 32
KEYS = [m.key for m in MEASURES if not m.optional]
BY_KEY = {m.key: m for m in MEASURES}


def square(first: int = 8, last: int = 24, size: int = SIZE) -> NDArray[np.uint8]:
    """A white square, uint8."""
    mask = np.zeros((size, size), np.uint8)
    mask[first:last, first:last] = 255
    return mask


def pixels_of(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as image:
        return np.asarray(image)


def unit(levels: NDArray[Any]) -> NDArray[np.float32]:
    return (levels / 255).astype(np.float32)


# -- masks and pairs


@pytest.mark.parametrize(
    ("mode", "make"),
    [
        ("L", lambda levels: Image.fromarray(levels)),
        ("1", lambda levels: Image.fromarray(levels).convert("1")),
        ("I;16", lambda levels: Image.fromarray(levels.astype(np.uint16) * 257)),
        ("RGB", lambda levels: Image.fromarray(levels).convert("RGB")),
        ("P", lambda levels: Image.fromarray(levels).convert("RGB").quantize(2)),
        ("RGBA opaque", lambda levels: Image.fromarray(levels).convert("RGBA")),
        ("LA opaque", lambda levels: Image.fromarray(levels).convert("LA")),
        ("RGBA cut-out", lambda levels: Image.fromarray(np.dstack([levels // 3, levels // 2, levels * 0, levels]))),
        ("LA cut-out", lambda levels: Image.merge("LA", [Image.new("L", (SIZE, SIZE), 9), Image.fromarray(levels)])),
    ],
)
def test_every_kind_of_mask(tmp_path: Path, mode: str, make: Callable[[NDArray[np.uint8]], Image.Image]) -> None:
    make(square()).save(tmp_path / "mask.png")
    mask = load_mask(tmp_path / "mask.png")
    assert mask.dtype == np.float32
    np.testing.assert_array_equal(mask, square() / 255)


def test_a_mask_keeps_its_16_bits_and_floats_are_taken(tmp_path: Path) -> None:
    levels = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16) + 1
    levels[-1, -1] = 65535
    Image.fromarray(levels).save(tmp_path / "mask.png")
    np.testing.assert_allclose(load_mask(tmp_path / "mask.png"), levels / 65535, rtol=1e-6)
    Image.fromarray(unit(square())).save(tmp_path / "mask.tif")
    np.testing.assert_array_equal(load_mask(tmp_path / "mask.tif"), square() / 255)


def test_a_masks_orientation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(square()[:16]).save(tmp_path / "mask.png", exif=exif)
    assert load_mask(tmp_path / "mask.png").shape == (32, 16)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (Image.new("RGB", (4, 4), (250, 0, 0)), "colour picture of mode RGB, not a mask"),
        (Image.fromarray(square() // 255), "only the levels 0 and 1 of 255; multiply it by 255"),
        (Image.fromarray(np.full((4, 4), 3, np.float32)), r"float samples must lie in \[0, 1\], found 3 to 3"),
        (Image.fromarray(np.full((4, 4), 70_000, np.int32)), "must have 1, 8 or 16 bits, found values from 70000"),
    ],
)
def test_what_is_no_mask_is_refused(tmp_path: Path, image: Image.Image, message: str) -> None:
    image.save(tmp_path / "mask.tif")
    with pytest.raises(EvaluationError, match=rf"mask\.tif: .*{message}"):
        load_mask(tmp_path / "mask.tif")


def test_unreadable_masks_are_named(tmp_path: Path) -> None:
    (tmp_path / "mask.png").write_bytes(b"not a picture")
    for name in ("mask.png", "gone.png"):
        with pytest.raises(EvaluationError, match=rf"{name}: cannot be read as a mask"):
            load_mask(tmp_path / name)


def test_trimaps(tmp_path: Path) -> None:
    levels = square()
    levels[0, :5] = (1, 127, 128, 254, 255)
    Image.fromarray(levels).save(tmp_path / "trimap.png")
    assert load_trimap(tmp_path / "trimap.png").sum() == 4
    Image.fromarray(square()).save(tmp_path / "trimap.png")
    with pytest.raises(EvaluationError, match="black and white only"):
        load_trimap(tmp_path / "trimap.png")


def touch(folder: Path, *names: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).touch()
    return folder


def test_pairs_by_name(tmp_path: Path) -> None:
    images = touch(tmp_path / "im", "b.JPG", "a.jpeg", "only.png", "notes.txt", ".hidden.png")
    masks = touch(tmp_path / "gt", "a.PNG", "b.png", "other.png")
    found = find_pairs(images, masks)
    assert found.pairs == (
        Pair(images / "a.jpeg", masks / "a.PNG"),
        Pair(images / "b.JPG", masks / "b.png"),
    )
    assert found.incomplete == (
        f"--images {images} has no file for other",
        f"--masks {masks} has no file for only",
    )
    trimaps = touch(tmp_path / "tri", "a.png")
    found = find_pairs(images, masks, trimaps)
    assert found.pairs == (Pair(images / "a.jpeg", masks / "a.PNG", trimaps / "a.png"),)
    assert found.incomplete[-1] == f"--trimaps {trimaps} has no file for b, only, other"


def test_pairs_that_cannot_be(tmp_path: Path) -> None:
    images, masks = touch(tmp_path / "im", "a.jpg"), touch(tmp_path / "gt", "b.png")
    with pytest.raises(EvaluationError, match=r"no picture has a mask of its name \(1 in .*im, 1 in .*gt\)"):
        find_pairs(images, masks)
    with pytest.raises(EvaluationError, match="is given twice"):
        find_pairs(images, tmp_path / "gt" / ".." / "im")
    touch(images, "a.png")
    with pytest.raises(EvaluationError, match=r"differ by their suffix only: a\.jpg and a\.png; keep one"):
        find_pairs(images, masks)


# -- summary and sheet


def rows_of(model: str, *alphas: NDArray[np.uint8], first: int = 0) -> list[Row]:
    rows = []
    for number, alpha in enumerate(alphas, first):
        pair = Pair(Path(f"im/{number}.png"), Path(f"gt/{number}.png"))
        scores, tiles = score(alpha, unit(square())), make_tiles(alpha, unit(square()))
        rows.append(Row(pair, model, alpha.shape, scores.figures, scores.curves, scores.empty, tiles=tiles))
    return rows


def test_the_maximum_of_f_is_that_of_the_mean_curve() -> None:
    """Two pictures that are perfect at different thresholds are not perfect at one."""
    soft, hard = square() // 255 * 60, square()
    soft[0, 0] = 50
    hard[0, :] = 200
    rows = rows_of("a", soft, hard)
    summary = summarise(rows, ["a"])
    assert [row.figures["f_max"] for row in rows] == pytest.approx([1, 1])
    mean_curve = (rows[0].curves["f"] + rows[1].curves["f"]) / 2
    assert summary.figures["a"]["f_max"] == pytest.approx(mean_curve.max())
    assert summary.figures["a"]["f_max"] < 1
    assert summary.figures["a"]["mae"] == pytest.approx(np.mean([row.figures["mae"] for row in rows]))


def test_only_pictures_that_every_model_answered_count() -> None:
    good, bad = square(), square(4, 28)
    rows = rows_of("a", good, bad) + rows_of("b", good)
    rows.append(Row(rows[1].pair, "b", error="broken"))
    summary = summarise(rows, ["a", "b"])
    assert (summary.pictures, summary.left_out) == (1, 1)
    assert summary.errors == (("b", "1.png", "broken"),)
    assert summary.figures["a"] == summary.figures["b"]
    assert {d.verdict for d in summary.differences} == {"equal"}
    assert "Note: 1 pictures failed for a model and are left out for all." in format_summary(summary)
    with pytest.raises(EvaluationError, match="no picture was scored for a and b; the first error: broken"):
        summarise(rows[1:2] + rows[3:], ["a", "b"])


def test_differences_say_which_is_better() -> None:
    good = [square(8 - i % 2, 24) for i in range(30)]
    bad = [square(6 - i % 2, 27) for i in range(30)]
    summary = summarise(rows_of("good", *good) + rows_of("bad", *bad), ["good", "bad"])
    verdicts = {d.measure: d.verdict for d in summary.differences}
    assert verdicts["mae"] == verdicts["iou"] == verdicts["f_max"] == verdicts["sad"] == "worse"
    back = summarise(rows_of("good", *good) + rows_of("bad", *bad), ["bad", "good"])
    assert {d.measure: d.verdict for d in back.differences}["iou"] == "better"
    mae = next(d for d in summary.differences if d.measure == "mae")
    assert mae.low <= mae.difference <= mae.high
    assert mae.difference == pytest.approx(summary.figures["bad"]["mae"] - summary.figures["good"]["mae"])
    text = format_summary(summary)
    assert "bad against good" in text
    assert "believable" not in text


def test_bootstrap_is_paired() -> None:
    rng = np.random.default_rng(1)
    hard = rng.normal(0, 10, 40)  # how hard a picture is varies much more than the models differ
    assert bootstrap_difference(hard, hard + 0.5) == pytest.approx((0.5, 0.5, 0.5))
    noisy = hard + 0.5 + rng.normal(0, 0.2, 40)
    centre, low, high = bootstrap_difference(hard, noisy)
    assert centre == pytest.approx((noisy - hard).mean())
    half = 1.96 * (noisy - hard).std() / math.sqrt(40)
    assert (low, high) == pytest.approx((centre - half, centre + half), abs=0.02)
    assert bootstrap_difference(hard, noisy) == (centre, low, high)  # the same again


def test_tiles_keep_a_single_bad_pixel() -> None:
    mask = square(100, 900, size=1000)
    alpha = mask.copy()
    alpha[50, 50], alpha[500, 500] = 255, 0
    tiles = make_tiles(alpha, unit(mask))
    assert tiles.mask.shape == tiles.alpha.shape == (224, 224)
    coloured = tiles.difference[(tiles.difference != 255).any(-1)]
    assert sorted(coloured.tolist()) == [[0, 0, 255], [255, 0, 0]]


def test_worst_rows_per_model(tmp_path: Path) -> None:
    alphas = [square(8 - i, 24) for i in (1, 3, 0, 2, 3)]
    worst = Worst(3, BY_KEY["mad"])
    for row in [*rows_of("a", *alphas), *rows_of("b", *alphas[:2]), Row(Pair(Path("x"), Path("y")), "b", error="no")]:
        worst.offer(row)
    assert [row.pair.name for row in worst.rows()["a"]] == ["1.png", "4.png", "3.png"]
    assert [row.pair.name for row in worst.rows()["b"]] == ["1.png", "0.png"]
    best_first = Worst(1, BY_KEY["iou"])
    for row in rows_of("a", *alphas):
        best_first.offer(row)
    assert best_first.rows()["a"][0].pair.name == "1.png"
    write_contact_sheet(tmp_path / "sheet.png", worst, [BY_KEY["mad"]])  # the pictures are gone: grey tiles
    assert len(pixels_of(tmp_path / "sheet.png")) > 5 * SIZE
    with pytest.raises(EvaluationError, match="contact sheet cannot be written"):
        write_contact_sheet(tmp_path / "gone" / "sheet.png", worst, [])


# -- the whole command


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Four pictures whose alpha, their red channel, is known, and their masks."""
    images, masks = tmp_path / "im", tmp_path / "gt"
    images.mkdir()
    masks.mkdir()
    for name, last in (("d", 28), ("a", 24), ("c", 26), ("b", 30)):
        red = square(8, last)
        Image.fromarray(np.dstack([red, red * 0, red * 0])).save(images / f"{name}.png")
        Image.fromarray(square()).save(masks / f"{name}.PNG")
    return images, masks


def table_in(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "per_image.csv").read_text().splitlines()))


def run_eval(server: EmbeddedServer, folders: tuple[Path, Path], *arguments: object, out: Path) -> Any:
    images, masks = folders
    common = ["--images", images, "--masks", masks, "--address", server.address, "--workers", 1, "-o", out]
    return command("eval", *common, *arguments)


@pytest.mark.triton
def test_what_a_run_leaves(bench_server: EmbeddedServer, folders: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    result = run_eval(bench_server, folders, "--model", "tiny", "--model", "tiny_onnx_fp32", "--worst", 2, out=out)
    assert result.exit_code == 0, result.output
    rows = table_in(out)
    assert list(rows[0]) == ["image", "mask", "model", "height", "width", *KEYS, "error"]
    assert [(row["image"], row["model"]) for row in rows] == [
        (f"{name}.png", model) for name in "abcd" for model in ("tiny", "tiny_onnx_fp32")
    ]
    for row, last in zip(rows[::2], (24, 30, 26, 28), strict=True):
        wrong = (last - 8) ** 2 - 256
        assert float(row["mae"]) == pytest.approx(wrong / 1024, rel=1e-5)
        assert float(row["sad"]) == pytest.approx(wrong / 1000, rel=1e-5)
        assert float(row["iou"]) == pytest.approx(256 / (last - 8) ** 2, rel=1e-5)
        assert (row["mask"], row["height"], row["error"]) == (f"{row['image'][0]}.PNG", "32", "")
    report = json.loads((out / "summary.json").read_text())
    assert report["pictures"] == report["pairs"] == 4
    assert report["measures"]["tiny"]["mae"] == pytest.approx((0 + 228 + 68 + 144) / 4 / 1024)
    assert {d["verdict"] for d in report["differences"]} == {"equal"}
    assert report["environment"]["tiny"]["model"]["engine_name"] == "tiny_onnx_fp32"
    sheet = pixels_of(out / "worst.png")
    assert len(np.unique(sheet.reshape(-1, 3), axis=0)) > 4
    assert (sheet == [255, 0, 0]).all(-1).any()  # too much
    assert not (sheet == [0, 0, 255]).all(-1).any()  # nowhere too little
    assert "MAE ↓" in result.stdout
    assert "tiny_onnx_fp32 against tiny" in result.stdout
    assert "4 pictures are few" in result.stdout
    assert "Environment: " in result.stdout


@pytest.mark.triton
def test_trimaps_effort_and_json(bench_server: EmbeddedServer, folders: tuple[Path, Path], tmp_path: Path) -> None:
    trimaps = tmp_path / "tri"
    trimaps.mkdir()
    levels = square()
    levels[24:26] = 128  # two rows of 32 pixels
    for name in "abcd":
        Image.fromarray(levels).save(trimaps / f"{name}.png")
    arguments = ["--model", "tiny", "--trimaps", trimaps, "--hce", "--worst", 0, "--json"]
    result = run_eval(bench_server, folders, *arguments, out=tmp_path / "out")
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout)["measures"]["tiny"]
    assert figures["sad"] == pytest.approx(sum((0, 2 * 22, 2 * 18, 2 * 20)) / 4 / 1000)
    assert "hce" in figures
    assert not (tmp_path / "out" / "worst.png").exists()


@pytest.mark.triton
def test_a_picture_that_fails_does_not_stop_the_others(
    bench_server: EmbeddedServer, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    images, masks = folders
    (images / "a.png").write_bytes(b"not a picture")
    Image.fromarray(square()[:, :31]).save(masks / "b.PNG")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.dstack([square()[:20]] * 3)).save(images / "c.png", exif=exif)  # 20 x 32, upright 32 x 20
    Image.fromarray(square()[:20]).save(masks / "c.PNG")
    result = run_eval(bench_server, folders, "--model", "tiny", out=tmp_path / "out")
    assert result.exit_code == 1
    errors = {r["image"]: r["error"] for r in table_in(tmp_path / "out")}
    assert "a.png" in errors["a.png"]
    assert "is not an image" in errors["a.png"]
    assert errors["b.png"] == (
        f"{masks / 'b.PNG'} is 32 x 31 and its picture {images / 'b.png'} is 32 x 32, height x width, upright; "
        "they must have one size"
    )
    assert "is 20 x 32 and its picture" in errors["c.png"]
    assert "turned by its EXIF orientation?" in errors["c.png"]
    assert errors["d.png"] == ""
    assert errors["b.png"] in result.stderr
    assert "1 pictures\nNote: 3 pictures failed" in result.stdout
    Image.fromarray(np.rot90(square()[:20], -1)).save(masks / "c.PNG")
    again = run_eval(bench_server, folders, "--model", "tiny", "--allow-failures", out=tmp_path / "out")
    assert again.exit_code == 0
    assert "Note: 2 pictures failed" in again.stdout


@pytest.mark.triton
def test_what_ends_a_run_before_it_begins(
    bench_server: EmbeddedServer, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    result = run_eval(bench_server, folders, "--model", "nobody", out=out)
    assert result.exit_code == 1
    assert "'nobody': not loaded" in result.stderr
    result = run_eval(bench_server, folders, "--model", "tiny", "--model", "tiny", out=out)
    assert result.exit_code == 2
    assert "names a model twice" in result.stderr
    (folders[1] / "b.PNG").unlink()
    result = run_eval(bench_server, folders, "--model", "tiny", out=out)
    assert result.exit_code == 1
    assert f"--masks {folders[1]} has no file for b; add them, or" in result.stderr
    assert not out.exists()
    result = run_eval(bench_server, folders, "--model", "tiny", "--allow-missing", out=out)
    assert result.exit_code == 0, result.output
    assert "left out: --masks" in result.stderr
    assert "3 pictures" in result.stdout
    (tmp_path / "file").touch()
    result = run_eval(bench_server, folders, "--model", "tiny", "--allow-missing", out=tmp_path / "file" / "out")
    assert result.exit_code == 1
    assert "name another folder with -o" in result.stderr


def test_no_server(folders: tuple[Path, Path], tmp_path: Path) -> None:
    images, masks = folders
    options = ["--images", images, "--masks", masks, "--model", "tiny", "-o", tmp_path / "out"]
    result = command("eval", *options, "--address", "127.0.0.1:1")
    assert result.exit_code == 1
    assert "127.0.0.1:1" in result.stderr
    assert not (tmp_path / "out").exists()
    assert command("eval", *options, "--address", "nowhere").exit_code == 2


@pytest.mark.triton
def test_interrupting_keeps_what_was_done(bench_server: EmbeddedServer, tmp_path: Path) -> None:
    images, masks, out = tmp_path / "im", tmp_path / "gt", tmp_path / "out"
    images.mkdir()
    masks.mkdir()
    for number in range(200):
        Image.fromarray(np.dstack([square()] * 3)).save(images / f"{number:03}.png")
        Image.fromarray(square()).save(masks / f"{number:03}.png")
    process = subprocess.Popen(
        [sys.executable, "-m", "matteserve_client._cli", "eval", "--images", images, "--masks", masks, "-o", out,
         "--model", "slow", "--address", bench_server.address, "--workers", "1"],
        stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    table = out / "per_image.csv"
    deadline = time.monotonic() + 60
    while not (table.exists() and len(table.read_text().splitlines()) > 2) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does it: to all processes of the command
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    rows = table_in(out)
    report = json.loads((out / "summary.json").read_text())
    assert report["interrupted"]
    assert 2 <= report["pictures"] == len(rows) < 200
    assert [row["image"] for row in rows] == [f"{number:03}.png" for number in range(len(rows))]
    assert f"interrupted after {len(rows)} of 200 pictures" in stderr
    assert f"{len(rows)} pictures" in stdout


@pytest.mark.triton
def test_interrupting_before_the_first_picture(
    bench_server: EmbeddedServer, folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped = threading.Event()
    stopped.set()
    monkeypatch.setattr(cli_eval, "stop_on_signals", lambda: contextlib.nullcontext(stopped))
    result = run_eval(bench_server, folders, "--model", "tiny", out=tmp_path / "out")
    assert result.exit_code == 130
    assert "interrupted before the first picture was scored" in result.stderr


@pytest.mark.triton
def test_a_killed_worker_is_reported(bench_server: EmbeddedServer, folders: tuple[Path, Path]) -> None:
    pairs = find_pairs(*folders).pairs * 4
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    with Client(bench_server.address) as client:
        rows = evaluate(client, pairs, ["slow"], in_flight=1, workers=1)
        assert next(rows).error is None
        mine = [child for child in psutil.Process().children(recursive=True) if child.pid not in before]
        workers = [child for child in mine if not child.children() and "forkserver" in " ".join(child.cmdline())]
        assert workers
        for worker in workers:
            worker.kill()
        with pytest.raises(EvaluationError, match="use fewer than 1 with --workers"):
            list(rows)
