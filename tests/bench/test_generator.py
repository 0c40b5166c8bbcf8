"""The load generator on a clock that does not wait and a target whose answers are known."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable

import numpy as np
import pytest

from matteserve_bench.generator import NOT_SENT, ClosedLoop, OpenLoop
from matteserve_bench.pacing import MonotonicClock, arrival_times
from matteserve_bench.records import Record
from matteserve_bench.targets import Done, Outcome


class FakeClock:
    """Goes on only when somebody sleeps or works."""

    def __init__(self) -> None:
        self.time_s = 1000.0

    def now(self) -> float:
        return self.time_s

    def sleep(self, seconds: float) -> None:
        self.time_s += max(seconds, 1e-9)  # less would be lost in rounding


class FakeTarget:
    """Answers before `send` returns; `cost_s` of request `n` passes meanwhile."""

    rows = 1

    def __init__(self, clock: FakeClock, cost_s: Callable[[int], float]) -> None:
        self.clock, self.cost_s = clock, cost_s
        self.after: Callable[[int], None] = lambda index: None

    def check(self) -> None: ...

    def close(self) -> None: ...

    def send(self, index: int, done: Done) -> None:
        self.clock.sleep(self.cost_s(index))
        self.after(index)
        done(Outcome(bytes_out=index))


class HeldTarget:
    """Keeps what it is sent until it is told to answer."""

    rows = 2

    def __init__(self) -> None:
        self.held: dict[int, Done] = {}

    def check(self) -> None: ...

    def close(self) -> None: ...

    def send(self, index: int, done: Done) -> None:
        self.held[index] = done

    def answer(self, index: int, error: str = "") -> None:
        self.held.pop(index)(Outcome(error))


def latencies(records: list[Record]) -> list[float]:
    return [round(record.latency_ms) for record in records]


def test_a_stall_is_felt_by_everyone_who_was_due() -> None:
    """No coordinated omission: the third request blocks for a second, and the next ones were due meanwhile."""
    clock = FakeClock()
    target = FakeTarget(clock, lambda index: 1.0 if index == 2 else 0.01)
    loop = OpenLoop(target, itertools.islice(arrival_times(5.0, "constant"), 9), clock)
    loop.pace()
    records = loop.take()
    assert [round(record.due_s, 6) for record in records] == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.4, 1.6]
    assert latencies(records) == [10, 10, 1000, 810, 620, 430, 240, 50, 10]
    assert [round(1000 * (record.sent_s - record.due_s)) for record in records] == [0, 0, 0, 800, 610, 420, 230, 40, 0]


def test_constant_arrivals() -> None:
    assert list(itertools.islice(arrival_times(4.0, "constant"), 4)) == [0.0, 0.25, 0.5, 0.75]


def test_poisson_arrivals() -> None:
    """Intervals have the mean and deviation of an exponential distribution; the same seed gives the same ones."""
    times = np.fromiter(itertools.islice(arrival_times(50.0, "poisson", seed=3), 20_000), float)
    intervals = np.diff(times)
    assert intervals.mean() == pytest.approx(1 / 50, rel=0.03)
    assert intervals.std() == pytest.approx(1 / 50, rel=0.03)
    again = list(itertools.islice(arrival_times(50.0, "poisson", seed=3), 3))
    assert again == times[:3].tolist()
    assert again != list(itertools.islice(arrival_times(50.0, "poisson", seed=4), 3))


def test_too_many_on_their_way_is_a_failure_and_not_a_pause() -> None:
    target = HeldTarget()
    loop = OpenLoop(target, iter([0.0, 0.1, 0.2, 0.3]), FakeClock(), max_outstanding=2)
    loop.pace()
    assert loop.outstanding == 2
    assert [(round(r.due_s, 6), r.error, r.rows) for r in loop.take()] == [(0.2, NOT_SENT, 2), (0.3, NOT_SENT, 2)]
    target.answer(0)
    target.answer(1)
    assert loop.drain(1.0)
    assert latencies(loop.take()) == [300, 200]


def test_a_stopped_open_loop_sends_no_more() -> None:
    target = HeldTarget()
    loop = OpenLoop(target, arrival_times(1000.0, "constant"), MonotonicClock())
    loop.start()
    loop.stop()
    sent = len(target.held)
    assert loop.outstanding == sent
    assert not loop.drain(0.0) or sent == 0


def test_a_closed_loop_replaces_what_is_answered() -> None:
    target = HeldTarget()
    loop = ClosedLoop(target, 3, FakeClock())
    loop.start()
    assert sorted(target.held) == [0, 1, 2]
    target.answer(1)
    target.answer(0, "InferenceError")
    assert sorted(target.held) == [2, 3, 4]
    loop.stop()
    for index in (2, 3, 4):
        target.answer(index)
    assert target.held == {}
    assert loop.drain(1.0)
    assert [record.error for record in loop.take()] == ["", "InferenceError", "", "", ""]
    assert loop.take() == []


def test_answers_that_come_before_send_returns_need_no_stack() -> None:
    clock = FakeClock()
    target = FakeTarget(clock, lambda index: 0.001)
    loop = ClosedLoop(target, 1, clock)
    target.after = lambda index: loop.stop() if index == 9_999 else None
    loop.start()
    records = loop.take()
    assert len(records) == 10_000
    assert set(latencies(records)) == {1}


def test_many_threads_lose_no_record() -> None:
    """Answers come from eight threads at once."""
    lock = threading.Lock()

    class Pool(HeldTarget):
        def send(self, index: int, done: Done) -> None:
            with lock:
                self.held[index] = done

    target = Pool()
    loop = ClosedLoop(target, 8, FakeClock())
    loop.start()

    def answer() -> None:
        for _ in range(500):
            with lock:
                index = next(iter(target.held))
                done = target.held.pop(index)
            done(Outcome())

    threads = [threading.Thread(target=answer) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(loop.take()) == 4000
    assert loop.outstanding == 8
