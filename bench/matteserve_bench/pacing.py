"""When requests are due in open load, and what sends them then."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Protocol

import numpy as np

from matteserve_bench.records import Arrivals


class Clock(Protocol):
    """Tells the time and waits; tests have one that does not really wait."""

    def now(self) -> float:
        """Seconds on a clock that never jumps."""

    def sleep(self, seconds: float) -> None:
        """Wait."""


class MonotonicClock:
    """The real one."""

    now = staticmethod(time.perf_counter)
    sleep = staticmethod(time.sleep)


def arrival_times(rate: float, arrivals: Arrivals, seed: int = 0) -> Iterator[float]:
    """Seconds at which requests are due, from the beginning of the load; without end.

    Args:
        rate: Mean requests per second.
        arrivals: "constant" intervals, or the exponential ones of a Poisson process.
        seed: Another seed, another Poisson process.
    """
    if arrivals == "constant":
        index = 0
        while True:
            yield index / rate
            index += 1
    generator = np.random.default_rng(seed)
    due = 0.0
    while True:
        for interval in generator.exponential(1 / rate, 1024).tolist():
            due += interval
            yield due
