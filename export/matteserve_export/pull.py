"""Fetch released weights: resumable, verified, atomic.

The bytes go to `<file>.part` and are renamed only after size and digests were checked, so that a file under its final
name is always whole. An interrupted download is continued where it stopped, if the server can do that and still has the
same file (`If-Range` with the ETag kept in `<file>.part.etag`); otherwise it starts again.

Where the registry knows no digest, the one that Hugging Face announces with its redirect (`X-Linked-ETag`, the file's
SHA-256) is checked: it tells a damaged transfer, though not a file that was exchanged by its publisher.
"""

from __future__ import annotations

import errno
import fcntl
import http.client
import logging
import os
import re
import shutil
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from matteserve_client import __version__
from matteserve_export._errors import DownloadError
from matteserve_export._files import digest
from matteserve_export.weights import Source, SourceKind, Weights

__all__ = ["Progress", "PullConfig", "cache_directory", "find_cached", "pull"]

_LOG = logging.getLogger(__name__)
_CHUNK_BYTES = 1 << 18

Progress = Callable[[int, int | None], None]
"""Called with the bytes on disk so far and the bytes in all, None if unknown."""


@dataclass(frozen=True)
class PullConfig:
    """How to fetch.

    Attributes:
        timeout_s: Seconds without a single byte after which a connection counts as broken.
        attempts: How often an interrupted transfer is taken up again before giving up.
        backoff_s: Seconds to wait before the second attempt; twice as long before each further one.
        schemes: Address schemes allowed, also after redirects.
        accept_non_commercial: Weights whose licence forbids commercial use are refused without it.
    """

    timeout_s: float = 30.0
    attempts: int = 3
    backoff_s: float = 1.0
    schemes: tuple[str, ...] = ("https",)
    accept_non_commercial: bool = False


class _InterruptedTransferError(Exception):
    """The connection broke or the server had a passing fault; trying again may help."""


def cache_directory() -> Path:
    """Where weights are kept: `$MATTESERVE_CACHE/weights`, else `weights` in the user's XDG cache for matteserve."""
    own = os.environ.get("MATTESERVE_CACHE")
    if own:
        return Path(own).expanduser() / "weights"
    xdg = os.environ.get("XDG_CACHE_HOME")
    return (Path(xdg) if xdg else Path.home() / ".cache") / "matteserve" / "weights"


def find_cached(weights: Weights, directory: Path) -> tuple[SourceKind, Path] | None:
    """The first source of these weights that lies in the directory, with its kind; a checkpoint before an ONNX."""
    for source in sorted(weights.sources, key=lambda source: source.kind != "checkpoint"):
        path = directory / source.file_name
        if path.is_file():
            return source.kind, path
    return None


def pull(
    weights: Weights,
    directory: Path,
    progress: Progress | None = None,
    config: PullConfig | None = None,
    *,
    kind: SourceKind | None = None,
) -> tuple[Source, Path]:
    """Fetch weights into a directory.

    Args:
        weights: Entry of the registry.
        directory: Made if it does not exist.
        progress: Told how far it is.
        config: Timeouts and attempts.
        kind: "checkpoint" or "onnx"; None takes the first file that has an address.

    Returns:
        The source that was taken and its file, whose size and digests are as the registry says.

    Raises:
        ExportError: The licence forbids commercial use, and that was not accepted.
        DownloadError: No address, no network, another file than expected, or no room on the disk.
    """
    config = config or PullConfig()
    weights.require_acceptance(config.accept_non_commercial)
    source = weights.source(kind) if kind is not None else weights.downloadable
    if not weights.sources:
        raise DownloadError(f"{weights.name}: no weights are released; export your own with --weights")
    if source is None or source.address is None:
        what = f"{weights.name} as {kind}" if kind is not None else weights.name
        raise DownloadError(_by_hand(weights, directory, f"{what} has no stable download address"))
    target = directory / source.file_name
    if target.exists():
        problem = _mismatch(source, target)
        if problem:
            raise DownloadError(f"{target} exists and {problem}; remove it and pull again")
        return source, target
    try:
        directory.mkdir(parents=True, exist_ok=True)
        source = _fetch(weights, source, target, progress or (lambda _done, _total: None), config)
    except OSError as exc:
        if exc.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            size = f" ({source.size_bytes / 2**20:.0f} MiB needed)" if source.size_bytes else ""
            raise DownloadError(
                f"{directory}: the disk is full, or a limit is reached{size}; make room, or choose another place with "
                "--directory; what was fetched so far is kept and will be continued"
            ) from exc
        raise DownloadError(f"{directory}: cannot write there ({exc.strerror or exc}); use --directory") from exc
    return source, target


def _fetch(weights: Weights, source: Source, target: Path, progress: Progress, config: PullConfig) -> Source:
    """Fill the part file over several attempts, check it, rename it; return what is known about the file then."""
    part = target.with_name(target.name + ".part")
    with part.open("ab") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            raise DownloadError(f"{part}: another process is downloading it; wait for that one") from exc
        for attempt in range(1, config.attempts + 1):
            try:
                source = _transfer(source, stream, part, progress, config)
                break
            except _InterruptedTransferError as exc:
                if attempt == config.attempts:
                    have = part.stat().st_size
                    if not have:
                        part.unlink()
                    kept = f"; {have} bytes are kept, pull again to continue" if have else ""
                    reason = f"{source.address}: {exc}{kept}"
                    raise DownloadError(_by_hand(weights, target.parent, reason)) from exc
                _LOG.warning("%s; trying again (%d of %d)", exc, attempt + 1, config.attempts)
                time.sleep(config.backoff_s * 2 ** (attempt - 1))
            except urllib.error.HTTPError as exc:
                part.unlink()
                reason = f"{source.address}: the server answered {exc.code} {exc.reason}"
                raise DownloadError(_by_hand(weights, target.parent, reason)) from exc
        stream.flush()
        os.fsync(stream.fileno())
        problem = _mismatch(source, part)
        if problem:
            part.unlink()
            _etag_path(part).unlink(missing_ok=True)
            raise DownloadError(
                f"{source.address}: the file {problem}; it was removed: pull again, or tell its publisher"
            )
        if not source.verifiable:
            _LOG.warning("%s: no digest is known, so only the transfer was checked, not the content", source.file_name)
        part.replace(target)
        _etag_path(part).unlink(missing_ok=True)
    return source


def _transfer(source: Source, stream: IO[bytes], part: Path, progress: Progress, config: PullConfig) -> Source:
    """One connection: continue the part file or start it again. Returns the source with what the server announced."""
    done = part.stat().st_size
    etag = _etag_path(part).read_text() if _etag_path(part).is_file() else ""
    headers = {"User-Agent": f"matteserve/{__version__}", "Accept-Encoding": "identity"}
    if source.size_bytes is not None and done > source.size_bytes:
        done = 0
    elif done and done == source.size_bytes:
        return source
    # Without an ETag only a known digest can tell that the two halves belong together.
    if done and (etag or source.verifiable):
        headers["Range"] = f"bytes={done}-"
        if etag:
            headers["If-Range"] = etag
    try:
        response, source = _open(source, headers, config)
        with response:
            _receive(response, source, stream, part, progress)
        return source
    except urllib.error.HTTPError as exc:
        exc.close()
        if exc.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            stream.truncate(0)
            raise _InterruptedTransferError("the server has another file than the one begun; starting again") from exc
        if exc.code >= 500 or exc.code == http.HTTPStatus.TOO_MANY_REQUESTS:
            raise _InterruptedTransferError(f"the server answered {exc.code} {exc.reason}") from exc
        raise
    except urllib.error.URLError as exc:
        raise _InterruptedTransferError(f"cannot connect ({exc.reason})") from exc
    except (http.client.HTTPException, ConnectionError, TimeoutError) as exc:
        raise _InterruptedTransferError(f"the connection broke ({exc or type(exc).__name__})") from exc


def _open(source: Source, headers: dict[str, str], config: PullConfig) -> tuple[Any, Source]:
    """Open the address; every redirect must stay within the allowed schemes, and may announce a digest."""
    announced: dict[str, str] = {}

    class _Redirects(urllib.request.HTTPRedirectHandler):
        def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
            _check_scheme(newurl, config)
            announced.setdefault("sha256", headers.get("X-Linked-ETag", "").strip('"').lower())
            return super().redirect_request(req, fp, code, msg, headers, newurl)

    address = source.address or ""
    _check_scheme(address, config)
    request = urllib.request.Request(address, headers=headers)
    response = urllib.request.build_opener(_Redirects).open(request, timeout=config.timeout_s)
    if not source.verifiable and re.fullmatch(r"[0-9a-f]{64}", announced.get("sha256", "")):
        source = replace(source, sha256=announced["sha256"])
    return response, source


def _check_scheme(address: str, config: PullConfig) -> None:
    scheme = urllib.parse.urlsplit(address).scheme
    if scheme not in config.schemes:
        raise DownloadError(f"{address}: scheme {scheme or 'none'!r} is refused; allowed: {', '.join(config.schemes)}")


def _receive(response: Any, source: Source, stream: IO[bytes], part: Path, progress: Progress) -> None:
    """Append a partial answer, or start again with a whole one."""
    done = part.stat().st_size
    continued = response.status == http.HTTPStatus.PARTIAL_CONTENT
    if continued and not response.headers.get("Content-Range", "").startswith(f"bytes {done}-"):
        stream.truncate(0)
        raise _InterruptedTransferError("the server sent another range than asked for; starting again")
    if not continued:
        stream.truncate(0)
        done = 0
    etag = response.headers.get("ETag", "")
    if etag and not etag.startswith("W/"):  # a weak ETag does not promise equal bytes
        _etag_path(part).write_text(etag)
    else:
        _etag_path(part).unlink(missing_ok=True)
    length = response.headers.get("Content-Length")
    total = done + int(length) if length is not None else source.size_bytes
    if source.size_bytes is not None and total != source.size_bytes:
        stream.truncate(0)
        raise DownloadError(f"{source.address}: the server offers {total} bytes, expected are {source.size_bytes}")
    if total is not None and shutil.disk_usage(part.parent).free < total - done:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    progress(done, total)
    try:
        while chunk := response.read(_CHUNK_BYTES):
            stream.write(chunk)
            done += len(chunk)
            progress(done, total)
    finally:
        stream.flush()  # the next attempt asks the file for its size
    if total is not None and done < total:
        raise _InterruptedTransferError(f"the connection closed after {done} of {total} bytes")


def _mismatch(source: Source, path: Path) -> str:
    """What is wrong with a file; empty if nothing is."""
    size = path.stat().st_size
    if source.size_bytes is not None and size != source.size_bytes:
        return f"has {size} bytes, expected are {source.size_bytes}"
    for algorithm in ("sha256", "md5"):
        expected = getattr(source, algorithm)
        if expected is not None and (found := digest(path, algorithm)) != expected:
            return f"has the {algorithm} {found}, expected is {expected}"
    return ""


def _etag_path(part: Path) -> Path:
    return part.with_name(part.name + ".etag")


def _by_hand(weights: Weights, directory: Path, reason: str) -> str:
    """A message that says what a person can do instead."""
    lines = [f"{reason}. By hand:"]
    for source in weights.sources:
        option = "--onnx" if source.kind == "onnx" else "--weights"
        lines.append(
            f"  get {source.file_name} from {source.address or source.page} and put it at "
            f"{directory / source.file_name}, or run: matteserve export {weights.name} {option} {source.file_name}"
        )
    return "\n".join(lines)
