"""Comparisons whose truth is known."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from matteserve_bench import Load, RecordsError, Run
from matteserve_bench.compare import bootstrap_ratio, compare, differences, format_comparisons
from support.bench_runs import HEADER, steady

LOAD = Load(model="u2netp", concurrency=1, duration_s=30.0)


def turns(speeds: list[float], factor: float = 1.0) -> list[Run]:
    """Runs in turn: request n of turn t takes `speeds[t] / factor` seconds, one after the other."""
    return [
        steady(interval_s=s / factor, latency_s=s / factor, load=dataclasses.replace(LOAD, round=turn))
        for turn, s in enumerate(speeds)
    ]


def test_pairs_are_free_of_drift() -> None:
    """Each turn is slower than the last by far more than B is faster than A."""
    drift = [0.10, 0.13, 0.17, 0.22, 0.28, 0.36]
    (comparison,) = compare(turns(drift), turns(drift, factor=1.05))
    assert comparison.paired
    throughput, mean, *_ = comparison.changes
    assert throughput.ratio == pytest.approx(1.05, abs=0.002)
    assert throughput.outside_noise
    assert throughput.better
    assert mean.ratio == pytest.approx(1 / 1.05, abs=0.002)
    assert mean.better
    assert (throughput.samples, comparison.runs) == (6, 12)


def test_noise_is_called_noise() -> None:
    generator = np.random.default_rng(1)
    a, b = ((0.1 * generator.lognormal(0, 0.1, 8)).tolist() for _ in "ab")
    (comparison,) = compare(turns(a), turns(b))
    assert not any(change.outside_noise for change in comparison.changes)
    text = format_comparisons(turns(a), turns(b), [comparison])
    assert text.count("within the noise") == 4
    assert "concurrency 1 (8 turns, paired)" in text


def test_runs_that_took_no_turns_are_compared_by_windows() -> None:
    a, b = [steady(load=LOAD)], [steady(interval_s=0.05, latency_s=0.05, load=LOAD)]
    (comparison,) = compare(a, b)
    assert not comparison.paired
    assert comparison.changes[0].ratio == pytest.approx(2.0, rel=0.01)
    assert comparison.changes[0].samples == 3
    text = format_comparisons(a, b, [comparison])
    assert "not interleaved, 3 windows" in text
    assert "the machine's drift is in it" in text
    assert "better" in text


def test_few_turns_are_said_to_be_few() -> None:
    a, b = turns([0.1, 0.1]), turns([0.2, 0.2])
    text = format_comparisons(a, b, compare(a, b))
    assert "2 turns are few, 5 or more make the interval believable" in text
    assert "worse" in text


def test_invalid_runs_are_counted() -> None:
    a, b = turns([0.1] * 5), turns([0.1] * 4)
    b.append(dataclasses.replace(steady(interval_s=0.1, latency_s=0.01, load=dataclasses.replace(LOAD, round=4))))
    (comparison,) = compare(a, b)
    assert (comparison.runs, comparison.invalid) == (10, 1)
    assert "1 of 10 runs are INVALID, the first: the client was the bottleneck" in format_comparisons(
        a, b, [comparison]
    )


def test_an_unfinished_turn_is_left_out() -> None:
    a, b = turns([0.1] * 5), turns([0.1] * 5)
    b[4] = dataclasses.replace(b[4], end="interrupted")
    (comparison,) = compare(a, b)
    assert comparison.changes[0].samples == 4


def test_nothing_in_common() -> None:
    other = Load(model="u2netp", concurrency=8, duration_s=30.0)
    with pytest.raises(RecordsError, match="A has concurrency 1, B has concurrency 8"):
        compare([steady(load=LOAD)], [steady(load=other)])


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    """200 experiments of 12 pairs, a ratio of 1.10 and noise of 5 %: a 95 % interval has it in 85 to 99 % of them."""
    generator = np.random.default_rng(0)
    hits = 0
    for seed in range(200):
        a = generator.lognormal(0, 0.3, 12)
        b = a * 1.10 * generator.lognormal(0, 0.05, 12)
        _, low, high = bootstrap_ratio(a.tolist(), b.tolist(), paired=True, seed=seed, resamples=500)
        hits += low <= 1.10 <= high
    assert 170 <= hits <= 198


def test_what_differs_between_two_headers() -> None:
    other = {**HEADER, "date": "later", "git": "fedcba", "model": {**HEADER["model"], "precision": "fp16"}}
    assert list(differences(HEADER, other)) == [
        ("git", "0123456789ab", "fedcba"),
        ("model.precision", "fp32", "fp16"),
    ]
    a = [steady(load=LOAD)]
    b = [dataclasses.replace(steady(load=dataclasses.replace(LOAD, transport="shm")), header=other)]
    text = format_comparisons(a, b, compare(a, b))
    assert text.splitlines()[:3] == [
        "Changed: git: 0123456789ab -> fedcba",
        "Changed: model.precision: fp32 -> fp16",
        "Changed: load.transport: grpc -> shm",
    ]
