"""Every architecture, fp32 to fp16: within the tolerance that is promised, with weights that follow from names."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
from onnx import TensorProto, numpy_helper

from matteserve_export.compare import gate_graph, make_scenes
from matteserve_export.models import MODEL_BUILDERS
from matteserve_export.precision import convert, tolerance_for
from support.serving_graphs import exported

_SLOW = (pytest.mark.slow, pytest.mark.timeout(1800))


class Case(NamedTuple):
    """One network at one size."""

    name: str
    size: int


FAST = [Case("u2netp", 64), Case("isnet", 64), Case("birefnet_lite", 64)]
SLOW = [
    Case("u2netp", 320),
    Case("u2net", 320),
    Case("isnet", 1024),
    Case("birefnet_pvt_v2_b2", 256),
    Case("birefnet_swin_s", 256),
    Case("birefnet_swin_b", 256),
    Case("birefnet_lite", 1024),
    Case("birefnet", 512),
]
ALL = [pytest.param(case, id=f"{case.name}-{case.size}") for case in FAST]
ALL += [pytest.param(case, id=f"{case.name}-{case.size}", marks=_SLOW) for case in SLOW]


def test_every_architecture_is_here() -> None:
    assert {case.name for case in FAST + SLOW} == set(MODEL_BUILDERS)


@pytest.mark.parametrize("case", ALL)
def test_fp16_is_within_tolerance(case: Case) -> None:
    serving = exported(case.name, case.size)
    reduced = convert(serving, "fp16")
    # Half of it, but for constants that are no weights.
    assert reduced.ByteSize() / serving.ByteSize() < 0.56
    weights = [t for t in reduced.graph.initializer if t.data_type == TensorProto.FLOAT and np.prod(t.dims) > 64]
    assert not [tensor.name for tensor in weights]
    names = [(tuple(t.dims), numpy_helper.to_array(t).tobytes()) for t in reduced.graph.initializer if len(t.dims) > 1]
    assert len(set(names)) == len(names)  # a weight that two nodes read is there once

    images = make_scenes(2, case.size, case.size, seed=2)
    outcomes = gate_graph(reduced, serving, images, tolerance_for("fp16", case.name), batch_sizes=(1, 2))
    assert [outcome.method for outcome in outcomes] == ["ort-cpu", "emulated"]
    for outcome in outcomes:
        outcome.require()
        assert outcome.not_finite == 0
