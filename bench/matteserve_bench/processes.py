"""CPU and memory of processes on this machine: ours, and the server's if it runs here."""

from __future__ import annotations

import re
import socket
from dataclasses import dataclass
from pathlib import Path

import psutil

_LIBRARIES = (
    # file that a process has mapped -> software, and where its version stands
    ("ONNX Runtime", re.compile(r"libonnxruntime\.so\.(?P<version>\d+\.\d+\.\d+)")),
    ("TensorRT for RTX", re.compile(r"libtensorrt_rtx\.so\.(?P<version>\d+\.\d+\.\d+)")),
    ("TensorRT", re.compile(r"libnvinfer\.so\.(?P<version>\d+\.\d+\.\d+)")),
)
_PYTHON_ONNXRUNTIME = re.compile(r"(?P<site>/.*)/onnxruntime/capi/")


def find_listener(address: str) -> psutil.Process | None:
    """The process on this machine that listens at `host:port`; None if there is none, or it is not ours to see."""
    host, _, port = address.rpartition(":")
    if not port.isdigit() or not _is_this_machine(host.strip("[]")):
        return None
    try:
        connections = psutil.net_connections(kind="tcp")
    except psutil.Error:
        return None
    for connection in connections:
        listens = connection.status == psutil.CONN_LISTEN and connection.laddr and connection.laddr.port == int(port)
        if listens and connection.pid:
            try:
                return psutil.Process(connection.pid)
            except psutil.Error:
                return None
    return None


@dataclass(frozen=True)
class Usage:
    """CPU seconds used so far by processes, and their memory now."""

    cpu_s: float
    rss_bytes: int


def tree_of(root: psutil.Process) -> list[psutil.Process]:
    """A process and what it has started, directly or not; empty if it is gone."""
    try:
        return [root, *root.children(recursive=True)]
    except psutil.Error:
        return []


def usage_of(processes: list[psutil.Process]) -> Usage:
    """Summed use; a process that has just ended counts as nothing."""
    cpu_s, rss = 0.0, 0
    for process in processes:
        try:
            with process.oneshot():
                times = process.cpu_times()
                cpu_s += times.user + times.system
                rss += process.memory_info().rss
        except psutil.Error:
            continue
    return Usage(cpu_s, rss)


def busy_seconds() -> tuple[float, float]:
    """(busy, all) CPU seconds of this machine since its start, summed over cores."""
    times = psutil.cpu_times()
    everything = sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)
    return everything - times.idle - getattr(times, "iowait", 0.0), everything


def libraries_of(root: psutil.Process) -> dict[str, str]:
    """Versions of the inference engines that a server's processes have loaded, by name; read from what is mapped."""
    found: dict[str, str] = {}
    for process in tree_of(root):
        try:
            paths = {Path(mapping.path) for mapping in process.memory_maps()}
        except (psutil.Error, OSError):
            continue
        for path in paths:
            for software, pattern in _LIBRARIES:
                if match := pattern.search(path.name):
                    found[software] = match["version"]
            if python := _PYTHON_ONNXRUNTIME.match(str(path)):
                for metadata in Path(python["site"]).glob("onnxruntime*-*.dist-info"):
                    found["ONNX Runtime"] = metadata.name.removesuffix(".dist-info").rpartition("-")[2]
    return found


def _is_this_machine(host: str) -> bool:
    if host in ("localhost", "::1") or host.startswith("127."):
        return True
    try:
        addresses = {info[4][0] for info in socket.getaddrinfo(host, None)}
    except OSError:
        return False
    mine = {address.address for interface in psutil.net_if_addrs().values() for address in interface}
    return bool(addresses & mine)
