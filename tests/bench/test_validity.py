"""Each rule, by a run that breaks it and nothing else."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from matteserve_bench import Load, ServerStatistics
from matteserve_bench.validity import FEWEST_ANSWERS, gap_share, is_stable, judge
from support.bench_runs import failing, steady

OPEN = Load(mode="open", model="u2netp", rate=10.0, duration_s=30.0)


def test_a_steady_run_is_valid() -> None:
    verdict = judge(steady())
    assert (verdict.valid, verdict.reasons, verdict.notes) == (True, (), ())
    assert verdict.deviation is not None
    assert verdict.deviation < 0.01


def test_windows_that_do_not_agree() -> None:
    """The second window is answered in half the time: 75, 37.5 and 75 ms are up to 40 % off their mean."""
    run = steady(
        latency_s=0.075,
        change=lambda n, r: r._replace(done_s=r.due_s + 0.0375) if 100 <= n < 200 else r,
        load=OPEN,
    )
    assert judge(run).reasons == ("not settled: one of the last 3 of 3 windows is 40% off their mean, 10% allowed",)
    assert not is_stable(run.records, run.windows, 0.10)
    assert is_stable(run.records, run.windows, 0.50)


def test_only_the_last_three_windows_must_agree() -> None:
    run = steady(windows=5, change=lambda n, r: r._replace(done_s=r.due_s + 0.05) if n < 200 else r, load=OPEN)
    assert judge(run).valid
    assert not is_stable(run.records, run.windows[:3], 0.10)
    assert not is_stable(run.records, run.windows[:2], 0.10)


def test_latency_that_grows_in_open_load() -> None:
    run = steady(change=lambda n, r: r._replace(done_s=r.due_s + 0.1 + 0.02 * n), load=OPEN)
    (reason,) = judge(run).reasons
    assert reason.startswith("not settled")
    assert reason.endswith("latency grows: more is due than the server can do")


def test_too_few_answers() -> None:
    run = steady(window_s=0.9)
    assert judge(run).reasons == (
        f"a window of 0.9 s has 8 answers, {FEWEST_ANSWERS} are needed; measure longer (--duration-s)",
    )
    assert not is_stable(run.records, run.windows, 0.10)


def test_a_window_without_answers() -> None:
    run = steady(change=lambda n, r: r._replace(done_s=r.due_s + 100))
    assert judge(run).deviation is None
    assert "has 0 answers" in judge(run).reasons[0]


def test_too_few_windows() -> None:
    assert judge(steady(windows=2)).reasons == ("2 windows measured, 3 are needed",)


def test_failures_are_allowed_up_to_a_share() -> None:
    run = steady(change=failing(10, "InferenceError"))
    assert judge(run).reasons == ("10.0% of requests failed: InferenceError 30",)
    assert judge(run, max_error_share=0.10).valid


def test_an_interrupted_run() -> None:
    run = dataclasses.replace(steady(windows=1), end="interrupted")
    assert judge(run).reasons == ("interrupted",)


@pytest.mark.parametrize(
    ("of_window", "reason"),
    [
        ({"client_cpu": 0.9, "server_cpu": None}, "the client was the bottleneck: it used 90% of one core"),
        (
            {"client_cpu": 0.5, "machine_cpu": 0.99, "server_cpu": 1.4},
            "the client took 25% of the machine's cores from a server on the same machine, with none idle",
        ),
    ],
)
def test_a_client_that_needs_the_cpu(of_window: dict[str, Any], reason: str) -> None:
    (found,) = judge(steady(**of_window)).reasons
    assert found.startswith(reason)


def test_pictures_may_use_the_cpu() -> None:
    load = Load(model="u2netp", what="images", concurrency=1, duration_s=30.0)
    assert judge(steady(load=load, client_cpu=1.5, machine_cpu=1.0, server_cpu=0.5)).valid


def test_empty_places_of_a_closed_loop() -> None:
    """Answers come after 80 ms and the next request after 100: one fifth of the time nothing was on its way."""
    run = steady(latency_s=0.08)
    assert gap_share(run) == pytest.approx(0.2)
    assert judge(run).reasons == ("the client was the bottleneck: 20% of the time a place was empty after an answer",)


def test_requests_that_leave_late() -> None:
    run = steady(change=lambda n, r: r._replace(sent_s=r.due_s + 0.03) if n % 50 == 0 else r, load=OPEN)
    assert judge(run).reasons == (
        "the client was the bottleneck: 1 % of requests left 30.0 ms late or more, 10.0 ms allowed",
    )
    pictures = dataclasses.replace(OPEN, what="images")
    assert judge(dataclasses.replace(run, load=pictures)).valid


def test_others_on_the_server() -> None:
    run = steady(server=ServerStatistics(inferences=200, executions=100, succeeded=200))
    assert judge(run).reasons == ("others used the model: it inferred 600 images, 300 of them ours",)


def test_others_on_the_machine() -> None:
    assert judge(steady(machine_cpu=0.9)).reasons == ("other processes kept 0.9 of 2 cores busy",)
    assert judge(steady(machine_cpu=1.0, server_cpu=None)).valid  # the server runs elsewhere


def test_notes_do_not_make_a_run_invalid() -> None:
    run = steady(server=None, machine_cpu=0.6)
    assert judge(run).notes == (
        "the server's statistics could not be read",
        "other processes kept 0.3 of 2 cores busy",
    )
    assert judge(run).valid
    few = judge(steady(interval_s=0.4, latency_s=0.4))
    assert few.valid
    assert few.notes == ("p99 of 75 answers is their largest",)


def test_loadgen_has_its_own_rules() -> None:
    load = Load(mode="loadgen", scenario="Server")
    run = dataclasses.replace(steady(windows=1, load=load), extra={"invalid_reasons": ["LoadGen calls it INVALID"]})
    assert judge(run).reasons == ("LoadGen calls it INVALID",)
    assert judge(dataclasses.replace(run, extra={})).valid
