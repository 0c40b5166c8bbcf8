"""The `matteserve` command: remove and models against a real gRPC server, help and missing extras without one."""

from __future__ import annotations

import importlib.util
import inspect
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import grpc
import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image, ImageCms

from matteserve_client import __version__
from matteserve_client import _cli as cli_module
from matteserve_client._cli import cli

# click < 8.2 mixes both streams unless told; later versions never do, and do not take the argument.
_SEPARATE = {"mix_stderr": False} if "mix_stderr" in inspect.signature(CliRunner).parameters else {}
RUNNER = CliRunner(**_SEPARATE)
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
PHOTO = np.random.default_rng(2).integers(0, 256, (24, 32, 3), np.uint8)  # the model's size: alpha is its green


@pytest.fixture
def run(grpc_server: Any) -> Any:
    def run(command: str, *arguments: Any, **options: Any) -> Result:
        return RUNNER.invoke(cli, [command, *map(str, arguments), "--address", grpc_server.address], **options)

    return run


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    Image.fromarray(PHOTO).save(path, icc_profile=SRGB)
    return path


def png_bytes() -> bytes:
    stream = io.BytesIO()
    Image.fromarray(PHOTO).save(stream, "PNG")
    return stream.getvalue()


def pixels(path: Path | bytes) -> Any:
    with Image.open(io.BytesIO(path) if isinstance(path, bytes) else path) as image:
        return np.asarray(image)


CUTOUT = np.dstack([PHOTO, PHOTO[..., 1]])


def test_default_output_is_beside_the_input(run: Any, photo: Path) -> None:
    result = run("remove", photo)
    assert result.exit_code == 0, result.output
    output = photo.with_name("photo.cutout.png")
    assert result.stdout == f"{output}\n"
    np.testing.assert_array_equal(pixels(output), CUTOUT)
    assert sorted(path.name for path in photo.parent.iterdir()) == ["photo.cutout.png", "photo.png"]


@pytest.mark.parametrize("suffix", [".png", ".webp", ".tif", ".TIFF"])
def test_output_format_by_suffix(run: Any, photo: Path, suffix: str) -> None:
    output = photo.parent / "new" / f"out{suffix}"
    result = run("remove", photo, "-o", output)
    assert result.exit_code == 0, result.output
    np.testing.assert_array_equal(pixels(output), CUTOUT)  # lossless, also under transparency
    with Image.open(output) as image:
        assert image.info["icc_profile"] == SRGB


@pytest.mark.parametrize("suffix", [".png", ".webp", ".tif"])
def test_clear_transparent(run: Any, photo: Path, suffix: str) -> None:
    holes = PHOTO.copy()
    holes[5:15, 5:15, 1] = 0  # the model of these tests takes green for alpha
    Image.fromarray(holes).save(photo)
    output = photo.with_name(f"out{suffix}")
    assert run("remove", photo, "-o", output, "--clear-transparent").exit_code == 0
    expected = np.dstack([holes, holes[..., 1]])
    expected[holes[..., 1] == 0] = 0
    np.testing.assert_array_equal(pixels(output), expected)


def test_a_picture_too_large_for_its_format(run: Any, tmp_path: Path) -> None:
    wide = tmp_path / "wide.png"
    Image.new("RGB", (16_384, 2)).save(wide)
    result = run("remove", wide, "-o", tmp_path / "wide.webp")
    assert result.exit_code == 1
    assert f"{wide}: cannot write {tmp_path / 'wide.webp'}: encoding error" in result.stderr
    assert not (tmp_path / "wide.webp").exists()


def test_jpeg_needs_a_background(run: Any, photo: Path) -> None:
    output = photo.with_name("flat.jpg")
    result = run("remove", photo, "-o", output)
    assert result.exit_code == 2
    assert "JPEG has no transparency; use .png or .webp, or give --background a colour" in result.stderr
    assert run("remove", photo, "-o", output, "--background", "white").exit_code == 0
    with Image.open(output) as image:
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (32, 24))
        assert image.info["icc_profile"] == SRGB


def test_background_composites_straight_alpha(run: Any, photo: Path) -> None:
    output = photo.with_name("flat.png")
    assert run("remove", photo, "-o", output, "--background", "#ff0080").exit_code == 0
    alpha = CUTOUT[..., 3:].astype(float) / 255
    expected = PHOTO * alpha + np.array([255, 0, 128]) * (1 - alpha)
    assert np.abs(pixels(output).astype(float) - expected).max() <= 1


def test_alpha_only(run: Any, photo: Path) -> None:
    assert run("remove", photo, "--alpha-only").exit_code == 0
    output = photo.with_name("photo.alpha.png")
    np.testing.assert_array_equal(pixels(output), PHOTO[..., 1])
    with Image.open(output) as image:
        assert image.mode == "L"
        assert "icc_profile" not in image.info


def test_standard_input_to_standard_output(run: Any) -> None:
    result = run("remove", "-", input=png_bytes())
    assert result.exit_code == 0, result.stderr
    np.testing.assert_array_equal(pixels(result.stdout_bytes), CUTOUT)


def test_file_to_standard_output_and_back(run: Any, photo: Path, tmp_path: Path) -> None:
    np.testing.assert_array_equal(pixels(run("remove", photo, "-o", "-").stdout_bytes), CUTOUT)
    assert run("remove", "-", "-o", tmp_path / "x.png", input=png_bytes()).exit_code == 0
    np.testing.assert_array_equal(pixels(tmp_path / "x.png"), CUTOUT)


def test_folder_with_a_bad_file(run: Any, tmp_path: Path) -> None:
    shop = tmp_path / "shop"
    shop.mkdir()
    for index in range(5):
        Image.fromarray(PHOTO + index).save(shop / f"{index}.png")
    (shop / "2.png").write_bytes(b"not a picture at all")
    (shop / "notes.txt").write_text("skipped")
    (shop / ".hidden.png").write_bytes(b"")
    result = run("remove", shop, "-o", tmp_path / "out")
    assert result.exit_code == 1
    assert "Error: 1 of 5 pictures failed:" in result.stderr
    assert f"'{shop / '2.png'}': is not an image" in result.stderr
    assert "Cutting out" in result.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["0.png", "1.png", "3.png", "4.png"]
    assert result.stdout.splitlines() == [str(tmp_path / "out" / f"{index}.png") for index in (0, 1, 3, 4)]
    np.testing.assert_array_equal(pixels(tmp_path / "out" / "4.png")[..., :3], PHOTO + 4)


def test_json(run: Any, photo: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.png"
    bad.touch()
    result = run("remove", photo, bad, "-o", tmp_path / "out", "--json")
    assert result.exit_code == 1
    good_row, bad_row = json.loads(result.stdout)
    output = str(tmp_path / "out" / "photo.png")
    assert good_row == {"input": str(photo), "output": output, "height": 24, "width": 32, "error": None}
    assert bad_row["output"] is None
    assert bad_row["error"] == f"{str(bad)!r}: is empty (0 bytes)"


def test_an_input_is_never_overwritten(run: Any, photo: Path) -> None:
    before = photo.read_bytes()
    for output in (photo, photo.parent / "." / "photo.png", f"{photo.parent}/"):
        result = run("remove", photo, "-o", output)
        assert result.exit_code == 1
        assert "is an input, or the output of another; give another -o" in result.stderr
    assert photo.read_bytes() == before


def test_two_inputs_with_one_output(run: Any, photo: Path, tmp_path: Path) -> None:
    twin = tmp_path / "photo.bmp"
    Image.fromarray(PHOTO).save(twin)
    result = run("remove", photo, twin, "-o", tmp_path / "out")
    assert result.exit_code == 1
    assert f"{twin}: {tmp_path / 'out' / 'photo.png'} is an input, or the output of another" in result.stderr
    assert (tmp_path / "out" / "photo.png").exists()


def test_an_old_output_survives_a_failure(
    run: Any, photo: Path, grpc_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = photo.with_name("photo.cutout.png")
    output.write_bytes(b"old")
    grpc_server.servicer.status = (grpc.StatusCode.INTERNAL, "boom")
    assert run("remove", photo).exit_code == 1
    grpc_server.servicer.status = None

    def disk_full(self: Path, data: Any) -> int:
        self.touch()
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", disk_full)
        result = run("remove", photo)
    assert result.exit_code == 1
    assert f"Error: {photo}: cannot write {output}: No space left on device" in result.stderr
    assert output.read_bytes() == b"old"
    assert sorted(path.name for path in photo.parent.iterdir()) == ["photo.cutout.png", "photo.png"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["p.png", "-o", "out.gif"], "out.gif: the suffix must be one of .png .webp .tif .tiff .jpg .jpeg"),
        (["p.png", "-o", "out"], "out: the suffix must be one of"),
        (["p.png", "--background", "nocolour"], "'nocolour' is not a colour; e.g. white"),
        (["p.png", "--background", "red", "--alpha-only"], "--alpha-only and --background exclude each other"),
        (["p.png", "q.png"], "several inputs, or a folder, need a folder as -o"),
        (["."], "several inputs, or a folder, need a folder as -o"),
        (["p.png", "q.png", "-o", "-"], "several pictures do not fit on standard output"),
        (["p.png", "q.png", "-o", "p.png"], "several inputs need a folder as -o, p.png is a file"),
        (["p.png", "q.png", "-o", "new.png"], "new.png looks like a file; add a / if not"),
        (["-", "-", "-o", "out/"], "standard input can be read once only"),
        (["-", "--json"], "standard output takes either the picture or --json"),
        (["empty", "-o", "out"], "no pictures in empty; looked for .bmp .gif"),
        (["p.png", "--timeout-s", "0"], "0.0 is not in the range x>0"),
        ([], "Missing argument 'INPUT...'"),
    ],
)
def test_wrong_usage(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for name in ("p.png", "q.png"):
        Image.fromarray(PHOTO).save(name)
    result = run("remove", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "p.png", "q.png"]


def test_wrong_address(photo: Path) -> None:
    for arguments in (["remove", str(photo)], ["models"]):
        result = RUNNER.invoke(cli, [*arguments, "--address", "http://localhost:8001"])
        assert result.exit_code == 2
        assert "gRPC takes host:port without a scheme" in result.stderr


def test_server_down_is_one_line(photo: Path) -> None:
    for arguments in (["remove", str(photo)], ["models"]):
        result = RUNNER.invoke(cli, [*arguments, "--address", "127.0.0.1:1"])
        assert result.exit_code == 1
        assert result.stderr.startswith("Error: ")
        assert "127.0.0.1:1" in result.stderr
        assert "cannot reach the server" in result.stderr
        assert "Traceback" not in result.output
        assert isinstance(result.exception, SystemExit)


def test_model_and_parity_reach_the_client(run: Any, photo: Path, grpc_server: Any) -> None:
    assert "model 'other': not loaded" in run("remove", photo, "--model", "other").stderr
    Image.fromarray(PHOTO // 2).save(photo)
    assert run("remove", photo, "--model", "demo", "--parity", "rembg").exit_code == 0
    sent = np.frombuffer(grpc_server.servicer.requests[-1].raw_input_contents[0], np.uint8)
    assert sent.max() == 255


# -- models


def test_models_table(run: Any, grpc_server: Any) -> None:
    grpc_server.servicer.index += [("broken", "1", "UNAVAILABLE", "no such file"), ("idle", "", "", "")]
    result = run("models")
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.stdout.splitlines()]
    assert lines[0] == ["MODEL", "STATE", "INPUT", "ENGINE", "PRECISION", "WEIGHTS", "LICENCE"]
    assert lines[1] == ["broken", "not", "ready", "-", "-", "-", "-", "-"]
    assert lines[2] == ["demo", "ready", "24x32", "onnx", "fp32", "demo", "unknown"]
    assert result.stderr == "broken: no such file\n"


def test_models_json(run: Any, grpc_server: Any) -> None:
    from tritonclient.grpc import model_config_pb2

    grpc_server.servicer.configs["resnet"] = model_config_pb2.ModelConfig(name="resnet")
    grpc_server.servicer.index += [("idle", "", "", ""), ("resnet", "1", "READY", "")]
    demo, idle, resnet = json.loads(run("models", "--json").stdout)
    assert (demo["name"], demo["ready"], demo["contract"]["height"], demo["contract"]["engine"]) == (
        "demo",
        True,
        24,
        "onnx",
    )
    assert idle == {"name": "idle", "ready": False, "reason": "", "contract": None}
    assert (resnet["ready"], resnet["contract"]) == (True, None)
    assert "the wire format is" in resnet["reason"]


def test_no_models(run: Any, grpc_server: Any) -> None:
    grpc_server.servicer.index = []
    result = run("models")
    assert (result.exit_code, result.stdout) == (0, "")
    assert "has no models" in result.stderr


# -- the group


def test_help_lists_everything_and_imports_nothing() -> None:
    result = RUNNER.invoke(cli, ["--help"])
    assert result.exit_code == 0
    commands = (
        "remove",
        "models",
        "serve",
        "demo",
        "install-triton",
        "export",
        "pull",
        "weights",
        "bench",
        "tune",
        "eval",
    )
    for name in commands:
        assert f"\n  {name} " in result.output
    assert RUNNER.invoke(cli, ["--version"]).output == f"matteserve, version {__version__}\n"


@pytest.mark.parametrize("command", ["remove", "models"])
def test_every_help_has_an_example(command: str) -> None:
    result = RUNNER.invoke(cli, [command, "--help"])
    assert result.exit_code == 0
    assert f"Examples:\n    matteserve {command}" in result.output


def test_help_marks_missing_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else object())
    output = " ".join(RUNNER.invoke(cli, ["--help"]).output.split())
    assert "Turn weights into a served model. (needs matteserve[export])" in output
    assert "(needs matteserve[server])" not in output


def entry(monkeypatch: pytest.MonkeyPatch, target: str, extra: str) -> None:
    monkeypatch.setitem(cli_module._ENTRIES, "trial", cli_module._Entry(target, "Try.", extra, ()))


def test_missing_extra_at_import(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "trial_module.py").write_text("import surely_not_installed")
    monkeypatch.syspath_prepend(tmp_path)
    entry(monkeypatch, "trial_module:command", "export")
    result = RUNNER.invoke(cli, ["trial"])
    assert result.exit_code == 1
    assert result.stderr == (
        "Error: `matteserve trial` needs the extra [export], module 'surely_not_installed' is not installed: "
        "pip install 'matteserve[export]'\n"
    )


@pytest.mark.parametrize(
    ("module", "extra", "message"),
    [
        ("surely_not.installed", "gpu", "needs the extra [gpu], module 'surely_not' is not installed"),
        ("matteserve_nothing", "", "is not part of this installation (matteserve_nothing is missing)"),
    ],
)
def test_missing_module_while_running(monkeypatch: pytest.MonkeyPatch, module: str, extra: str, message: str) -> None:
    @click.command()
    def trial() -> None:
        importlib.import_module(module)

    monkeypatch.setattr(cli_module, "trial", trial, raising=False)
    entry(monkeypatch, "matteserve_client._cli:trial", extra)
    result = RUNNER.invoke(cli, ["trial"])
    assert result.exit_code == 1
    assert message in result.stderr


def test_missing_module_without_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    entry(monkeypatch, "surely_not_installed:command", "")
    result = RUNNER.invoke(cli, ["trial"])
    assert result.stderr == (
        "Error: `matteserve trial` needs the module 'surely_not_installed', which is not installed\n"
    )


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    @click.command()
    def trial() -> None:
        importlib.import_module("surely_not_installed")

    monkeypatch.setattr(cli_module, "trial", trial, raising=False)
    entry(monkeypatch, "matteserve_client._cli:trial", "")
    assert isinstance(RUNNER.invoke(cli, ["trial"]).exception, ModuleNotFoundError)


def test_unknown_command() -> None:
    result = RUNNER.invoke(cli, ["remvoe"])
    assert result.exit_code == 2
    assert "No such command 'remvoe'" in result.stderr


def test_the_module_runs(photo: Path, grpc_server: Any) -> None:
    command = [sys.executable, "-m", "matteserve_client._cli", "remove", str(photo), "--address", grpc_server.address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == f"{photo.with_name('photo.cutout.png')}\n"
    assert done.stderr == ""
