"""Downloads against a real HTTP server on this machine: interruptions, restarts, wrong files, no network."""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import http.server
import random
import resource
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from matteserve_export import DownloadError, ExportError
from matteserve_export.pull import PullConfig, cache_directory, find_cached, pull
from matteserve_export.weights import Source, Weights, find_weights

CONTENT = random.Random(0).randbytes(1_500_000)
CONFIG = PullConfig(timeout_s=5, attempts=3, backoff_s=0.0, schemes=("http",))


@dataclass
class Publisher:
    """What the server does, and what it was asked."""

    content: bytes = CONTENT
    etag: str = '"one"'
    ranges: bool = True
    status: int = 200
    redirect: str = ""
    announced: str = ""  # X-Linked-ETag with a redirect from /resolve/… to the file
    announce: bool = True
    claims_bytes: int | None = None
    cut_after: list[int] = field(default_factory=list)  # bytes of the body per request; then the connection closes
    asked: list[str] = field(default_factory=list)
    address: str = ""


@pytest.fixture
def publisher() -> Iterator[Publisher]:
    state = Publisher()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            if self.path.startswith("/resolve/"):
                self.send_response(302)
                self.send_header("Location", "/u2netp.onnx")
                self.send_header("X-Linked-ETag", state.announced)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            start = self._start()
            state.asked.append(self.headers.get("Range", ""))
            if state.redirect:
                self.send_response(302)
                self.send_header("Location", state.redirect)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            if state.status != 200:
                self.send_error(state.status)
                return
            if start and start >= len(state.content):
                self.send_error(416)
                return
            body = state.content[start:]
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(state.content) - 1}/{len(state.content)}")
            if state.etag:
                self.send_header("ETag", state.etag)
            if state.announce:
                self.send_header("Content-Length", str(state.claims_bytes or len(body)))
            self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(body[: state.cut_after.pop(0)] if state.cut_after else body)
            self.close_connection = True

        def _start(self) -> int:
            wanted = self.headers.get("Range", "")
            if not state.ranges or not wanted or self.headers.get("If-Range", state.etag) != state.etag:
                return 0
            return int(wanted.removeprefix("bytes=").rstrip("-"))

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        state.address = f"http://127.0.0.1:{server.server_port}/u2netp.onnx"
        yield state
        server.shutdown()
        thread.join()


@pytest.fixture
def weights(publisher: Publisher) -> Weights:
    return _weights(publisher.address)


def _weights(address: str | None, **changes: object) -> Weights:
    source = Source(
        "onnx",
        "u2netp.onnx",
        "https://example.org/page",
        address,
        size_bytes=len(CONTENT),
        md5=hashlib.md5(CONTENT).hexdigest(),
        sha256=hashlib.sha256(CONTENT).hexdigest(),
    )
    return dataclasses.replace(find_weights("u2netp"), sources=(dataclasses.replace(source, **changes),))


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_plain_download(weights: Weights, tmp_path: Path) -> None:
    seen: list[tuple[int, int | None]] = []
    source, path = pull(weights, tmp_path / "new" / "folder", lambda *step: seen.append(step), CONFIG)
    assert path.read_bytes() == CONTENT
    assert source is weights.sources[0]
    assert _names(path.parent) == ["u2netp.onnx"]
    assert seen[0] == (0, len(CONTENT))
    assert seen[-1] == (len(CONTENT), len(CONTENT))
    assert seen == sorted(seen)


def test_what_is_there_is_not_fetched_again(weights: Weights, publisher: Publisher, tmp_path: Path) -> None:
    pull(weights, tmp_path, config=CONFIG)
    pull(weights, tmp_path, config=CONFIG)
    assert len(publisher.asked) == 1


def test_an_interruption_is_continued_by_itself(weights: Weights, publisher: Publisher, tmp_path: Path) -> None:
    publisher.cut_after = [400_000, 300_000]
    _, path = pull(weights, tmp_path, config=CONFIG)
    assert path.read_bytes() == CONTENT
    assert publisher.asked == ["", "bytes=400000-", "bytes=700000-"]


def test_an_interruption_is_continued_by_the_next_call(weights: Weights, publisher: Publisher, tmp_path: Path) -> None:
    publisher.cut_after = [100_000, 100_000, 100_000]
    with pytest.raises(DownloadError, match="closed after 300000 of 1500000 bytes; 300000 bytes are kept, pull again"):
        pull(weights, tmp_path, config=CONFIG)
    assert _names(tmp_path) == ["u2netp.onnx.part", "u2netp.onnx.part.etag"]
    _, path = pull(weights, tmp_path, config=CONFIG)
    assert path.read_bytes() == CONTENT
    assert publisher.asked[-1] == "bytes=300000-"
    assert _names(tmp_path) == ["u2netp.onnx"]


@pytest.mark.parametrize("change", [{"ranges": False}, {"etag": '"two"'}], ids=["no ranges", "changed meanwhile"])
def test_a_server_that_cannot_continue_starts_again(
    weights: Weights, publisher: Publisher, tmp_path: Path, change: dict[str, object]
) -> None:
    publisher.cut_after = [400_000]
    with pytest.raises(DownloadError):
        pull(weights, tmp_path, config=dataclasses.replace(CONFIG, attempts=1))
    for name, value in change.items():
        setattr(publisher, name, value)
    _, path = pull(weights, tmp_path, config=CONFIG)
    assert path.read_bytes() == CONTENT
    assert publisher.asked == ["", "bytes=400000-"]


@pytest.mark.parametrize("etag", ["", 'W/"weak"'])
def test_without_a_strong_etag_the_digest_vouches(publisher: Publisher, tmp_path: Path, etag: str) -> None:
    publisher.etag, publisher.cut_after = etag, [400_000]
    _, path = pull(_weights(publisher.address), tmp_path, config=CONFIG)
    assert path.read_bytes() == CONTENT
    assert publisher.asked == ["", "bytes=400000-"]


def test_without_etag_and_digest_nothing_is_continued(
    publisher: Publisher, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    publisher.etag, publisher.cut_after = "", [400_000]
    _, path = pull(_weights(publisher.address, md5=None, sha256=None), tmp_path, config=CONFIG)
    assert path.read_bytes() == CONTENT
    assert publisher.asked == ["", ""]
    assert "no digest is known" in caplog.text


@pytest.mark.parametrize("quotes", ["", '"'])
def test_a_digest_that_the_server_announces_is_checked(publisher: Publisher, tmp_path: Path, quotes: str) -> None:
    """As Hugging Face does it: the digest comes with the redirect, the file from elsewhere."""
    sha256 = hashlib.sha256(CONTENT).hexdigest()
    publisher.announced, publisher.cut_after = quotes + sha256 + quotes, [400_000]
    unknown = _weights(publisher.address.replace("/u2netp", "/resolve/u2netp"), md5=None, sha256=None, size_bytes=None)
    source, path = pull(unknown, tmp_path / "good", config=CONFIG)
    assert path.read_bytes() == CONTENT
    assert source.sha256 == sha256
    assert publisher.asked == ["", "bytes=400000-"]
    publisher.content = CONTENT[:-1] + b"!"
    with pytest.raises(DownloadError, match=f"expected is {sha256}; it was removed"):
        pull(unknown, tmp_path / "bad", config=CONFIG)
    assert _names(tmp_path / "bad") == []


def test_an_announced_digest_never_replaces_a_known_one(publisher: Publisher, tmp_path: Path) -> None:
    publisher.announced = hashlib.sha256(b"another").hexdigest()
    _, path = pull(_weights(publisher.address.replace("/u2netp", "/resolve/u2netp")), tmp_path, config=CONFIG)
    assert path.read_bytes() == CONTENT


def test_the_kind_can_be_chosen(publisher: Publisher, tmp_path: Path) -> None:
    onnx = _weights(publisher.address).sources[0]
    checkpoint = dataclasses.replace(onnx, kind="checkpoint", file_name="w.safetensors", address="http://127.0.0.1:1/")
    weights = dataclasses.replace(find_weights("u2netp"), sources=(checkpoint, onnx))
    source, path = pull(weights, tmp_path, config=CONFIG, kind="onnx")
    assert (source.kind, path.name) == ("onnx", "u2netp.onnx")
    with pytest.raises(DownloadError, match="u2netp as checkpoint has no stable download address"):
        pull(_weights(publisher.address), tmp_path, config=CONFIG, kind="checkpoint")


def test_non_commercial_weights_are_refused_before_a_byte_is_asked_for(publisher: Publisher, tmp_path: Path) -> None:
    weights = dataclasses.replace(_weights(publisher.address), non_commercial=True, weights_licence="CC-BY-NC-4.0")
    with pytest.raises(ExportError, match="--accept-non-commercial"):
        pull(weights, tmp_path, config=CONFIG)
    assert publisher.asked == []
    pull(weights, tmp_path, config=dataclasses.replace(CONFIG, accept_non_commercial=True))


def test_a_complete_part_is_only_checked(weights: Weights, publisher: Publisher, tmp_path: Path) -> None:
    (tmp_path / "u2netp.onnx.part").write_bytes(CONTENT)
    _, path = pull(weights, tmp_path, config=CONFIG)
    assert path.read_bytes() == CONTENT
    assert publisher.asked == []


def test_a_part_that_is_too_long_starts_again(weights: Weights, tmp_path: Path) -> None:
    (tmp_path / "u2netp.onnx.part").write_bytes(CONTENT + b"more")
    assert pull(weights, tmp_path, config=CONFIG)[1].read_bytes() == CONTENT


def test_a_part_beyond_a_file_of_unknown_size_starts_again(publisher: Publisher, tmp_path: Path) -> None:
    (tmp_path / "u2netp.onnx.part").write_bytes(CONTENT + b"more")
    _, path = pull(_weights(publisher.address, size_bytes=None), tmp_path, config=CONFIG)
    assert path.read_bytes() == CONTENT
    assert publisher.asked == [f"bytes={len(CONTENT) + 4}-", ""]


@pytest.mark.parametrize("algorithm", ["md5", "sha256"])
def test_a_wrong_digest(publisher: Publisher, tmp_path: Path, algorithm: str) -> None:
    publisher.content = CONTENT[:-1] + b"!"
    other = {"md5": "sha256", "sha256": "md5"}[algorithm]
    wrong = _weights(publisher.address, **{other: None})
    found = hashlib.new(algorithm, publisher.content).hexdigest()
    expected = hashlib.new(algorithm, CONTENT).hexdigest()
    with pytest.raises(DownloadError, match=f"has the {algorithm} {found}, expected is {expected}; it was removed"):
        pull(wrong, tmp_path, config=CONFIG)
    assert _names(tmp_path) == []


def test_a_damaged_part_is_noticed_and_removed(weights: Weights, publisher: Publisher, tmp_path: Path) -> None:
    (tmp_path / "u2netp.onnx.part").write_bytes(b"x" * 1000)
    with pytest.raises(DownloadError, match="has the sha256"):
        pull(weights, tmp_path, config=CONFIG)
    assert _names(tmp_path) == []
    assert pull(weights, tmp_path, config=CONFIG)[1].read_bytes() == CONTENT


def test_another_size_is_refused_before_the_transfer(weights: Weights, publisher: Publisher, tmp_path: Path) -> None:
    publisher.content = CONTENT + b"more"
    with pytest.raises(DownloadError, match="the server offers 1500004 bytes, expected are 1500000"):
        pull(weights, tmp_path, config=CONFIG)


def test_a_cut_that_nobody_announces_is_noticed_by_its_size(publisher: Publisher, tmp_path: Path) -> None:
    publisher.announce, publisher.cut_after = False, [1000] * 3
    with pytest.raises(DownloadError, match="closed after 3000 of 1500000 bytes"):
        pull(_weights(publisher.address), tmp_path, config=CONFIG)


@pytest.mark.parametrize(("status", "requests"), [(404, 1), (403, 1), (500, 3), (503, 3), (429, 3)])
def test_http_errors(weights: Weights, publisher: Publisher, tmp_path: Path, status: int, requests: int) -> None:
    publisher.status = status
    with pytest.raises(DownloadError, match=f"the server answered {status} .*By hand") as caught:
        pull(weights, tmp_path, config=CONFIG)
    assert "--onnx u2netp.onnx" in str(caught.value)
    assert len(publisher.asked) == requests
    assert _names(tmp_path) == []


def test_connection_refused(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, not listening
        address = f"http://127.0.0.1:{taken.getsockname()[1]}/u2netp.onnx"
        with pytest.raises(DownloadError) as caught:
            pull(_weights(address), tmp_path, config=CONFIG)
    message = str(caught.value)
    assert "cannot connect" in message
    assert f"get u2netp.onnx from {address} and put it at {tmp_path / 'u2netp.onnx'}" in message
    assert "matteserve export u2netp --onnx u2netp.onnx" in message
    assert _names(tmp_path) == []


def test_a_server_that_hangs(tmp_path: Path) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        address = f"http://127.0.0.1:{silent.getsockname()[1]}/u2netp.onnx"
        with pytest.raises(DownloadError, match="timed out"):
            pull(_weights(address), tmp_path, config=dataclasses.replace(CONFIG, timeout_s=0.1, attempts=2))


@pytest.mark.parametrize("address", ["http://example.org/u2netp.onnx", "file:///etc/passwd", "ftp://example.org/x"])
def test_only_https(tmp_path: Path, address: str) -> None:
    with pytest.raises(DownloadError, match="is refused; allowed: https"):
        pull(_weights(address), tmp_path)


def test_a_redirect_cannot_leave_the_scheme(weights: Weights, publisher: Publisher, tmp_path: Path) -> None:
    publisher.redirect = "ftp://127.0.0.1/u2netp.onnx"
    with pytest.raises(DownloadError, match="'ftp' is refused"):
        pull(weights, tmp_path, config=CONFIG)


def test_no_address(tmp_path: Path) -> None:
    with pytest.raises(
        DownloadError, match=r"has no stable download address\. By hand:\n  get .* https://example\.org"
    ):
        pull(_weights(None), tmp_path, config=CONFIG)


def test_nothing_is_released(tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="birefnet_swin_b: no weights are released; export your own"):
        pull(find_weights("birefnet_swin_b"), tmp_path, config=CONFIG)


def test_another_file_is_in_the_place(weights: Weights, tmp_path: Path) -> None:
    (tmp_path / "u2netp.onnx").write_bytes(b"mine")
    with pytest.raises(DownloadError, match="exists and has 4 bytes, expected are 1500000; remove it"):
        pull(weights, tmp_path, config=CONFIG)
    assert (tmp_path / "u2netp.onnx").read_bytes() == b"mine"


def test_two_downloads_of_one_file(weights: Weights, tmp_path: Path) -> None:
    with (tmp_path / "u2netp.onnx.part").open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(DownloadError, match="another process is downloading it"):
            pull(weights, tmp_path, config=CONFIG)


def test_a_folder_that_cannot_be_made(weights: Weights, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DownloadError, match=r"cannot write there \(.*\); use --directory"):
        pull(weights, tmp_path / "file" / "folder", config=CONFIG)


def test_a_full_disk(publisher: Publisher, tmp_path: Path) -> None:
    """The file is larger than what is free: refused before the first byte."""
    publisher.claims_bytes = shutil.disk_usage(tmp_path).free * 4
    huge = _weights(publisher.address, size_bytes=publisher.claims_bytes)
    with pytest.raises(DownloadError, match=r"the disk is full, .* \(\d+ MiB needed\); make room, or .* --directory"):
        pull(huge, tmp_path, config=CONFIG)


@pytest.fixture
def file_limit() -> Iterator[Callable[[int], None]]:
    """Lets no file grow beyond a number of bytes, by the kernel; -1 takes the limit away."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda limit: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_room_that_runs_out_on_the_way(
    weights: Weights, publisher: Publisher, tmp_path: Path, file_limit: Callable[[int], None]
) -> None:
    file_limit(600_000)
    with pytest.raises(
        DownloadError, match=r"disk is full, or a limit is reached \(1 MiB needed\).* will be continued"
    ):
        pull(weights, tmp_path, config=CONFIG)
    assert _names(tmp_path) == ["u2netp.onnx.part", "u2netp.onnx.part.etag"]
    kept = (tmp_path / "u2netp.onnx.part").stat().st_size
    assert 0 < kept <= 600_000
    file_limit(-1)
    assert pull(weights, tmp_path, config=CONFIG)[1].read_bytes() == CONTENT
    assert publisher.asked == ["", f"bytes={kept}-"]


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("MATTESERVE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_directory() == tmp_path / ".cache" / "matteserve" / "weights"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_directory() == tmp_path / "xdg" / "matteserve" / "weights"
    monkeypatch.setenv("MATTESERVE_CACHE", "~/own")
    assert cache_directory() == tmp_path / "own" / "weights"


def test_a_checkpoint_in_the_cache_comes_before_an_onnx(tmp_path: Path) -> None:
    weights = find_weights("u2netp")
    assert find_cached(weights, tmp_path) is None
    (tmp_path / "u2netp.onnx").touch()
    assert find_cached(weights, tmp_path) == ("onnx", tmp_path / "u2netp.onnx")
    (tmp_path / "u2netp.pth").touch()
    assert find_cached(weights, tmp_path) == ("checkpoint", tmp_path / "u2netp.pth")


def test_a_killed_download_is_continued(publisher: Publisher, tmp_path: Path) -> None:
    """SIGKILL in the middle leaves a part file that the next process continues."""
    publisher.cut_after = [600_000]
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "import dataclasses\n"
        "from matteserve_export.pull import PullConfig, pull\n"
        "from matteserve_export.weights import find_weights\n"
        "w = find_weights('u2netp')\n"
        "s = dataclasses.replace(w.sources[1], address=sys.argv[1], size_bytes=1_500_000)\n"
        "def step(done, total):\n"
        "    if done >= 500_000: os.kill(os.getpid(), signal.SIGKILL)\n"
        "pull(dataclasses.replace(w, sources=(s,)), Path(sys.argv[2]), step, PullConfig(schemes=('http',)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, publisher.address, str(tmp_path)], timeout=60, check=False)
    assert done.returncode == -9
    kept = (tmp_path / "u2netp.onnx.part").stat().st_size
    assert 0 < kept < 600_000
    assert pull(_weights(publisher.address), tmp_path, config=CONFIG)[1].read_bytes() == CONTENT
    assert publisher.asked[-1] == f"bytes={kept}-"
