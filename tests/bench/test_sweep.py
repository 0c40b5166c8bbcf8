"""Searches on servers that are formulas."""

from __future__ import annotations

import dataclasses

import pytest

from matteserve_bench import Load, summarise
from matteserve_bench.sweep import (
    ConcurrencySearch,
    Point,
    RateSearch,
    find_knee,
    format_findings,
    highest_kept,
    is_kept,
    point_of,
)
from support.bench_runs import steady


def closed(concurrency: int, images_per_s: float) -> Point:
    return Point(concurrency, images_per_s, images_per_s, 1000 * concurrency / images_per_s, 1.0)


def opened(rate: float, capacity: float) -> Point:
    """A server of one place: latency rises towards its capacity, and without end beyond it."""
    p99_ms = 1000 / (capacity - rate) if rate < capacity else 60_000.0
    return Point(rate, rate, min(rate, capacity), p99_ms, 1.0)


def test_the_knee_is_where_more_load_gains_nothing() -> None:
    curve = [closed(1, 50.0), closed(2, 90.0), closed(4, 96.0), closed(8, 100.0), closed(16, 99.0)]
    assert find_knee(curve) == curve[2]
    assert find_knee(list(reversed(curve))) == curve[2]
    assert find_knee([]) is None


def test_a_rate_is_kept_if_all_is_answered_in_time() -> None:
    good = Point(100.0, 100.0, 98.0, 150.0, 1.0)
    assert is_kept(good, 200.0)
    assert is_kept(good, None)
    assert not is_kept(good, 149.0)
    assert not is_kept(dataclasses.replace(good, success=0.98), 200.0)
    assert not is_kept(dataclasses.replace(good, images_per_s=94.0), 200.0)
    assert highest_kept([good, dataclasses.replace(good, load=80.0), opened(200.0, 100.0)], 200.0) == good
    assert highest_kept([opened(200.0, 100.0)], 200.0) is None


def test_concurrency_doubles_until_it_gains_nothing_twice() -> None:
    search, measured = ConcurrencySearch(), []
    while (concurrency := search.next()) is not None:
        measured.append(concurrency)
        search.tell(closed(concurrency, min(100.0, 40.0 * concurrency)))
    assert measured == [1, 2, 4, 8, 16]  # 40, 80, 100, 100, 100


def test_concurrency_stops_at_its_limit() -> None:
    search, measured = ConcurrencySearch(first=2, last=10), []
    while (concurrency := search.next()) is not None:
        measured.append(concurrency)
        search.tell(closed(concurrency, 10.0 * concurrency))
    assert measured == [2, 4, 8]


@pytest.mark.parametrize(("first", "slo_ms", "highest"), [(50.0, None, 100.0), (50.0, 50.0, 80.0), (400.0, 50.0, 80.0)])
def test_the_search_closes_in_on_the_highest_rate(first: float, slo_ms: float | None, highest: float) -> None:
    """A server of 100/s; its p99 is 50 ms at 80/s."""
    search, points = RateSearch(first, slo_ms=slo_ms), []
    while (rate := search.next()) is not None:
        points.append(opened(rate, 100.0))
        search.tell(points[-1])
    best = highest_kept(points, slo_ms)
    assert best is not None
    assert highest * 0.95 <= best.load <= highest * 1.053  # keeping up means 95 %, so 105 a second pass for 100
    assert len(points) <= 12
    assert len({point.load for point in points}) == len(points)


def test_a_server_that_keeps_nothing_ends_the_search() -> None:
    search, count = RateSearch(64.0, slo_ms=1.0, most=5), 0
    while (rate := search.next()) is not None:
        count += 1
        search.tell(Point(rate, rate, 0.0, 9999.0, 0.0))
    assert count == 5


def test_impossible_searches() -> None:
    with pytest.raises(ValueError, match="concurrency from 4 to 2"):
        ConcurrencySearch(4, 2)
    with pytest.raises(ValueError, match="rate is 0"):
        RateSearch(0)


def test_findings_in_words() -> None:
    runs = [
        steady(interval_s=interval_s, latency_s=concurrency * interval_s, load=Load(model="m", concurrency=concurrency))
        for concurrency, interval_s in ((1, 0.1), (2, 0.05), (4, 0.05))
    ]
    summaries = [summarise(run) for run in runs]
    assert point_of(summaries[1]).load == 2
    assert format_findings(summaries, None) == (
        "Knee of m: concurrency 2, 19.93 images/s at p99 100.0 ms; more load gains less than 5%"
    )
    rate = summarise(steady(load=Load(mode="open", model="m", rate=10.0)))
    assert format_findings([rate], 150.0) == (
        "Highest rate of m with p99 <= 150 ms: 10 requests/s, 9.97 images/s at p99 100.0 ms"
    )
    assert format_findings([rate], 50.0) == "Highest rate of m with p99 <= 50 ms: none of those measured"
    assert format_findings(summaries[:1], None) == ""
