"""Settings by cost: sensible for a network of milliseconds and for one of many seconds."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, bmm_flop

from matteserve_export.models import MODEL_BUILDERS, build_model
from matteserve_export.sizing import default_batch_size, default_batching, gate_plan, giga_macs
from matteserve_export.weights import REGISTRY, Weights

ALL = pytest.mark.parametrize("weights", REGISTRY.values(), ids=REGISTRY)


@pytest.mark.parametrize("architecture", MODEL_BUILDERS)
def test_every_architecture_was_counted(architecture: str) -> None:
    assert giga_macs(architecture, 320, 320) != giga_macs("never heard of", 320, 320) or architecture == "birefnet"


# The larger BiRefNets share what was counted for the lite one, and take five seconds each.
COUNTED = [
    pytest.param(name, marks=pytest.mark.slow if name.startswith("birefnet") and name != "birefnet_lite" else [])
    for name in MODEL_BUILDERS
]


@pytest.mark.parametrize("architecture", COUNTED)
def test_cost_is_what_a_flop_counter_counts(architecture: str) -> None:
    side = 320 if architecture.startswith("u2net") else 1024

    def products(total: torch.Size, left: torch.Size, right: torch.Size, **_: object) -> int:
        return bmm_flop(left, right)

    in_place = {torch.ops.aten.baddbmm_: products}  # of the deformable convolutions; the counter knows the other form
    with torch.device("meta"), torch.no_grad():
        network, picture = build_model(architecture).eval(), torch.empty(1, 3, side, side)
        with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
            network(picture)
    assert giga_macs(architecture, side, side) == pytest.approx(counter.get_total_flops() / 2e9, rel=1e-3)


def test_cost_grows_with_the_area() -> None:
    assert giga_macs("birefnet", 2048, 1024) == pytest.approx(2 * 1265.8)
    assert giga_macs("u2net", 160, 320) == pytest.approx(58.6 / 2)


@pytest.mark.parametrize(("cost", "batch"), [(0.1, 8), (58.6, 8), (81.3, 4), (159.6, 4), (319.4, 2), (1265.8, 1)])
def test_the_largest_batch_falls_with_the_cost(cost: float, batch: int) -> None:
    assert default_batch_size(cost) == batch


@ALL
def test_a_queue_has_no_bound_unless_one_is_asked_for(weights: Weights) -> None:
    cost = giga_macs(weights.architecture, *weights.input_size)
    batch = default_batch_size(cost)
    batching = default_batching(cost, batch)
    assert not batching.bounded
    assert batching.max_queue_delay_us <= 5_000
    assert (batching.max_queue_delay_us == 0) == (batch == 1)


@ALL
def test_a_bounded_queue_gives_a_slow_machine_time_for_all_of_it(weights: Weights) -> None:
    cost = giga_macs(weights.architecture, *weights.input_size)
    batching = default_batching(cost, 1, max_queue_size=16)
    assert batching.max_queue_size == 16
    timeout_s = batching.default_queue_timeout_us / 1e6
    assert 60 <= timeout_s <= 600
    assert timeout_s == 600 or timeout_s >= 16 * cost / 40


@ALL
def test_gates_cover_the_default_batch_and_stay_affordable(weights: Weights) -> None:
    cost = giga_macs(weights.architecture, *weights.input_size)
    batch = default_batch_size(cost)
    plan = gate_plan(cost, batch)
    assert max(plan.batch_sizes, default=1) == batch
    assert plan.scenes >= 2
    assert plan.pictures >= batch
    # The exporter's own runs: what the comparisons compute stays in proportion, whatever the model.
    assert max(gate_plan(cost, 8).batch_sizes) * cost <= max(650, 2 * cost)


def test_a_batch_of_two_is_always_compared_if_there_are_batches() -> None:
    for cost in (1, 100, 300, 1000, 5000):
        assert gate_plan(cost, 1).batch_sizes == ()
        for largest in (2, 3, 4, 8, 16):
            assert 2 in gate_plan(cost, largest).batch_sizes
