"""What happens beside the requests during a window: on this machine, in the server, on its GPUs."""

from __future__ import annotations

import os
import time

import psutil

from matteserve_bench import processes
from matteserve_bench.records import ServerStatistics, Window
from matteserve_bench.triton import GpuSample, TritonServer, gpu_use, read_gpu_metrics
from matteserve_client import MatteserveError

_GPU_INTERVAL_S = 0.5


class Observer:
    """Watches windows one after the other; one thread uses it.

    Args:
        server: Whose statistics are read.
        engine: Engine whose statistics they are.
        metrics_url: Page with the server's metrics; None reads none.
        watch_server: Look at the server's processes if they run here.
    """

    def __init__(
        self, server: TritonServer, engine: str, *, metrics_url: str | None = None, watch_server: bool = True
    ) -> None:
        self._server, self._engine, self._metrics_url = server, engine, metrics_url
        self.listener = processes.find_listener(server.address) if watch_server else None
        self._samples: list[GpuSample] = []
        self._next_sample = 0.0
        if metrics_url is not None:
            try:
                if read_gpu_metrics(metrics_url) is None:
                    self._metrics_url = None  # a server without a GPU: nothing to look at again
            except OSError:
                self._metrics_url = None

    def begin(self, now_s: float) -> None:
        """Begin the first window."""
        self._start_s = now_s
        self._samples = []
        self._sample()
        self._before = self._look()

    def tick(self) -> None:
        """Look at what has no counter; call it several times a second."""
        if self._metrics_url is not None and time.perf_counter() >= self._next_sample:
            self._sample()

    def next_window(self, now_s: float) -> Window:
        """End a window and begin the next."""
        self._sample()
        after = self._look()
        before, self._before = self._before, after
        start_s, self._start_s = self._start_s, now_s
        samples, self._samples = self._samples, self._samples[-1:]
        seconds = max(1e-9, now_s - start_s)
        both = before.server is not None and after.server is not None
        return Window(
            start_s=round(start_s, 6),
            end_s=round(now_s, 6),
            client_cpu=round((after.client_s - before.client_s) / seconds, 4),
            machine_cpu=round((after.busy_s - before.busy_s) / max(1e-9, after.all_s - before.all_s), 4),
            machine_cores=psutil.cpu_count() or 1,
            server_cpu=None if self.listener is None else round((after.tree.cpu_s - before.tree.cpu_s) / seconds, 4),
            server_rss_bytes=None if self.listener is None else after.tree.rss_bytes,
            server=after.server - before.server if both else None,  # type: ignore[operator]
            gpu=gpu_use(samples),
        )

    def _sample(self) -> None:
        if self._metrics_url is None:
            return
        self._next_sample = time.perf_counter() + _GPU_INTERVAL_S
        try:
            sample = read_gpu_metrics(self._metrics_url)
        except OSError:
            return
        if sample is not None:
            self._samples.append(sample)

    def _look(self) -> _Look:
        try:
            server = self._server.statistics(self._engine)
        except MatteserveError:
            server = None  # it is gone, or not to be reached just now: the requests will show it
        tree = processes.usage_of(processes.tree_of(self.listener)) if self.listener else processes.Usage(0.0, 0)
        times = os.times()
        busy_s, all_s = processes.busy_seconds()
        return _Look(server, tree, times.user + times.system, busy_s, all_s)


class _Look:
    def __init__(
        self, server: ServerStatistics | None, tree: processes.Usage, client_s: float, busy_s: float, all_s: float
    ) -> None:
        self.server, self.tree, self.client_s, self.busy_s, self.all_s = server, tree, client_s, busy_s, all_s
