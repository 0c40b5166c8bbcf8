"""From records of single requests to the figures that are reported."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from matteserve_bench.figures import answered_in_period, due_in_period, latency_figures, period_of
from matteserve_bench.hardware import Roofline, roofline_of
from matteserve_bench.records import WINDOWS, Load, Record, Run, ServerStatistics, Window
from matteserve_bench.validity import Verdict, judge


@dataclass(frozen=True)
class Summary:
    """What a run amounts to; a failed request is never throughput and never latency.

    Attributes:
        load: What was asked for.
        requests: Requests that were due in the period.
        images: Images in them.
        seconds: Length of the period.
        rate: Images due per second.
        images_per_s: Images answered per second: the throughput.
        images_per_s_per_gpu: The same for one GPU; None without one.
        latency_ms: "min", "mean", "p50", "p90", "p95", "p99", "max"; empty if nothing was answered.
        success: Share of requests that were answered.
        errors: How many failed, by class name.
        server_ms: Means per request: "queue", "compute_input", "compute_infer", "compute_output"; empty if unknown.
        mean_batch: Rows per execution; None if unknown.
        batches: Executions by batch size.
        stages_ms: Means per picture by stage, where pictures were sent.
        client_cpu: Cores that the load generator kept busy.
        server_cpu: Cores that the server kept busy; None if it runs elsewhere.
        server_rss_mib: Largest memory of the server; None if it runs elsewhere.
        gpu_utilisation: Mean share, 0 to 1; None without a GPU, like the next three.
        gpu_memory_mib: Largest memory in use on the GPUs.
        power_w: Mean power of the GPUs.
        images_per_joule: Images answered per joule that the GPUs used.
        roofline: Share of what the hardware can multiply; None if its peak or the model's work is unknown.
        cost_per_1000_images: At the given price; None without one.
        verdict: Whether it may be quoted.
    """

    load: Load
    requests: int
    images: int
    seconds: float
    rate: float
    images_per_s: float
    latency_ms: Mapping[str, float]
    success: float
    errors: Mapping[str, int]
    verdict: Verdict
    images_per_s_per_gpu: float | None = None
    server_ms: Mapping[str, float] = field(default_factory=dict)
    mean_batch: float | None = None
    batches: Mapping[int, int] = field(default_factory=dict)
    stages_ms: Mapping[str, float] = field(default_factory=dict)
    client_cpu: float | None = None
    server_cpu: float | None = None
    server_rss_mib: float | None = None
    gpu_utilisation: float | None = None
    gpu_memory_mib: float | None = None
    power_w: float | None = None
    images_per_joule: float | None = None
    roofline: Roofline | None = None
    cost_per_1000_images: float | None = None


def summarise(
    run: Run, *, price_per_hour: float | None = None, peak_tops: float | None = None, max_error_share: float = 0.01
) -> Summary:
    """Summarise a run.

    Args:
        run: The run.
        price_per_hour: What the server costs, in any currency.
        peak_tops: The device's peak in 10^12 operations per second at the model's precision; None looks it up.
        max_error_share: Failures above which a run is INVALID.

    Raises:
        ValueError: It has no records: nothing was measured.
    """
    if not run.records:
        raise ValueError("no records: nothing was measured")
    start_s, end_s = period_of(run)
    seconds = end_s - start_s
    due = due_in_period(run)
    answered = answered_in_period(run)
    images = sum(record.rows for record in answered)
    images_per_s = images / seconds if seconds > 0 else math.nan
    failed = Counter(record.error for record in due if record.error)
    windows = run.windows[-WINDOWS:]
    server = _total_statistics(windows)
    gpus = [window.gpu for window in windows if window.gpu is not None]
    energy = [gpu.energy_j for gpu in gpus if gpu.energy_j is not None]
    joules = math.fsum(energy) if len(energy) == len(windows) else 0.0
    count = gpus[0].count if gpus else 0
    return Summary(
        load=run.load,
        requests=len(due),
        images=sum(record.rows for record in due),
        seconds=seconds,
        rate=sum(record.rows for record in due) / seconds if seconds > 0 else math.nan,
        images_per_s=images_per_s,
        images_per_s_per_gpu=images_per_s / count if count else None,
        latency_ms=latency_figures(due),
        success=1 - sum(failed.values()) / len(due) if due else math.nan,
        errors=dict(failed.most_common()),
        verdict=judge(run, max_error_share=max_error_share),
        server_ms=_server_ms(server) if server is not None else {},
        mean_batch=server.inferences / server.executions if server is not None and server.executions else None,
        batches=server.batches if server is not None else {},
        stages_ms=_stages_ms(due),
        client_cpu=_mean([(window.client_cpu, window.seconds) for window in windows]),
        server_cpu=_mean([(window.server_cpu, window.seconds) for window in windows]),
        server_rss_mib=_largest_mib([window.server_rss_bytes for window in windows]),
        gpu_utilisation=_mean([(gpu.utilisation, 1.0) for gpu in gpus]),
        gpu_memory_mib=_largest_mib([gpu.memory_bytes for gpu in gpus]),
        power_w=_mean([(gpu.power_w, 1.0) for gpu in gpus]),
        images_per_joule=images / joules if joules > 0 else None,
        roofline=roofline_of(run.header, images_per_s / max(1, count), peak_tops),
        cost_per_1000_images=1000 * price_per_hour / 3600 / images_per_s
        if price_per_hour is not None and images_per_s > 0
        else None,
    )


def _server_ms(server: ServerStatistics) -> dict[str, float]:
    """Means per request in milliseconds."""
    if not server.succeeded:
        return {}
    return {
        name: 1000 * getattr(server, f"{name}_s") / server.succeeded
        for name in ("queue", "compute_input", "compute_infer", "compute_output")
    }


def _total_statistics(windows: Sequence[Window]) -> ServerStatistics | None:
    known = [window.server for window in windows if window.server is not None]
    return sum(known, ServerStatistics()) if known else None


def _stages_ms(records: Sequence[Record]) -> dict[str, float]:
    staged = [record.stages for record in records if record.stages]
    if not staged:
        return {}
    return {name: 1000 * math.fsum(stages[name] for stages in staged) / len(staged) for name in staged[0]}


def _mean(weighted: Sequence[tuple[float | None, float]]) -> float | None:
    known = [(value, weight) for value, weight in weighted if value is not None]
    total = math.fsum(weight for _, weight in known)
    return math.fsum(value * weight for value, weight in known) / total if total > 0 else None


def _largest_mib(sizes: Sequence[float | None]) -> float | None:
    known = [size for size in sizes if size is not None]
    return max(known) / 2**20 if known else None
