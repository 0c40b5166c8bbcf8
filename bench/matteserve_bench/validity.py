"""Whether a figure may be quoted: the rules, each with its reason.

A run is INVALID when it did not settle, when the load generator and not the server set the pace, when too many
requests failed, when others used the server or its machine meanwhile, or when it was interrupted.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from matteserve_bench.figures import (
    WindowFigures,
    due_in_period,
    latency_figures,
    percentile,
    period_of,
    window_figures,
)
from matteserve_bench.generator import NOT_SENT
from matteserve_bench.records import WINDOWS, Record, Run, Window

FEWEST_ANSWERS = 10
"""Answers that a window needs: with fewer, one answer more or less is a change of over 10 % by itself."""
CLIENT_CORE_SHARE = 0.80
"""Share of one core above which the load generator's Python is taken for the bottleneck."""
CLIENT_MACHINE_SHARE = 0.20
"""Share of all busy cores that the generator may take from a server on the same machine, once no core is idle."""
BUSY_MACHINE = 0.95
CLIENT_GAP_SHARE = 0.05
"""Share of the time that a closed loop's places may be empty: between an answer and the next request."""
OTHERS_SHARE = 0.05
"""Images beyond ours that the server may have inferred, as a share of ours."""
OTHER_PROCESSES_SHARE = 0.25
"""Share of the cores of the server's machine, if it is this one, that processes besides client and server may use."""


@dataclass(frozen=True)
class Verdict:
    """Whether a figure may be quoted.

    Attributes:
        valid: It may.
        reasons: Why it may not; empty if it may.
        notes: What a reader should know all the same.
        deviation: Largest deviation of a window from the mean of the three, as a share; None with fewer.
    """

    valid: bool
    reasons: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    deviation: float | None = None


def deviation_of(figures: Sequence[WindowFigures]) -> float:
    """Largest deviation of one window from the mean of all, of throughput or of median latency, as a share."""
    if not all(window.answered for window in figures):
        return math.inf
    deviations = []
    for values in ([f.images_per_s for f in figures], [f.latency_ms for f in figures]):
        mean = math.fsum(values) / len(values)
        deviations += [abs(value / mean - 1) for value in values]
    return max(deviations)


def is_stable(records: Sequence[Record], windows: Sequence[Window], stability: float) -> bool:
    """Whether the last three windows agree: then a run may end."""
    if len(windows) < WINDOWS:
        return False
    figures = [window_figures(records, window) for window in windows[-WINDOWS:]]
    return min(f.answered for f in figures) >= FEWEST_ANSWERS and deviation_of(figures) <= stability


def judge(run: Run, *, max_error_share: float = 0.01) -> Verdict:
    """Apply the rules to a run."""
    reasons: list[str] = []
    notes: list[str] = []
    if run.end != "finished":
        reasons.append("interrupted")
    due = due_in_period(run)
    failed = Counter(record.error for record in due if record.error)
    if due and sum(failed.values()) > max_error_share * len(due):
        kinds = ", ".join(f"{kind} {count}" for kind, count in failed.most_common())
        reasons.append(f"{sum(failed.values()) / len(due):.1%} of requests failed: {kinds}")
    deviation = None
    if run.load.mode == "loadgen":
        reasons += run.extra.get("invalid_reasons", [])
    else:
        deviation = _judge_windows(run, reasons)
    _judge_client(run, due, reasons, notes)
    _judge_others(run, reasons, notes)
    answered = len(due) - sum(failed.values())
    if 0 < answered < 100:
        notes.append(f"p99 of {answered} answers is their largest")
    return Verdict(not reasons, tuple(reasons), tuple(notes), deviation)


def _judge_windows(run: Run, reasons: list[str]) -> float | None:
    windows = run.windows[-WINDOWS:]
    if len(windows) < WINDOWS:
        if run.end == "finished":
            reasons.append(f"{len(windows)} windows measured, {WINDOWS} are needed")
        return None
    figures = [window_figures(run.records, window) for window in windows]
    fewest = min(figure.answered for figure in figures)
    if fewest < FEWEST_ANSWERS:
        reasons.append(
            f"a window of {windows[-1].seconds:.1f} s has {fewest} answers, {FEWEST_ANSWERS} are needed; "
            "measure longer (--duration-s)"
        )
        return None
    deviation = deviation_of(figures)
    if deviation > run.load.stability:
        growing = figures[0].latency_ms < figures[1].latency_ms < figures[2].latency_ms
        why = "; latency grows: more is due than the server can do" if growing and run.load.mode == "open" else ""
        reasons.append(
            f"not settled: one of the last {WINDOWS} of {len(run.windows)} windows is {deviation:.0%} off their mean, "
            f"{run.load.stability:.0%} allowed{why}"
        )
    return deviation


def _judge_client(run: Run, due: Sequence[Record], reasons: list[str], notes: list[str]) -> None:
    """Was the client the bottleneck? With pictures its work is part of what is measured, and only lateness counts."""
    windows = run.windows[-WINDOWS:]
    if run.load.what == "tensors" and windows:
        client = max(window.client_cpu for window in windows)
        if client > CLIENT_CORE_SHARE:
            reasons.append(f"the client was the bottleneck: it used {client:.0%} of one core, which is all Python has")
        local = [window for window in windows if window.server_cpu is not None]
        for window in local[-1:]:
            busy = window.machine_cpu * window.machine_cores
            if window.machine_cpu > BUSY_MACHINE and window.client_cpu > CLIENT_MACHINE_SHARE * busy:
                reasons.append(
                    f"the client took {window.client_cpu / busy:.0%} of the machine's cores from a server on the same "
                    "machine, with none idle"
                )
    if run.load.mode == "closed" and run.load.concurrency and due:
        gap = gap_share(run)
        if gap > CLIENT_GAP_SHARE:
            reasons.append(f"the client was the bottleneck: {gap:.0%} of the time a place was empty after an answer")
    if run.load.mode == "open" and due:
        sent = sorted(1000 * (r.sent_s - r.due_s) for r in due if r.error != NOT_SENT)
        latency = latency_figures(due)
        if sent and latency:
            late, allowed = percentile(sent, 99), max(5.0, 0.1 * latency["p50"])
            # A sender behind its schedule because of the server is no fault; here nothing waits for the server.
            if late > allowed and run.load.what == "tensors":
                reasons.append(
                    f"the client was the bottleneck: 1 % of requests left {late:.1f} ms late or more, "
                    f"{allowed:.1f} ms allowed"
                )
            elif late > allowed:
                notes.append(
                    f"1 % of pictures waited {late:.1f} ms or more for a free worker; that is in their latency"
                )


def gap_share(run: Run) -> float:
    """Share of the time in which places of a closed loop were empty, by Little's law."""
    start_s, end_s = period_of(run)
    places = (run.load.concurrency or 1) * (end_s - start_s)
    if places <= 0:
        return 0.0
    filled = math.fsum(max(0.0, min(r.done_s, end_s) - max(r.sent_s, start_s)) for r in run.records)
    return max(0.0, 1 - filled / places)


def _judge_others(run: Run, reasons: list[str], notes: list[str]) -> None:
    windows = run.windows[-WINDOWS:]
    known = [window.server for window in windows if window.server is not None]
    if len(known) < len(windows) and run.windows:
        notes.append("the server's statistics could not be read")
    if known and len(known) == len(windows):
        start_s, end_s = period_of(run)
        # At both edges requests may be counted on one side and not on the other.
        ours = sum(r.rows for r in run.records if r.done_s >= start_s and r.sent_s < end_s)
        inferences = sum(statistics.inferences for statistics in known)
        if inferences > (1 + OTHERS_SHARE) * ours + FEWEST_ANSWERS:
            reasons.append(f"others used the model: it inferred {inferences} images, {ours} of them ours")
    local = [window for window in windows if window.server_cpu is not None]
    if local:
        others = [
            window.machine_cpu * window.machine_cores - window.client_cpu - (window.server_cpu or 0.0)
            for window in local
        ]
        mean = math.fsum(others) / len(others)
        said = f"other processes kept {mean:.1f} of {local[0].machine_cores} cores busy"
        if mean > OTHER_PROCESSES_SHARE * local[0].machine_cores:
            reasons.append(said)
        elif mean > 0.1 * local[0].machine_cores:
            notes.append(said)
