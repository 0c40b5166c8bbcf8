"""Sweeps: closed load over concurrency, open load over rate, until the server is saturated.

The searches say what to measure next and are told how it went; they measure nothing themselves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from matteserve_bench.metrics import Summary, summarise
from matteserve_bench.records import Load, RecordWriter, Run
from matteserve_bench.session import Session

KNEE_SHARE = 0.95
"""The knee is the least load that reaches this share of the highest throughput."""
LEAST_GAIN = 1.05
"""A doubling of concurrency that gains less than this twice in a row ends a sweep."""
KEPT_UP = 0.95
"""Share of the rate that must be answered for a server to have kept up."""


@dataclass(frozen=True)
class Point:
    """What a sweep needs to know of one run.

    Attributes:
        load: Concurrency, or requests per second.
        rate: Images due per second.
        images_per_s: Images answered per second.
        p99_ms: 99th percentile of latency.
        success: Share of requests answered.
    """

    load: float
    rate: float
    images_per_s: float
    p99_ms: float
    success: float


def point_of(summary: Summary) -> Point:
    """The point that a closed or open run is."""
    load = summary.load.concurrency if summary.load.mode == "closed" else summary.load.rate
    p99_ms = summary.latency_ms.get("p99", math.inf)
    return Point(float(load or 0), summary.rate, summary.images_per_s, p99_ms, summary.success)


def find_knee(points: Sequence[Point]) -> Point | None:
    """The least load that reaches 95 % of the highest throughput; None without points.

    Beyond it more load buys latency and nothing else.
    """
    if not points:
        return None
    enough = KNEE_SHARE * max(point.images_per_s for point in points)
    return next(point for point in sorted(points, key=lambda p: p.load) if point.images_per_s >= enough)


def is_kept(point: Point, slo_ms: float | None) -> bool:
    """Whether the server did what was asked: answered (nearly) all, kept up with the rate and within the bound."""
    in_time = slo_ms is None or point.p99_ms <= slo_ms
    return in_time and point.success >= 0.99 and point.images_per_s >= KEPT_UP * point.rate


def highest_kept(points: Sequence[Point], slo_ms: float | None) -> Point | None:
    """The highest rate that was kept; None if none was."""
    return max((point for point in points if is_kept(point, slo_ms)), key=lambda point: point.load, default=None)


class ConcurrencySearch:
    """Doubles concurrency until two doublings in a row gain less than 5 %.

    Args:
        first: Concurrency to begin with.
        last: Highest concurrency to try.
    """

    def __init__(self, first: int = 1, last: int = 64) -> None:
        if not 1 <= first <= last:
            raise ValueError(f"concurrency from {first} to {last}: must ascend from at least 1")
        self._next: int | None = first
        self._last = last
        self._best = 0.0
        self._flat = 0

    def next(self) -> int | None:
        """What to measure; None at the end."""
        return self._next

    def tell(self, point: Point) -> None:
        """How it went."""
        self._flat = 0 if point.images_per_s >= LEAST_GAIN * self._best else self._flat + 1
        self._best = max(self._best, point.images_per_s)
        following = 2 * int(point.load)
        self._next = None if self._flat >= 2 or following > self._last else following


class RateSearch:
    """Raises the rate until the server falls behind or breaks the bound, then closes in on the highest that it keeps.

    Args:
        first: Requests per second to begin with.
        slo_ms: Bound of p99; None asks only that the server keeps up.
        step: Factor from one rate to the next.
        resolution: Closing in ends when the two rates around the bound are this close, as a share.
        most: Most rates to try.
    """

    def __init__(
        self,
        first: float,
        *,
        slo_ms: float | None = None,
        step: float = 1.25,
        resolution: float = 0.05,
        most: int = 12,
    ) -> None:
        if not first > 0:
            raise ValueError(f"rate is {first}, must be above 0 requests per second")
        self._next: float | None = first
        self._slo_ms, self._step, self._resolution = slo_ms, step, resolution
        self._left = most
        self._good = 0.0
        self._bad = math.inf

    def next(self) -> float | None:
        """What to measure; None at the end."""
        return self._next

    def tell(self, point: Point) -> None:
        """How it went."""
        if is_kept(point, self._slo_ms):
            self._good = max(self._good, point.load)
        else:
            self._bad = min(self._bad, point.load)
        self._left -= 1
        if self._left <= 0 or self._bad <= self._good * (1 + self._resolution):
            self._next = None
        elif self._bad == math.inf:
            self._next = self._good * self._step
        elif self._good == 0.0:  # not even the first was kept: go down
            self._next = self._bad / 2
        else:
            self._next = (self._good + self._bad) / 2


def sweep(
    session: Session,
    writer: RecordWriter | None,
    *,
    concurrencies: ConcurrencySearch | None,
    rates: Callable[[float], RateSearch] | None,
    template: Load,
    workers: int = 32,
) -> list[Run]:
    """Closed load over concurrency, then open load over rate.

    Args:
        session: Where to.
        writer: Where records go.
        concurrencies: Closed part; None leaves it out.
        rates: Given the highest throughput of the closed part in requests per second (0 without), the open part; None
            leaves it out.
        template: Everything about the loads but their pace.
        workers: Threads for whole pictures in open load.
    """
    runs: list[Run] = []

    def measure(load: Load) -> Point | None:
        run = session.measure(load, writer, workers=workers)
        if not run.records:
            return None
        runs.append(run)
        return None if session.stop.is_set() else point_of(summarise(run))

    best = 0.0
    while concurrencies is not None and (concurrency := concurrencies.next()) is not None:
        point = measure(replace(template, mode="closed", concurrency=concurrency, rate=None))
        if point is None:
            return runs
        best = max(best, point.images_per_s)
        concurrencies.tell(point)
    search = rates(best / session.setup.rows) if rates is not None else None
    while search is not None and (rate := search.next()) is not None:
        point = measure(replace(template, mode="open", rate=float(f"{rate:.4g}"), concurrency=None))
        if point is None:
            return runs
        search.tell(point)
    return runs


def format_findings(summaries: Sequence[Summary], slo_ms: float | None) -> str:
    """Knee and highest rate of each model among some runs; empty if there is too little to say."""
    lines = []
    for model in dict.fromkeys(summary.load.model for summary in summaries):
        mine = [summary for summary in summaries if summary.load.model == model]
        closed = [point_of(summary) for summary in mine if summary.load.mode == "closed"]
        opened = [point_of(summary) for summary in mine if summary.load.mode == "open"]
        if len(closed) > 2 and (knee := find_knee(closed)) is not None:
            lines.append(
                f"Knee of {model}: concurrency {knee.load:g}, {knee.images_per_s:.2f} images/s at p99 "
                f"{knee.p99_ms:.1f} ms; more load gains less than {1 - KNEE_SHARE:.0%}"
            )
        if opened:
            bound = "" if slo_ms is None else f" with p99 <= {slo_ms:g} ms"
            highest = highest_kept(opened, slo_ms)
            lines.append(
                f"Highest rate of {model}{bound}: "
                + (
                    "none of those measured"
                    if highest is None
                    else f"{highest.load:.4g} requests/s, {highest.images_per_s:.2f} images/s at p99 "
                    f"{highest.p99_ms:.1f} ms"
                )
            )
    return "\n".join(lines)
