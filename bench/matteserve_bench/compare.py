"""Is B faster than A, or is it the noise? Interleaved runs, paired by their turn, and a bootstrap interval.

A machine drifts: with its temperature, its neighbours, its caches. Runs of A and B in turn (A B, B A, A B, ...) see the
same drift, so the ratio within each turn is free of it. Resampling these ratios (Efron and Tibshirani, An Introduction
to the Bootstrap, 1993, chapter 13: percentile interval) says how far the mean ratio is known.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from matteserve_bench._errors import RecordsError
from matteserve_bench.figures import latency_figures, window_figures
from matteserve_bench.metrics import summarise
from matteserve_bench.records import WINDOWS, Load, RecordWriter, Run
from matteserve_bench.session import Session

FEWEST_TURNS = 5
"""Turns below which an interval is too good to be true."""
_RESAMPLES = 10_000
_METRICS = ("images/s", "mean ms", "p50 ms", "p99 ms")
_HIGHER_IS_BETTER = {"images/s"}


@dataclass(frozen=True)
class Change:
    """How one figure differs between A and B.

    Attributes:
        metric: Which figure.
        a: Its geometric mean over A's turns (or windows).
        b: The same for B.
        ratio: b / a.
        low: Lower end of the 95 % interval of the ratio.
        high: Upper end.
        samples: Turns, or windows of the shorter side.
    """

    metric: str
    a: float
    b: float
    ratio: float
    low: float
    high: float
    samples: int

    @property
    def outside_noise(self) -> bool:
        """Whether the interval leaves out "no change"."""
        return self.low > 1 or self.high < 1

    @property
    def better(self) -> bool:
        """Whether B is the better one."""
        return (self.ratio > 1) == (self.metric in _HIGHER_IS_BETTER)


@dataclass(frozen=True)
class Comparison:
    """A against B at one pace.

    Attributes:
        pace_a: A's pace, for people.
        pace_b: B's.
        paired: The runs took turns.
        changes: One for each figure.
        runs: Runs on both sides.
        invalid: How many of them are INVALID.
        reason: Why the first of those is; empty if none is.
    """

    pace_a: str
    pace_b: str
    paired: bool
    changes: tuple[Change, ...]
    runs: int
    invalid: int
    reason: str


def bootstrap_ratio(
    a: Sequence[float], b: Sequence[float], *, paired: bool, seed: int = 0, resamples: int = _RESAMPLES
) -> tuple[float, float, float]:
    """(ratio, low, high) of the geometric means of b and a, with a 95 % percentile interval.

    Args:
        a: Positive figures of A.
        b: Positive figures of B; as many as A's if paired.
        paired: Resample pairs, not each side by itself.
        seed: Of the resampling.
        resamples: How many.
    """
    log_a, log_b = np.log(np.asarray(a, float)), np.log(np.asarray(b, float))
    generator = np.random.default_rng(seed)
    if paired:
        difference = log_b - log_a
        means = difference[generator.integers(0, len(difference), (resamples, len(difference)))].mean(1)
        centre = float(difference.mean())
    else:
        mean_a = log_a[generator.integers(0, len(log_a), (resamples, len(log_a)))].mean(1)
        mean_b = log_b[generator.integers(0, len(log_b), (resamples, len(log_b)))].mean(1)
        means, centre = mean_b - mean_a, float(log_b.mean() - log_a.mean())
    low, high = np.percentile(means, (2.5, 97.5))
    return math.exp(centre), math.exp(float(low)), math.exp(float(high))


def compare(runs_a: Sequence[Run], runs_b: Sequence[Run]) -> list[Comparison]:
    """Compare two sets of runs pace by pace.

    Runs that took turns (`Load.round`) are paired; else the windows of each side are samples of their own.

    Raises:
        RecordsError: They have no pace in common.
    """
    comparisons = []
    turns_a, turns_b = _by_turn(runs_a), _by_turn(runs_b)
    if turns_a and turns_a.keys() & turns_b.keys():
        turns = sorted(turns_a.keys() & turns_b.keys())
        pairs = [(turns_a[turn], turns_b[turn]) for turn in turns]
        first, second = [a for a, _ in pairs], [b for _, b in pairs]
        comparisons.append(_compare(first, second, [_run_figures(r) for r in first], [_run_figures(r) for r in second]))
    else:
        for pace in dict.fromkeys(run.load.pace for run in runs_a):
            first = [run for run in runs_a if run.load.pace == pace]
            second = [run for run in runs_b if run.load.pace == pace]
            if second:
                samples_a = [figures for run in first for figures in _windows_figures(run)]
                samples_b = [figures for run in second for figures in _windows_figures(run)]
                comparisons.append(_compare(first, second, samples_a, samples_b, paired=False))
    if not comparisons:
        raise RecordsError(
            f"nothing to compare: A has {_paces(runs_a)}, B has {_paces(runs_b)}; run the same loads on both"
        )
    return comparisons


def differences(a: Mapping[str, Any], b: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """What differs between two headers: (name, A's, B's), without what always does."""
    for key in dict.fromkeys([*a, *b]):
        if key in ("date", "command", "type", "schema"):
            continue
        left, right = a.get(key), b.get(key)
        if isinstance(left, Mapping) and isinstance(right, Mapping):
            yield from differences(left, right, f"{prefix}{key}.")
        elif left != right:
            yield f"{prefix}{key}", left, right


def format_comparisons(runs_a: Sequence[Run], runs_b: Sequence[Run], comparisons: Sequence[Comparison]) -> str:
    """For people: what was changed, what came of it, and whether it is outside the noise."""
    lines = []
    changed = [*differences(runs_a[0].header, runs_b[0].header), *_load_differences(runs_a[0].load, runs_b[0].load)]
    lines += [f"Changed: {name}: {left} -> {right}" for name, left, right in changed] or ["Changed: nothing known"]
    for comparison in comparisons:
        same = comparison.pace_a == comparison.pace_b
        pace = comparison.pace_a if same else f"{comparison.pace_a} -> {comparison.pace_b}"
        samples = comparison.changes[0].samples if comparison.changes else 0
        how = f"{samples} turns, paired" if comparison.paired else f"not interleaved, {samples} windows"
        lines += ["", f"{pace} ({how})", f"{'':<9} {'A':>9} {'B':>9} {'change':>8}  95 % interval"]
        for change in comparison.changes:
            verdict = ("better" if change.better else "worse") if change.outside_noise else "within the noise"
            lines.append(
                f"{change.metric:<9} {change.a:9.2f} {change.b:9.2f} {change.ratio - 1:+8.1%}"
                f"  {change.low - 1:+.1%} to {change.high - 1:+.1%}  {verdict}"
            )
        if not comparison.paired:
            lines.append("Note: the runs did not take turns, as those of `bench ab` do: the machine's drift is in it.")
        elif samples < FEWEST_TURNS:
            lines.append(f"Note: {samples} turns are few, {FEWEST_TURNS} or more make the interval believable.")
        if comparison.invalid:
            lines.append(
                f"Note: {comparison.invalid} of {comparison.runs} runs are INVALID, the first: {comparison.reason}"
            )
    return "\n".join(lines)


def interleave(sides: Sequence[tuple[Session, Load, RecordWriter]], turns: int) -> tuple[list[Run], list[Run]]:
    """Run A and B in turn: A B, B A, A B, ...

    Args:
        sides: A and B: where to, what, and where its records go. The loads' `round` is set here.
        turns: How many.
    """
    runs: tuple[list[Run], list[Run]] = ([], [])
    for turn in range(turns):
        for side in (0, 1) if turn % 2 == 0 else (1, 0):
            session, load, writer = sides[side]
            if session.stop.is_set():
                return runs
            runs[side].append(session.measure(replace(load, round=turn, max_windows=WINDOWS), writer))
    return runs


def _by_turn(runs: Sequence[Run]) -> dict[int, Run]:
    return {run.load.round: run for run in runs if run.load.round is not None and run.end == "finished"}


def _run_figures(run: Run) -> dict[str, float]:
    summary = summarise(run)
    return _figures(summary.images_per_s, summary.latency_ms)


def _windows_figures(run: Run) -> Iterator[dict[str, float]]:
    for window in run.windows[-WINDOWS:]:
        answered = [r for r in run.records if window.start_s <= r.done_s < window.end_s]
        yield _figures(window_figures(run.records, window).images_per_s, latency_figures(answered))


def _figures(images_per_s: float, latency_ms: Mapping[str, float]) -> dict[str, float]:
    nan = math.nan
    return {
        "images/s": images_per_s,
        **{f"{name} ms": latency_ms.get(name, nan) for name in ("mean", "p50", "p99")},
    }


def _compare(
    runs_a: Sequence[Run],
    runs_b: Sequence[Run],
    samples_a: Sequence[Mapping[str, float]],
    samples_b: Sequence[Mapping[str, float]],
    *,
    paired: bool = True,
) -> Comparison:
    changes = []
    for metric in _METRICS:
        a, b = ([sample[metric] for sample in samples] for samples in (samples_a, samples_b))
        if paired:
            both = [(x, y) for x, y in zip(a, b, strict=True) if x > 0 and y > 0]
            a, b = [x for x, _ in both], [y for _, y in both]
        else:
            a, b = [x for x in a if x > 0], [y for y in b if y > 0]
        if a and b:
            ratio, low, high = bootstrap_ratio(a, b, paired=paired)
            centre_a, centre_b = (math.exp(math.fsum(map(math.log, side)) / len(side)) for side in (a, b))
            changes.append(Change(metric, centre_a, centre_b, ratio, low, high, min(len(a), len(b))))
    verdicts = [summarise(run).verdict for run in (*runs_a, *runs_b)]
    wrong = [verdict.reasons[0] for verdict in verdicts if not verdict.valid]
    paces = runs_a[0].load.pace, runs_b[0].load.pace
    return Comparison(*paces, paired, tuple(changes), len(verdicts), len(wrong), wrong[0] if wrong else "")


def _load_differences(a: Load, b: Load) -> Iterator[tuple[str, Any, Any]]:
    for name in ("model", "what", "transport", "rows", "concurrency", "rate", "arrivals"):
        if getattr(a, name) != getattr(b, name):
            yield f"load.{name}", getattr(a, name), getattr(b, name)


def _paces(runs: Sequence[Run]) -> str:
    return ", ".join(dict.fromkeys(run.load.pace for run in runs)) or "no run"
