"""Figures of many requests: percentiles, windows, and which requests count.

The *period* of a run is its last three windows. Latency is of every request that was due in the period, however late
its answer came. Throughput is of the images whose answers came in the period.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from matteserve_bench.records import WINDOWS, Record, Run, Window

PERCENTILES = (50, 90, 95, 99)


@dataclass(frozen=True)
class WindowFigures:
    """What one window says by itself, from the requests that were answered in it.

    Attributes:
        answered: Requests answered.
        images_per_s: Images in them over its length.
        latency_ms: Median latency; NaN if there was none.
    """

    answered: int
    images_per_s: float
    latency_ms: float


def period_of(run: Run) -> tuple[float, float]:
    """(start, end) in seconds of what counts: the last three windows; everything, if another tool sets the pace."""
    windows = run.windows[-WINDOWS:]
    if windows and run.load.mode != "loadgen":
        return windows[0].start_s, windows[-1].end_s
    if not run.records:
        return 0.0, 0.0
    return min(record.due_s for record in run.records), max(record.done_s for record in run.records)


def due_in_period(run: Run) -> list[Record]:
    """The requests that were due in the period."""
    start_s, end_s = period_of(run)
    return [record for record in run.records if start_s <= record.due_s < end_s]


def answered_in_period(run: Run) -> list[Record]:
    """The requests that were answered in the period."""
    start_s, end_s = period_of(run)
    # With everything counted the period ends with the last answer.
    whole = run.load.mode == "loadgen" or not run.windows
    return [r for r in run.records if not r.error and start_s <= r.done_s and (whole or r.done_s < end_s)]


def window_figures(records: Sequence[Record], window: Window) -> WindowFigures:
    """What a window says by itself."""
    answered = [r for r in records if not r.error and window.start_s <= r.done_s < window.end_s]
    latencies = sorted(record.latency_ms for record in answered)
    return WindowFigures(
        answered=len(answered),
        images_per_s=sum(record.rows for record in answered) / window.seconds,
        latency_ms=percentile(latencies, 50) if latencies else math.nan,
    )


def percentile(ordered: Sequence[float], percent: float) -> float:
    """The nearest-rank percentile of ascending values: a latency that did occur, never one in between."""
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


def latency_figures(records: Sequence[Record]) -> dict[str, float]:
    """Least, mean, percentiles and largest latency in milliseconds of the answered ones; empty if there are none."""
    good = sorted(record.latency_ms for record in records if not record.error)
    if not good:
        return {}
    return {
        "min": good[0],
        "mean": math.fsum(good) / len(good),
        **{f"p{percent}": percentile(good, percent) for percent in PERCENTILES},
        "max": good[-1],
    }
