"""The processes of a comparison: workers, rembg's server, and how much memory all of them take."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

_WORKER = Path(__file__).with_name("worker.py")


class ComparisonError(RuntimeError):
    """A side of the comparison did not start, or went away."""


def rembg_environment(home: Path) -> dict[str, str]:
    """Lets rembg take `<home>/<name>.onnx` as its weights; everything else is its default."""
    environment = {**os.environ, "U2NET_HOME": str(home), "MODEL_CHECKSUM_DISABLED": "1"}
    environment.pop("OMP_NUM_THREADS", None)  # rembg would use fewer threads than there are cores
    return environment


class Worker:
    """A `worker.py` of one side; ends with its `with` block.

    Args:
        side: Key of `worker.SIDES`.
        options: Arguments of that side.
        python: Interpreter to run it with.
        environment: Environment variables; None inherits.

    Raises:
        ComparisonError: (also from `run`) The process ended; its stderr was passed on.
    """

    def __init__(
        self,
        side: str,
        options: Mapping[str, Any],
        *,
        python: str = sys.executable,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.side = side
        self._process = subprocess.Popen(
            [python, str(_WORKER), side, json.dumps(dict(options))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=None if environment is None else dict(environment),
        )
        try:
            self.pid = int(self._read()["pid"])
        except BaseException:
            self.__exit__(None, None, None)
            raise

    def run(self, paths: Sequence[Path], concurrency: int, keep: Path | None = None) -> dict[str, Any]:
        """See `worker.run`."""
        command = {
            "paths": list(map(str, paths)),
            "concurrency": concurrency,
            "keep": None if keep is None else str(keep),
        }
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError as exc:
            raise ComparisonError(f"the worker of {self.side} ended with code {self._process.wait()}") from exc
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise ComparisonError(f"the worker of {self.side} ended with code {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@contextmanager
def rembg_server(
    python: str, environment: Mapping[str, str], start_timeout_s: float = 120.0
) -> Iterator[tuple[int, int]]:
    """`rembg s` without its user interface; gives (port, process id).

    Raises:
        ComparisonError: It did not start; without rembg's [cli] extra it cannot.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    arguments = ["s", "--host", "127.0.0.1", "--port", str(port), "--log_level", "error", "--no-ui"]
    code = "from rembg.cli import main; main()"
    process = subprocess.Popen(
        [python, "-c", code, *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=dict(environment),
    )
    try:
        deadline = time.monotonic() + start_timeout_s
        while True:
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                said = process.communicate()[1].strip().splitlines()
                raise ComparisonError(
                    f"`rembg s` did not start ({said[-1] if said else 'no answer'}); its Python needs rembg[cpu,cli]: "
                    "give one with --rembg-python, or leave the server out with --no-rembg-server"
                )
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                time.sleep(0.1)
        yield port, process.pid
    finally:
        process.terminate()
        try:
            process.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


def cpu_seconds(pids: Sequence[int]) -> float:
    """CPU time that some processes and their living descendants have used so far, user and system."""
    total = 0.0
    for pid in pids:
        root = psutil.Process(pid)
        for process in (root, *root.children(recursive=True)):
            times = process.cpu_times()
            total += times.user + times.system
    return total


class MemoryWatch:
    """The most memory that some processes and their descendants had at one time, while the `with` block ran.

    The sum of their resident sets: pages that several share count several times, so more processes look worse.
    """

    def __init__(self, pids: Sequence[int], interval_s: float = 0.05) -> None:
        self._roots = [psutil.Process(pid) for pid in pids]
        self._interval_s = interval_s
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.peak_bytes = 0

    def _watch(self) -> None:
        processes: list[psutil.Process] = []
        looks = 0
        while not self._ended.is_set():
            if looks % 20 == 0:  # walking the process table is dear, and hardly anything changes there
                processes = [process for root in self._roots for process in (root, *root.children(recursive=True))]
            looks += 1
            total = 0
            for process in processes:
                try:
                    total += process.memory_info().rss
                except psutil.NoSuchProcess:
                    continue
            self.peak_bytes = max(self.peak_bytes, total)
            self._ended.wait(self._interval_s)

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
