"""`matteserve serve`, `demo` and `install-triton` as a person runs them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from matteserve_client import Client
from matteserve_server.demo import checkerboard_preview
from support.tiny_model import SIZE, write_repository

COMMAND = [sys.executable, "-m", "matteserve_client._cli"]


def run(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [*COMMAND, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, timeout=120)


@contextmanager
def serving(repository: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A running `matteserve serve` and the line that it printed when ready."""
    command = [*COMMAND, "serve", "--model-repository", str(repository), "--grpc-port", "0", "--metrics-port", "0"]
    with subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process, process.stdout.readline()
        finally:
            process.kill()


def address_in(line: str) -> str:
    found = re.search(r"gRPC on (\S+:\d+)", line)
    assert found, line
    return found[1]


def owned_regions(pid: int) -> list[str]:
    return [name for name in os.listdir("/dev/shm") if name.startswith(f"matteserve_{pid}_")]


def triton_of(pid: int) -> int:
    """Process id of the tritonserver that a `matteserve serve` started."""
    (child,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(child)


def gone(pid: int, timeout_s: float = 15.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            if "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text():
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.05)
    return False


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    return write_repository(tmp_path / "repository")


@pytest.mark.triton
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_serve_says_one_line_answers_and_ends_cleanly(repository: Path, number: signal.Signals) -> None:
    with serving(repository, "--threads", "1") as (process, line):
        assert re.fullmatch(
            rf"matteserve is ready: gRPC on 127\.0\.0\.1:\d+, metrics on port \d+; tiny \(onnx fp32, {SIZE}x{SIZE}\)\n",
            line,
        )
        with Client(address_in(line)) as client:
            assert client.alpha(np.full((SIZE, SIZE, 3), 255, np.uint8)).min() == 1.0
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
        assert process.returncode == 0
        assert out == ""
        assert "requests in flight may finish" in err
        assert owned_regions(process.pid) == []


@pytest.mark.triton
def test_killed_serve_takes_triton_with_it_and_the_next_start_cleans_up(repository: Path) -> None:
    with serving(repository) as (process, _line):
        triton = triton_of(process.pid)
        assert owned_regions(process.pid)
        process.kill()
        process.wait()
        assert gone(triton), "an orphaned tritonserver would keep port and memory"
    with serving(repository) as (second, _line):
        assert owned_regions(process.pid) == []
        second.terminate()
        assert second.wait(timeout=30) == 0


@pytest.mark.triton
def test_serve_ends_with_an_error_when_triton_dies(repository: Path) -> None:
    with serving(repository) as (process, _line):
        os.kill(triton_of(process.pid), signal.SIGKILL)
        _out, err = process.communicate(timeout=30)
        assert process.returncode == 1
        assert "Error: tritonserver ended by itself with exit code -9" in err
        assert owned_regions(process.pid) == []


@pytest.mark.triton
def test_serve_reports_a_taken_port(repository: Path) -> None:
    with serving(repository) as (process, line):
        port = address_in(line).partition(":")[2]
        result = run("serve", "--model-repository", repository, "--grpc-port", port, "--metrics-port", "0")
        assert result.returncode == 1
        assert f"Error: cannot listen on 127.0.0.1:{port}: Address already in use" in result.stderr
        process.terminate()
        process.wait(timeout=30)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--model-repository", "missing"], 1, "Error: model repository missing is not a directory"),
        (["--model-repository", "repository", "--model", "u3net"], 1, "Error: no model 'u3net' in repository"),
        (["--model-repository", "repository", "--grpc-port", "70000"], 2, "grpc_port is 70000"),
        (["--model-repository", "repository", "--tritonserver", "x"], 1, "Error: x is not an executable file"),
        (["--threads", "0"], 2, "0 is not in the range x>=1"),
    ],
)
def test_serve_explains_what_is_wrong(
    repository: Path, tmp_path: Path, arguments: list[str], code: int, message: str
) -> None:
    result = run("serve", *arguments, cwd=tmp_path)
    assert result.returncode == code
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize("command", ["serve", "demo", "install-triton"])
def test_help_has_an_example(command: str) -> None:
    result = run(command, "--help")
    assert result.returncode == 0
    assert re.search(rf"Examples?:\n  +matteserve {command}", result.stdout)


@pytest.mark.triton
def test_demo_writes_three_pictures_and_says_where_the_time_went(tmp_path: Path) -> None:
    result = run("demo", "--json", "-o", tmp_path)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    pictures = {}
    for kind, path in report["files"].items():
        with Image.open(path) as picture:
            pictures[kind] = picture.copy()
    width, height = pictures["alpha"].size
    assert (pictures["cutout"].mode, pictures["cutout"].size) == ("RGBA", (width, height))
    assert pictures["preview"].size == (3 * width, height)
    low, high = pictures["cutout"].getchannel("A").getextrema()
    assert low <= 5, "a cut-out has a background"
    assert high >= 250, "and an object"
    stages = ["decode", "preprocess", "grpc", "queue", "infer", "postprocess", "encode"]
    assert list(report["timings_ms"]) == stages
    assert all(value >= 0 for value in report["timings_ms"].values())


@pytest.mark.triton
def test_demo_refuses_a_file_that_is_no_picture(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no pixels")
    result = run("demo", tmp_path / "notes.txt", "-o", tmp_path / "out")
    assert result.returncode == 1
    assert "notes.txt': is not an image" in result.stderr
    assert not (tmp_path / "out").exists()


def test_preview_shows_the_board_only_where_alpha_is_low() -> None:
    cutout = Image.new("RGBA", (64, 32), (10, 20, 30, 255))
    cutout.putalpha(Image.linear_gradient("L").resize((64, 32)).point(lambda v: 255 if v > 127 else 0))
    preview = np.asarray(checkerboard_preview(cutout))
    assert preview.shape == (32, 192, 3)
    solid = np.asarray(cutout)[..., 3] == 255
    np.testing.assert_array_equal(preview[:, :64], np.asarray(cutout)[..., :3])
    assert (preview[:, 128:][solid] == (10, 20, 30)).all()
    assert set(np.unique(preview[:, 128:][~solid])) == {204, 255}
