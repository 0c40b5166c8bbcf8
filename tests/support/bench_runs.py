"""Runs with known figures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from matteserve_bench import Load, Record, Run, ServerStatistics, Window

HEADER: dict[str, Any] = {
    "date": "2026-11-24 05:00:00 UTC",
    "command": "matteserve bench run",
    "git": "0123456789ab",
    "matteserve": "0.1.0",
    "client": {"cpu": "AMD EPYC", "cores": 2, "kernel": "6.1", "python": "3.11.7"},
    "server": {"address": "127.0.0.1:8001", "triton": "2.51.0", "local": True, "software": {"ONNX Runtime": "1.32.0"}},
    "model": {
        "name": "u2netp", "engine_name": "u2netp_onnx_fp32", "architecture": "u2netp", "weights": "u2netp",
        "engine": "onnx", "precision": "fp32", "height": 320, "width": 320, "max_batch_size": 8,
        "dynamic_batching": {"max_queue_delay_microseconds": 2000},
        "instance_group": [{"kind": "KIND_CPU", "count": 1}],
    },
}  # fmt: skip


def steady(
    *,
    windows: int = 3,
    window_s: float = 10.0,
    interval_s: float = 0.1,
    latency_s: float = 0.1,
    load: Load | None = None,
    change: Callable[[int, Record], Record] = lambda number, record: record,
    **of_window: Any,
) -> Run:
    """A run in which a request is due each `interval_s` and takes `latency_s`, from 0 to the end of the windows."""
    count = round(windows * window_s / interval_s)
    records = [
        change(n, Record(n * interval_s, n * interval_s, n * interval_s + latency_s, bytes_out=300, bytes_in=100))
        for n in range(count)
    ]
    per_window = round(window_s / interval_s)
    values: dict[str, Any] = {
        "client_cpu": 0.1,
        "machine_cpu": 0.5,
        "machine_cores": 2,
        "server_cpu": 0.8,
        "server_rss_bytes": 100 * 2**20,
        "server": ServerStatistics(
            inferences=per_window, executions=per_window // 2, succeeded=per_window, queue_s=0.02 * per_window,
            compute_input_s=0.001 * per_window, compute_infer_s=0.07 * per_window, compute_output_s=0.002 * per_window,
            batches={2: per_window // 2},
        ),
    }  # fmt: skip
    values |= of_window
    cut = tuple(Window(n * window_s, (n + 1) * window_s, **values) for n in range(windows))
    return Run(HEADER, load or Load(model="u2netp", concurrency=1, duration_s=windows * window_s), tuple(records), cut)


def failing(every: int, error: str) -> Callable[[int, Record], Record]:
    """Let one request of `every` fail."""
    return lambda number, record: record._replace(error=error) if number % every == 0 else record
