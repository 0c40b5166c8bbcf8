"""One `tritonserver` process: started, watched through its log, and ended without leaving anything behind."""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path

from matteserve_server import shared_memory

logger = logging.getLogger("matteserve.server")
triton_logger = logging.getLogger("matteserve.triton")

_LAUNCHER = Path(__file__).with_name("_exec_with_parent.py")
_STUB_COMM = "triton_python_backend_stub"[:15]  # the kernel keeps 15 characters of a process' name
_INSTANCE = re.compile(r".+_\d+_\d+")
# A line of Triton's log begins with its severity and the date: "E1123 23:34:26.5 ...".
_SERIOUS = re.compile(r"(?P<severity>[WEF])\d{4} \d\d:")
_LEVELS = {"W": logging.WARNING, "E": logging.ERROR, "F": logging.CRITICAL}
# Said at every start by a binary that was built for GPUs; harmless on a machine without one.
_HARMLESS = (
    "CudaDriverHelper has not been initialized",
    "failed to allocate pinned system memory",
    "CUDA driver version is insufficient for CUDA runtime version",
)
_DRAINED = "All models are stopped"
# Seconds that models get to release their memory after the last request was answered.
_UNLOAD_TIMEOUT_S = 5.0


class TritonProcess:
    """A running `tritonserver`; a thread reads its log."""

    def __init__(self, command: list[str], environment: Mapping[str, str], shm_prefix: str) -> None:
        self._shm_prefix = shm_prefix
        self._tail: deque[str] = deque(maxlen=40)
        self._drained = threading.Event()
        # The kernel ties the death signal to the THREAD that forked: only the main thread lives as long as the process.
        tied = sys.platform == "linux" and threading.current_thread() is threading.main_thread()
        launcher = [sys.executable, "-S", str(_LAUNCHER), str(os.getpid())] if tied else []
        self._process = subprocess.Popen(
            [*launcher, *command],
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            # A session of its own: Ctrl-C reaches only us, and SIGKILL can reach the stubs too.
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read_log, name="triton-log", daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        """Process id of the server."""
        return self._process.pid

    def poll(self) -> int | None:
        """The exit code, or None while it runs."""
        return self._process.poll()

    def last_log_lines(self, count: int = 5) -> list[str]:
        """The newest warnings and errors of the server's log, or its last lines if there are none."""
        serious = [line for line in self._tail if _level(line) >= logging.WARNING]
        return (serious or list(self._tail))[-count:]

    def stubs(self) -> dict[int, str]:
        """The living stubs of Python-based backends: process id -> model instance, `<model>_<group>_<index>`."""
        return {
            pid: _instance_of(pid) for pid, name, state in _children(self.pid) if name == _STUB_COMM and state != "Z"
        }

    def stop(self, exit_timeout_s: float) -> int:
        """End the server: SIGTERM, requests in flight finish, SIGKILL after the timeout, shared memory removed.

        Args:
            exit_timeout_s: Seconds that requests in flight get.

        Returns:
            The exit code; 0 if every request was answered, whether or not a model then hung while unloading.
        """
        at_work: set[str] = set()
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            at_work = self._wait_for_exit(exit_timeout_s)
        code = self._process.wait()
        self._reader.join(timeout=5)
        if self._process.stderr is not None and not self._reader.is_alive():
            self._process.stderr.close()
        shared_memory.remove_regions(self._shm_prefix)
        if code in (-signal.SIGKILL, 1) and self._drained.is_set():
            if not at_work:
                return 0
            # Triton counts a request as answered when it gives up on the process that works on it.
            logger.warning("%s still at work when the time was over: requests were cut off", ", ".join(sorted(at_work)))
        return code

    def kill(self) -> None:
        """SIGKILL the server and its stubs at once."""
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return

    def _wait_for_exit(self, exit_timeout_s: float) -> set[str]:
        """Wait, and kill what does not end; return the instances whose processes were still there at the end."""
        deadline = time.monotonic() + exit_timeout_s
        living: dict[int, str] = {}
        while True:
            seen = self.stubs()
            if self._process.poll() is not None:  # then what was seen means nothing: its children had left it
                break
            living, now = seen, time.monotonic()
            # A model whose stub was killed never finishes unloading, and the server would wait for it.
            if self._drained.is_set():
                deadline = min(deadline, now + _UNLOAD_TIMEOUT_S)
            if now > deadline:
                if not self._drained.is_set():
                    logger.warning("requests were still in flight after %.0f s; killing the server", exit_timeout_s)
                self.kill()
                break
            time.sleep(0.02)
        if living:
            self.kill()  # a server that ended by itself leaves a process that is stuck behind
        return set(living.values())

    def _read_log(self) -> None:
        assert self._process.stderr is not None
        usage = False
        for line in self._process.stderr:
            line = line.rstrip()
            # After a wrong flag come hundreds of lines of help; the reason stands before them.
            usage = usage or line.startswith("Usage:")
            if usage or not line:
                continue
            self._tail.append(line)
            if _DRAINED in line:
                self._drained.set()
            triton_logger.log(_level(line), "%s", line)


def _level(line: str) -> int:
    serious = _SERIOUS.match(line)
    if serious is None or any(text in line for text in _HARMLESS):
        return logging.DEBUG
    return _LEVELS[serious["severity"]]


def _instance_of(pid: int) -> str:
    """The model instance that a stub serves, from its command line; empty if it is just going."""
    try:
        arguments = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return next((argument for argument in arguments if _INSTANCE.fullmatch(argument) and "/" not in argument), "")


def _children(parent: int) -> Iterable[tuple[int, str, str]]:
    """(pid, name cut to 15 characters, state) of a process' children, from /proc."""
    try:
        tasks = list(Path(f"/proc/{parent}/task").iterdir())
    except FileNotFoundError:
        return
    for task in tasks:
        try:
            pids = (task / "children").read_text().split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        for pid in pids:
            try:
                stat = Path(f"/proc/{pid}/stat").read_text()
            except (FileNotFoundError, ProcessLookupError):
                continue
            name, _, rest = stat.partition("(")[2].rpartition(")")
            yield int(pid), name, rest.split()[0]
