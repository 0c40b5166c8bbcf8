"""Which setting of an engine's batcher, instances and threads is best? The search; measuring is somebody else's.

Coordinate descent, one pass: instances with threads, then batch sizes, then the batcher's delay. On each axis the
setting at hand and its candidates take turns, forwards and then backwards (1 2 3, 3 2 1), so that a machine that drifts
drifts for all of them alike. What came out best is then measured against the present setting in paired turns, and is
proposed only if the bootstrap interval of its gain (see `compare`) leaves out "no change".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from matteserve_bench._errors import TuningError
from matteserve_bench.compare import Change, bootstrap_ratio

LEAST_GAIN = 0.03
"""A smaller difference of throughput counts as none."""
LEAST_SAVING = 0.10
"""With throughput equal, p99 must differ by this share to decide, and after it memory."""
SCREENING_TURNS = 2
_DELAYS_US = (0, 500, 2_000, 8_000)


class TrialError(TuningError):
    """A setting does not load, or does not answer; it is left out and the search goes on."""


class Interrupted(TuningError):  # noqa: N818 - no error: the user has asked for it
    """Measuring was asked to stop."""


@dataclass(frozen=True)
class Setting:
    """What is tuned of an engine.

    Attributes:
        instances: Copies of it.
        threads: ONNX Runtime's threads in each; None leaves them alone (a GPU, a plan, or a count fixed elsewhere).
        max_batch_size: Most rows of an execution, and of a request.
        preferred: Preferred batch sizes; the batcher goes by them only without a delay, and then forms none larger.
        delay_us: How long the first request of a batch waits for others, in microseconds.
    """

    instances: int
    threads: int | None
    max_batch_size: int
    preferred: tuple[int, ...] = ()
    delay_us: int = 0

    def __str__(self) -> str:
        threads = " instances" if self.threads is None else f" x {self.threads} threads"
        batch = max(self.preferred) if self.preferred else self.max_batch_size
        limit = " (preferred)" if self.preferred else ""
        return f"{self.instances}{threads}, batch <= {batch}{limit}, {self.delay_us} us"


@dataclass(frozen=True)
class Figures:
    """One measurement of a setting, or the means of several.

    Attributes:
        images_per_s: Throughput.
        p50_ms: Median latency.
        p99_ms: Its 99th percentile.
        mean_batch: Rows per execution; None if unknown.
        server_mib: Memory of the server's processes; None if it runs elsewhere.
        invalid: Why the bench would not quote it; empty if it would.
    """

    images_per_s: float
    p50_ms: float
    p99_ms: float
    mean_batch: float | None = None
    server_mib: float | None = None
    invalid: str = ""


Measure = Callable[[Setting], Figures]


@dataclass(frozen=True)
class Trial:
    """A setting as it was measured on one axis.

    Attributes:
        setting: The setting.
        turns: Its measurements.
        verdict: What came of it, in a few words.
    """

    setting: Setting
    turns: tuple[Figures, ...]
    verdict: str

    @property
    def figures(self) -> Figures | None:
        """Means over its turns; None if it failed."""
        return mean_figures(self.turns) if self.turns else None


@dataclass(frozen=True)
class Stage:
    """One axis, or the confirmation: the setting at hand comes first."""

    name: str
    trials: tuple[Trial, ...]


@dataclass(frozen=True)
class Outcome:
    """What a search came to.

    Attributes:
        present: The setting that was there.
        stages: What was measured.
        proposal: The setting to change to; None says to keep what is there.
        reason: Why.
        changes: Present against best in the confirmation, with intervals; empty if nothing was better.
        not_tried: Candidates for which `max_trials` left no room.
        interrupted: It was ended early; then there is no proposal.
    """

    present: Setting
    stages: tuple[Stage, ...]
    proposal: Setting | None
    reason: str
    changes: tuple[Change, ...] = ()
    not_tried: tuple[Setting, ...] = ()
    interrupted: bool = False


@dataclass(frozen=True)
class Space:
    """Which candidates make sense.

    Attributes:
        cores: Cores for ONNX Runtime's threads; None if its threads are not to be changed.
        instance_counts: Counts to try where threads are not changed; empty tries none.
        largest_batch: Largest `max_batch_size` that the engine's file allows, 0 for no limit.
        most_waiting: Rows that can wait at one time, so that no batch can be larger; 0 if that is open.
    """

    cores: int | None = None
    instance_counts: tuple[int, ...] = ()
    largest_batch: int = 0
    most_waiting: int = 0

    def layouts(self, at: Setting) -> list[Setting]:
        """Instances, with as many threads in each as there are cores for."""
        if self.cores is not None and at.threads is not None:
            counts = [2**power for power in range(self.cores.bit_length()) if 2**power <= self.cores]
            layouts = [(count, self.cores // count) for count in counts]
            return [replace(at, instances=count, threads=threads) for count, threads in layouts]
        return [replace(at, instances=count) for count in self.instance_counts]

    def batches(self, at: Setting) -> list[Setting]:
        """Smaller batches by preferred sizes, which take nothing from clients; larger ones where they can come about.

        `max_batch_size` is never lowered: clients were promised it, and an alias that promises more than its engine
        takes is unloaded by Triton.
        """
        caps = [(1,), (1, 2, 4)]
        found = [replace(at, preferred=cap, delay_us=0) for cap in caps if cap[-1] < at.max_batch_size]
        double = 2 * at.max_batch_size
        allowed = double <= self.largest_batch if self.largest_batch else at.max_batch_size > 1
        if allowed and not 0 < self.most_waiting <= at.max_batch_size:
            found.append(replace(at, max_batch_size=double, preferred=()))
        return found

    def delays(self, at: Setting) -> list[Setting]:
        """Delays of the batcher; where nothing can join a batch there is nothing to wait for."""
        if at.preferred or at.max_batch_size == 1:
            return []
        return [replace(at, delay_us=delay) for delay in _DELAYS_US]

    def axes(self) -> list[tuple[str, Callable[[Setting], list[Setting]]]]:
        """(name, candidates around a setting), in the order in which they are searched."""
        return [("instances x threads", self.layouts), ("batch", self.batches), ("delay", self.delays)]


def plan(present: Setting, space: Space, *, max_trials: int, turns: int) -> tuple[int, int]:
    """(settings, measurements) that a search takes at most, as seen from the present setting.

    A move on one axis can make the present value of a later one a candidate more, or leave candidates without a sense.
    """
    trials = measurements = 0
    for _, around in space.axes():
        found = min(len(_candidates(around(present), {present})), max_trials - trials)
        trials += found
        measurements += SCREENING_TURNS * (1 + found) if found else 0
    return trials, measurements + (2 * turns if trials else 0)


def search(
    present: Setting,
    space: Space,
    measure: Measure,
    *,
    slo_ms: float | None = None,
    max_trials: int = 12,
    turns: int = 5,
) -> Outcome:
    """Find the best setting and say whether it is better than the present one.

    The best has the highest throughput among those whose p99 is within the bound; where throughput is equal within 3 %,
    the lower p99 (by 10 %), then the smaller memory (by 10 %).

    Args:
        present: The setting to begin with.
        space: Candidates.
        measure: Measures a setting; raises `TrialError` if it cannot be used, `Interrupted` to end the search.
        slo_ms: Bound of p99; None sets none.
        max_trials: Most settings to try besides the present one.
        turns: Paired turns of the confirmation.

    Raises:
        TuningError: The setting at hand, from which the search goes on, fails.
    """
    stages: list[Stage] = []
    best, seen, not_tried = present, {present}, list[Setting]()
    left = max_trials
    try:
        for name, around in space.axes():
            candidates = _candidates(around(best), seen)
            not_tried += candidates[left:]
            candidates = candidates[:left]
            if not candidates:
                continue
            left -= len(candidates)
            seen |= set(candidates)
            stage, best = _screen(name, best, candidates, measure, slo_ms)
            stages.append(stage)
        reason = _out_of_reach(stages, slo_ms)
        if not reason and best == present:
            reason = "nothing that was tried is better" if stages else "there was nothing to try"
        if reason:
            return Outcome(present, tuple(stages), None, reason, not_tried=tuple(not_tried))
        failures: dict[Setting, str] = {}
        pairs = _turns([present, best], measure, turns, fatal=present, failures=failures)
    except Interrupted:
        return Outcome(present, tuple(stages), None, "interrupted", not_tried=tuple(not_tried), interrupted=True)
    if best in failures:
        reason = f"{best} failed when confirmed: {failures[best]}"
        return Outcome(present, tuple(stages), None, reason, not_tried=tuple(not_tried))
    changes = _changes(pairs[present], pairs[best])
    proposed, reason = _confirm(mean_figures(pairs[present]), mean_figures(pairs[best]), changes, slo_ms)
    stages.append(
        Stage(
            f"confirmation, {turns} paired turns",
            (
                Trial(present, tuple(pairs[present]), "present"),
                Trial(best, tuple(pairs[best]), "proposed" if proposed else "not proposed"),
            ),
        )
    )
    return Outcome(present, tuple(stages), best if proposed else None, reason, changes, tuple(not_tried))


def mean_figures(turns: Sequence[Figures]) -> Figures:
    """Geometric means over turns, as ratios are made of them."""
    batches = [turn.mean_batch for turn in turns if turn.mean_batch]
    memory = [turn.server_mib for turn in turns if turn.server_mib]
    return Figures(
        _mean([turn.images_per_s for turn in turns]),
        _mean([turn.p50_ms for turn in turns]),
        _mean([turn.p99_ms for turn in turns]),
        _mean(batches) if batches else None,
        _mean(memory) if memory else None,
        next((turn.invalid for turn in turns if turn.invalid), ""),
    )


def _mean(values: Sequence[float]) -> float:
    return math.exp(math.fsum(map(math.log, values)) / len(values))


def weigh(candidate: Figures, at: Figures, slo_ms: float | None) -> tuple[bool, str]:
    """(better, in words): a candidate against the setting at hand, measured in the same turns."""
    keeps, kept = (slo_ms is None or figures.p99_ms <= slo_ms for figures in (candidate, at))
    throughput, p99 = candidate.images_per_s / at.images_per_s - 1, candidate.p99_ms / at.p99_ms - 1
    if not keeps:
        lower = not kept and p99 <= -LEAST_SAVING
        return lower, f"p99 over {slo_ms:g} ms" + (f", but {p99:+.0%}" if lower else "")
    if not kept:
        return True, f"p99 within {slo_ms:g} ms"
    if abs(throughput) >= LEAST_GAIN:
        return throughput > 0, f"{throughput:+.0%} images/s"
    if abs(p99) >= LEAST_SAVING:
        return p99 < 0, f"p99 {p99:+.0%}"
    if candidate.server_mib and at.server_mib:
        memory = candidate.server_mib / at.server_mib - 1
        if abs(memory) >= LEAST_SAVING:
            return memory < 0, f"memory {memory:+.0%}"
    return False, "no difference"


def _candidates(settings: Iterable[Setting], seen: set[Setting]) -> list[Setting]:
    return [setting for setting in dict.fromkeys(settings) if setting not in seen]


def _screen(
    name: str, at: Setting, candidates: Sequence[Setting], measure: Measure, slo_ms: float | None
) -> tuple[Stage, Setting]:
    failures: dict[Setting, str] = {}
    measured = _turns([at, *candidates], measure, SCREENING_TURNS, fatal=at, failures=failures)
    best, verdicts = at, dict[Setting, str]()
    for setting in candidates:
        if setting in failures:
            verdicts[setting] = f"failed: {failures[setting]}"
            continue
        figures = mean_figures(measured[setting])
        _, verdicts[setting] = weigh(figures, mean_figures(measured[at]), slo_ms)
        if weigh(figures, mean_figures(measured[best]), slo_ms)[0]:
            best = setting
    verdicts[at] = "at hand"
    if best != at:
        verdicts[best] += ", taken"
    trials = (Trial(s, () if s in failures else tuple(measured[s]), verdicts[s]) for s in (at, *candidates))
    return Stage(name, tuple(trials)), best


def _turns(
    settings: Sequence[Setting],
    measure: Measure,
    turns: int,
    *,
    fatal: Setting,
    failures: dict[Setting, str],
) -> dict[Setting, list[Figures]]:
    """Measure settings in turn, every other turn backwards; what fails goes to `failures` and is not asked again."""
    measured: dict[Setting, list[Figures]] = {setting: [] for setting in settings}
    for turn in range(turns):
        for setting in settings if turn % 2 == 0 else reversed(settings):
            if setting in failures:
                continue
            try:
                measured[setting].append(measure(setting))
            except TrialError as exc:
                if setting == fatal:
                    raise TuningError(f"the setting to compare with ({setting}) fails: {exc}") from exc
                failures[setting] = str(exc)
    return measured


def _changes(present: Sequence[Figures], best: Sequence[Figures]) -> tuple[Change, ...]:
    changes = []
    for metric, of in _METRICS.items():
        a, b = [of(figures) for figures in present], [of(figures) for figures in best]
        ratio, low, high = bootstrap_ratio(a, b, paired=True)
        changes.append(Change(metric, _mean(a), _mean(b), ratio, low, high, len(a)))
    return tuple(changes)


_METRICS: dict[str, Callable[[Figures], float]] = {
    "images/s": lambda figures: figures.images_per_s,
    "p50 ms": lambda figures: figures.p50_ms,
    "p99 ms": lambda figures: figures.p99_ms,
}


def _confirm(present: Figures, best: Figures, changes: Sequence[Change], slo_ms: float | None) -> tuple[bool, str]:
    """Whether the best one is better outside the noise, and why (not)."""
    throughput, _, p99 = changes
    if slo_ms is not None and best.p99_ms > slo_ms:
        return False, f"p99 of the best was {best.p99_ms:.1f} ms when confirmed, over the bound of {slo_ms:g} ms"
    if slo_ms is not None and present.p99_ms > slo_ms:
        if p99.outside_noise:
            return True, f"p99 {best.p99_ms:.1f} ms instead of {present.p99_ms:.1f} ms, within {slo_ms:g} ms"
        return False, "p99 is within the bound, but the difference is within the noise"
    if throughput.outside_noise and abs(throughput.ratio - 1) >= LEAST_GAIN:
        words = f"{throughput.ratio - 1:+.1%} images/s ({throughput.low - 1:+.1%} to {throughput.high - 1:+.1%})"
        return throughput.better, words if throughput.better else f"{words}: slower when confirmed"
    if p99.outside_noise and abs(p99.ratio - 1) >= LEAST_SAVING:
        words = f"p99 {p99.ratio - 1:+.1%} ({p99.low - 1:+.1%} to {p99.high - 1:+.1%}) at the same throughput"
        return p99.better, words if p99.better else f"{words}: worse when confirmed"
    if best.server_mib and present.server_mib and best.server_mib <= (1 - LEAST_SAVING) * present.server_mib:
        return True, f"{best.server_mib:.0f} MiB instead of {present.server_mib:.0f} MiB at the same speed"
    return False, "the gain that the search saw is within the noise, or too small, when confirmed"


def _out_of_reach(stages: Sequence[Stage], slo_ms: float | None) -> str:
    """Says that nothing that was measured keeps the bound, if so."""
    known = [(trial.setting, trial.figures) for stage in stages for trial in stage.trials]
    measured = [(setting, figures) for setting, figures in known if figures is not None]
    if slo_ms is None or not measured or any(figures.p99_ms <= slo_ms for _, figures in measured):
        return ""
    setting, figures = min(measured, key=lambda pair: pair[1].p99_ms)
    return (
        f"no setting keeps p99 within {slo_ms:g} ms at this load, the nearest is {setting} at {figures.p99_ms:.1f} ms; "
        "less load would"
    )
