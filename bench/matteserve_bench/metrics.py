"""From records of single requests to the figures that are reported."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

PERCENTILES = (50, 90, 95, 99)


@dataclass(frozen=True)
class Record:
    """One request.

    Attributes:
        sent_s: When it was sent, in seconds on a monotonic clock.
        answered_s: When its answer, or its failure, was there.
        error: Class name of the failure; empty if it was answered.
    """

    sent_s: float
    answered_s: float
    error: str = ""

    @property
    def latency_ms(self) -> float:
        """Milliseconds from sending to answer."""
        return 1000 * (self.answered_s - self.sent_s)


@dataclass(frozen=True)
class Summary:
    """What a run amounts to.

    Attributes:
        requests: Requests sent.
        errors: How many failed, by class name.
        seconds: From the first sending to the last answer, drain included.
        images_per_s: Answered requests over `seconds`.
        latency_ms: Mean, percentiles ("p50" ...) and maximum over the answered requests; empty if none was.
    """

    requests: int
    errors: dict[str, int]
    seconds: float
    images_per_s: float
    latency_ms: dict[str, float]


def summarise(records: Sequence[Record]) -> Summary:
    """Summarise a run; failures count as requests, never as throughput or latency.

    Raises:
        ValueError: There are no records.
    """
    if not records:
        raise ValueError("no records: nothing was measured")
    good = sorted(record.latency_ms for record in records if not record.error)
    seconds = max(record.answered_s for record in records) - min(record.sent_s for record in records)
    latency = {}
    if good:
        latency = {"mean": sum(good) / len(good)}
        latency |= {f"p{percent}": percentile(good, percent) for percent in PERCENTILES}
        latency["max"] = good[-1]
    return Summary(
        requests=len(records),
        errors=dict(Counter(record.error for record in records if record.error)),
        seconds=seconds,
        images_per_s=len(good) / seconds if seconds > 0 else math.nan,
        latency_ms=latency,
    )


def percentile(ordered: Sequence[float], percent: float) -> float:
    """The nearest-rank percentile of ascending values: a latency that did occur, never one in between."""
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]
