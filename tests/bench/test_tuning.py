"""Searches on servers that are formulas."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from tritonclient.grpc import model_config_pb2 as pb

from matteserve_bench import Load, TuningError
from matteserve_bench.tuned_engine import changed, setting_of
from matteserve_bench.tuning import (
    Figures,
    Interrupted,
    Setting,
    Space,
    TrialError,
    mean_figures,
    plan,
    search,
    weigh,
)
from matteserve_bench.tuning_report import TuningReport, unified_diff
from support.bench_runs import HEADER

PRESENT = Setting(instances=1, threads=4, max_batch_size=8, delay_us=500)
TWO = replace(PRESENT, instances=2, threads=2)
FOUR = replace(PRESENT, instances=4, threads=1)
SPACE = Space(cores=4, most_waiting=8)
ONE_AXIS = Space(instance_counts=(1, 2))
PLAIN = Setting(instances=1, threads=None, max_batch_size=1)
PLAIN_TWO = replace(PLAIN, instances=2)


def figures(images_per_s: float, p99_ms: float = 100.0, mib: float | None = 300.0) -> Figures:
    return Figures(images_per_s, p99_ms / 2, p99_ms, 2.0, mib)


class Server:
    """Answers like a formula, and writes down what it was asked."""

    def __init__(self, formula: Callable[[Setting], Figures]) -> None:
        self.formula = formula
        self.asked: list[Setting] = []

    def __call__(self, setting: Setting) -> Figures:
        self.asked.append(setting)
        return self.formula(setting)


def formula(setting: Setting) -> Figures:
    """Two instances are 20 % faster, four no faster still; a millisecond of delay costs 10 %, smaller batches 20 %."""
    speed = {1: 10.0, 2: 12.0, 4: 12.1}[setting.instances] * (1 - setting.delay_us / 10_000)
    return figures(speed * (0.8 if setting.preferred else 1), mib=300.0 * setting.instances)


def two(one: Figures, other: Figures) -> Callable[[Setting], Figures]:
    """A server with one instance, and with two."""
    return lambda setting: one if setting.instances == 1 else other


def test_it_walks_one_axis_after_the_other() -> None:
    outcome = search(PRESENT, SPACE, formula)
    best = replace(TWO, delay_us=0)
    assert [(stage.name, [(t.setting, t.verdict) for t in stage.trials]) for stage in outcome.stages] == [
        ("instances x threads", [(PRESENT, "at hand"), (TWO, "+20% images/s, taken"), (FOUR, "+21% images/s")]),
        (
            "batch",
            [
                (TWO, "at hand"),
                (replace(TWO, preferred=(1,), delay_us=0), "-16% images/s"),
                (replace(TWO, preferred=(1, 2, 4), delay_us=0), "-16% images/s"),
            ],
        ),
        (
            "delay",
            [
                (TWO, "at hand"),
                (best, "+5% images/s, taken"),
                (replace(TWO, delay_us=2000), "-16% images/s"),
                (replace(TWO, delay_us=8000), "-79% images/s"),
            ],
        ),
        ("confirmation, 5 paired turns", [(PRESENT, "present"), (best, "proposed")]),
    ]
    assert outcome.proposal == best
    assert outcome.reason == "+26.3% images/s (+26.3% to +26.3%)"
    assert [change.metric for change in outcome.changes] == ["images/s", "p50 ms", "p99 ms"]


def test_turns_go_forwards_and_backwards() -> None:
    server = Server(formula)
    search(PRESENT, SPACE, server, turns=3)
    assert server.asked[:6] == [PRESENT, TWO, FOUR, FOUR, TWO, PRESENT]
    best = replace(TWO, delay_us=0)
    assert server.asked[-6:] == [PRESENT, best, best, PRESENT, PRESENT, best]


def test_drift_is_no_gain_and_hides_none() -> None:
    """The machine loses 5 % of its speed with every measurement."""
    for gain, proposal in ((1.0, None), (1.1, PLAIN_TWO)):
        server = Server(lambda setting: figures(1.0))
        server.formula = lambda s, gain=gain, server=server: figures(  # type: ignore[misc]
            10 * 0.95 ** len(server.asked) * (gain if s.instances == 2 else 1)
        )
        assert search(PLAIN, ONE_AXIS, server, turns=6).proposal == proposal


def test_noise_is_rarely_proposed() -> None:
    """Nothing is better than anything, with 5 % of noise: the 95 % interval should be fooled now and then only."""
    proposed = 0
    for seed in range(100):
        generator = np.random.default_rng(seed)
        outcome = search(
            PRESENT, SPACE, lambda _, g=generator: figures(*np.array([10, 100]) * g.lognormal(0, 0.05, 2))  # type: ignore[misc]
        )  # fmt: skip
        proposed += outcome.proposal is not None
    assert proposed <= 12


def test_a_gain_that_does_not_come_back_is_not_proposed() -> None:
    server = Server(lambda _: figures(10.0))
    server.formula = lambda s: figures(15.0 if s == PLAIN_TWO and len(server.asked) <= 4 else 10.0)
    outcome = search(PLAIN, ONE_AXIS, server)
    assert outcome.stages[0].trials[1].verdict == "+50% images/s, taken"
    assert outcome.stages[-1].trials[1].verdict == "not proposed"
    assert outcome.proposal is None
    assert outcome.reason == "the gain that the search saw is within the noise, or too small, when confirmed"


@pytest.mark.parametrize(
    ("one", "other", "slo_ms", "proposed", "reason"),
    [
        (figures(10, 100), figures(12, 250), None, True, "+20.0% images/s (+20.0% to +20.0%)"),
        (figures(10, 100), figures(12, 250), 200, False, "nothing that was tried is better"),
        (figures(10, 250), figures(8, 100), 200, True, "p99 100.0 ms instead of 250.0 ms, within 200 ms"),
        (figures(10, 250), figures(8, 100), None, False, "nothing that was tried is better"),
        (figures(10, 100), figures(10.2, 100), None, False, "nothing that was tried is better"),
        (figures(10, 100), figures(10.2, 85), None, True, "p99 -15.0% (-15.0% to -15.0%) at the same throughput"),
        (figures(10, 100, 300), figures(10, 95, 200), None, True, "200 MiB instead of 300 MiB at the same speed"),
        (
            figures(10, 400),
            figures(20, 300),
            200,
            False,
            "no setting keeps p99 within 200 ms at this load, the nearest is 2 instances, batch <= 1, 0 us at 300.0 "
            "ms; less load would",
        ),
        (figures(10, 100, None), figures(10, 95, None), None, False, "nothing that was tried is better"),
        (
            figures(10, 250),
            figures(20, 240),
            200,
            False,
            "no setting keeps p99 within 200 ms at this load, the nearest is 2 instances, batch <= 1, 0 us at 240.0 "
            "ms; less load would",
        ),
    ],
    ids=[
        "fastest",
        "bound",
        "into the bound",
        "no bound",
        "tie",
        "latency",
        "memory",
        "nearer",
        "nothing known",
        "no way",
    ],
)
def test_what_is_better(one: Figures, other: Figures, slo_ms: float | None, proposed: bool, reason: str) -> None:
    outcome = search(PLAIN, ONE_AXIS, two(one, other), slo_ms=slo_ms)
    assert (outcome.proposal, outcome.reason) == (PLAIN_TWO if proposed else None, reason)


@pytest.mark.parametrize(
    ("screened", "confirmed", "slo_ms", "reason"),
    [
        (figures(12), figures(12, 250), 200, "p99 of the best was 250.0 ms when confirmed, over the bound of 200 ms"),
        (figures(12), figures(9), None, "-10.0% images/s (-10.0% to -10.0%): slower when confirmed"),
        (
            figures(12),
            figures(10, 150),
            None,
            "p99 +50.0% (+50.0% to +50.0%) at the same throughput: worse when confirmed",
        ),
    ],
)
def test_what_a_confirmation_refuses(screened: Figures, confirmed: Figures, slo_ms: float | None, reason: str) -> None:
    server = Server(lambda _: figures(10))
    server.formula = lambda s: figures(10) if s == PLAIN else screened if len(server.asked) <= 4 else confirmed
    outcome = search(PLAIN, ONE_AXIS, server, slo_ms=slo_ms)
    assert (outcome.proposal, outcome.reason) == (None, reason)


def test_a_bound_reached_by_luck_is_not_proposed() -> None:
    server = Server(lambda _: figures(10))
    values = iter([250, 190, 150, 250, *(210, 190, 180, 215, 195, 205, 205, 230, 190, 200)])
    server.formula = lambda s: figures(10, next(values))
    outcome = search(PLAIN, ONE_AXIS, server, slo_ms=200)
    assert outcome.reason == "p99 is within the bound, but the difference is within the noise"


def test_over_the_bound_it_goes_towards_it() -> None:
    assert weigh(figures(5, 300), figures(10, 400), 200) == (True, "p99 over 200 ms, but -25%")
    assert weigh(figures(20, 390), figures(10, 400), 200) == (False, "p99 over 200 ms")


def test_a_setting_that_fails_is_left_out() -> None:
    def fails(setting: Setting) -> Figures:
        if setting.instances == 4:
            raise TrialError("out of memory")
        return formula(setting)

    server = Server(fails)
    outcome = search(PRESENT, SPACE, server)
    assert outcome.stages[0].trials[2].verdict == "failed: out of memory"
    assert outcome.stages[0].trials[2].figures is None
    assert server.asked.count(FOUR) == 1
    assert outcome.proposal == replace(TWO, delay_us=0)


def test_a_best_one_that_fails_at_last_is_not_proposed() -> None:
    server = Server(formula)

    def fails_late(setting: Setting) -> Figures:
        if setting == PLAIN_TWO and len(server.asked) > 4:
            raise TrialError("gone")
        return figures(10.0 * setting.instances)

    server.formula = fails_late
    outcome = search(PLAIN, ONE_AXIS, server)
    assert (outcome.proposal, outcome.reason) == (None, f"{PLAIN_TWO} failed when confirmed: gone")


def test_a_present_setting_that_fails_ends_it() -> None:
    def fails(_: Setting) -> Figures:
        raise TrialError("no answer")

    with pytest.raises(TuningError, match=r"the setting to compare with \(1 x 4 threads.*\) fails: no answer"):
        search(PRESENT, SPACE, fails)


@pytest.mark.parametrize("max_trials", [1, 3, 5, 12])
def test_the_budget_is_kept_and_said_beforehand(max_trials: int) -> None:
    server = Server(lambda _: figures(10.0))
    outcome = search(PRESENT, SPACE, server, max_trials=max_trials)
    trials, measurements = plan(PRESENT, SPACE, max_trials=max_trials, turns=5)
    tried = sum(len(stage.trials) - 1 for stage in outcome.stages)
    assert tried == trials == min(max_trials, 7)
    assert len(outcome.not_tried) == 7 - trials
    assert len(server.asked) <= measurements  # here nothing was to be confirmed
    server = Server(formula)
    search(PRESENT, SPACE, server, max_trials=max_trials)
    assert len(server.asked) <= measurements


def test_nothing_to_try() -> None:
    server = Server(formula)
    outcome = search(PLAIN, Space(), server)
    assert (outcome.proposal, outcome.reason, server.asked) == (None, "there was nothing to try", [])
    assert plan(PLAIN, Space(), max_trials=12, turns=5) == (0, 0)


@pytest.mark.parametrize("after", [1, 8, 20])
def test_an_interrupted_search_proposes_nothing(after: int) -> None:
    server = Server(formula)

    def interrupted(setting: Setting) -> Figures:
        if len(server.asked) > after:
            raise Interrupted("interrupted")
        return formula(setting)

    server.formula = interrupted
    outcome = search(PRESENT, SPACE, server)
    assert outcome.interrupted
    assert outcome.proposal is None
    assert len(server.asked) == after + 1
    assert len(outcome.stages) == {1: 0, 8: 1, 20: 3}[after]


@pytest.mark.parametrize(
    ("space", "at", "layouts"),
    [
        (Space(cores=2), PRESENT, [(1, 2), (2, 1)]),
        (Space(cores=6), PRESENT, [(1, 6), (2, 3), (4, 1)]),
        (Space(cores=1), PRESENT, [(1, 1)]),
        (Space(cores=8), replace(PRESENT, threads=None), []),
        (Space(instance_counts=(1, 2, 3)), replace(PRESENT, threads=None), [(1, None), (2, None), (3, None)]),
    ],
)
def test_threads_fit_the_cores(space: Space, at: Setting, layouts: list[tuple[int, int | None]]) -> None:
    found = space.layouts(at)
    assert [(setting.instances, setting.threads) for setting in found] == layouts
    assert all(s.instances * (s.threads or 0) <= (space.cores or 0) for s in found)


@pytest.mark.parametrize(
    ("space", "batch", "found"),
    [
        (Space(most_waiting=8), 8, [(8, (1,)), (8, (1, 2, 4))]),
        (Space(most_waiting=16), 8, [(8, (1,)), (8, (1, 2, 4)), (16, ())]),
        (Space(), 4, [(4, (1,)), (8, ())]),
        (Space(largest_batch=8), 8, [(8, (1,)), (8, (1, 2, 4))]),
        (Space(largest_batch=16), 8, [(8, (1,)), (8, (1, 2, 4)), (16, ())]),
        (Space(), 1, []),  # a graph that takes one picture
    ],
)
def test_batches_never_shrink_what_clients_were_promised(
    space: Space, batch: int, found: list[tuple[int, tuple[int, ...]]]
) -> None:
    at = replace(PRESENT, max_batch_size=batch)
    candidates = space.batches(at)
    assert [(setting.max_batch_size, setting.preferred) for setting in candidates] == found
    assert all(setting.delay_us == 0 for setting in candidates if setting.preferred)


def test_there_is_nothing_to_wait_for_without_batches() -> None:
    assert Space().delays(replace(PRESENT, preferred=(1,))) == []
    assert Space().delays(replace(PRESENT, max_batch_size=1)) == []


def engine_config(**changes: object) -> pb.ModelConfig:
    config = pb.ModelConfig(
        name="e",
        max_batch_size=8,
        instance_group=[pb.ModelInstanceGroup(count=1, kind=pb.ModelInstanceGroup.KIND_CPU)],
        dynamic_batching=pb.ModelDynamicBatching(max_queue_delay_microseconds=500),
    )
    config.dynamic_batching.default_queue_policy.max_queue_size = 64
    return config


def test_a_setting_is_read_from_a_configuration_and_put_back_into_it() -> None:
    config = engine_config()
    assert setting_of(config, 4) == PRESENT
    assert setting_of(config, None) == replace(PRESENT, threads=None)
    assert "intra_op_thread_count" not in config.parameters
    wanted = Setting(2, 2, 16, (1, 2), 0)
    new = changed(config, PRESENT, wanted)
    assert setting_of(new, 4) == wanted
    assert new.instance_group[0].kind == pb.ModelInstanceGroup.KIND_CPU
    assert new.dynamic_batching.default_queue_policy.max_queue_size == 64
    assert changed(new, wanted, replace(PRESENT, threads=2)) == changed(config, PRESENT, replace(PRESENT, threads=2))
    assert changed(config, PRESENT, PRESENT) == config == engine_config()


def test_what_triton_filled_in_is_not_taken_for_a_wish() -> None:
    """It answers with the largest batch as preferred size where the file has none."""
    config = engine_config()
    config.dynamic_batching.preferred_batch_size.append(8)
    assert setting_of(config, 4) == PRESENT
    new = changed(config, PRESENT, replace(PRESENT, max_batch_size=16))
    assert list(new.dynamic_batching.preferred_batch_size) == []
    del config.instance_group[:]
    assert setting_of(config, 4) == PRESENT
    assert changed(config, PRESENT, TWO).instance_group[0].count == 2


def test_means_are_those_of_ratios() -> None:
    assert mean_figures([Figures(4, 1, 2), Figures(9, 4, 8, 3.0, 100.0, "noisy")]) == Figures(
        pytest.approx(6), pytest.approx(2), pytest.approx(4), pytest.approx(3), pytest.approx(100), "noisy"
    )


LOAD = Load(model="u2netp", concurrency=8)


def test_the_report_says_all_of_it() -> None:
    def measured(setting: Setting) -> Figures:
        if setting.instances == 4:
            raise TrialError("does not load")
        return replace(formula(setting), invalid="not settled" if setting == PRESENT else "", server_mib=None)

    outcome = search(PRESENT, SPACE, measured, max_trials=4)
    found = TuningReport(outcome, LOAD, HEADER, slo_ms=200, notes=["threads are fixed"], diff="--- a\n+++ b\n")
    text = found.text()
    lines = text.splitlines()
    assert lines[0] == "u2netp -> u2netp_onnx_fp32 at concurrency 8, tensors over grpc, p99 <= 200 ms"
    assert "2 x 2 threads, batch <= 8, 500 us     11.40     50.0    100.0   2.00      -  +20% images/s, taken" in lines
    assert "4 x 1 threads, batch <= 8, 500 us         -        -        -      -      -  failed: does not load" in lines
    assert "2 x 2 threads, batch <= 1 (preferred), 0 us" in text
    assert "images/s       9.50     11.40   +20.0%  +20.0% to +20.0%  better" in lines
    assert "p99 ms       100.00    100.00    +0.0%  +0.0% to +0.0%  within the noise" in lines
    assert "Note: 7 of 20 measurements are INVALID, the first: not settled" in lines
    assert "Note: threads are fixed" in lines
    assert "Note: no room was left (--max-trials) for 3 more: 2 x 2 threads, batch <= 8, 0 us; " in text
    assert "Proposal: 2 x 2 threads, batch <= 8, 500 us, for +20.0% images/s (+20.0% to +20.0%)" in lines
    assert lines[-1].startswith("Environment: AMD EPYC, 2 cores")
    report = json.loads(json.dumps(found.to_dict(written=False)))
    assert report["proposal"] == {"instances": 2, "threads": 2, "max_batch_size": 8, "preferred": [], "delay_us": 500}
    assert len(report["stages"][0]["trials"][0]["turns"]) == 2
    assert (report["environment"], report["diff"], report["written"]) == (HEADER, found.diff, False)


def test_the_report_says_to_keep_it() -> None:
    kept = search(PLAIN, ONE_AXIS, lambda _: figures(10))
    text = TuningReport(kept, LOAD, HEADER).text()
    assert "Keep what you have (1 instances, batch <= 1, 0 us): nothing that was tried is better" in text
    stopped = dataclasses.replace(kept, interrupted=True)
    assert "Interrupted: no proposal" in TuningReport(stopped, LOAD, HEADER).text()


def test_the_diff_warns_of_lost_comments() -> None:
    assert unified_diff("a\n", "b\n", None, "e") == "--- e/config.pbtxt\n+++ e/config.pbtxt\n@@ -1 +1 @@\n-a\n+b\n"
    assert unified_diff("a\n", "a\n", None, "e") == ""
    assert unified_diff("a # why\n", "b\n", None, "e").startswith("# comments of the file would be lost")
