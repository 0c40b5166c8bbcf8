"""The graphs of all architectures: what torch computes, clean, one copy of every weight, any batch."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from matteserve_export.lowering import lower_deform_conv
from matteserve_export.models import MODEL_BUILDERS, build_model
from matteserve_export.to_onnx import ToOnnxConfig, count_nodes, export_core
from support.conformance import fill, pixel_values

_SLOW = pytest.mark.slow


class Case(NamedTuple):
    """One network at one size.

    Attributes:
        form: "native" as exported, "lowered" with `DeformConv` written with other operators, as plans are compiled.
        nodes: Number of nodes of the graph; more means that something is left that should have been folded.
    """

    name: str
    form: Literal["native", "lowered"]
    size: tuple[int, int]
    nodes: int


# At 64x64 nothing needs padding when tokens are merged; at 64x96 the half-size pass has an odd map, one Pad more.
CASES = [
    Case("u2netp", "native", (64, 96), 365),
    Case("isnet", "native", (64, 96), 355),
    Case("birefnet_lite", "native", (64, 96), 1141),
    Case("birefnet_lite", "lowered", (64, 64), 1380),
    Case("birefnet_swin_s", "native", (64, 64), 1968),
    Case("birefnet_pvt_v2_b2", "native", (64, 64), 1480),
]
SLOW_CASES = [
    Case("u2net", "native", (96, 64), 365),
    Case("birefnet_lite", "native", (256, 256), 1140),
    Case("birefnet_lite", "lowered", (128, 96), 1381),
    Case("birefnet_pvt_v2_b2", "native", (96, 128), 1480),
    Case("birefnet_pvt_v2_b2", "lowered", (64, 96), 1720),
    Case("birefnet_swin_s", "lowered", (64, 96), 2209),
    Case("birefnet_swin_b", "native", (64, 64), 1968),
    Case("birefnet_swin_b", "lowered", (64, 96), 2209),
    Case("birefnet", "native", (64, 96), 1969),
    Case("birefnet", "lowered", (64, 64), 2208),
]
ALL = [pytest.param(case, id="-".join(map(str, case))) for case in CASES]
ALL += [pytest.param(case, id="-".join(map(str, case)), marks=_SLOW) for case in SLOW_CASES]


@lru_cache(maxsize=1)
def network(name: str) -> nn.Module:
    model = build_model(name)
    fill(model, seed=1)
    return model


@lru_cache(maxsize=1)
def core(case: Case) -> onnx.ModelProto:
    output = "logits" if case.name.startswith("birefnet") else "probability"
    exported = export_core(network(case.name), ToOnnxConfig(*case.size, output))
    return lower_deform_conv(exported) if case.form == "lowered" else exported


@lru_cache(maxsize=1)
def runner(case: Case) -> Callable[[NDArray[Any]], NDArray[Any]]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(core(case).SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda pixels: session.run(None, {"pixel_values": pixels})[0]


def test_every_architecture_is_here() -> None:
    assert {case.name for case in CASES + SLOW_CASES} == set(MODEL_BUILDERS)


# One test for each case, so that a case's graph is exported once and then let go.
@pytest.mark.parametrize("case", ALL)
def test_graph(case: Case) -> None:
    model, graph = network(case.name), core(case)

    # It computes what torch computes, for any batch, each image for itself.
    x = pixel_values(1, (3, 3, *case.size))
    with torch.no_grad():
        expected = model(x).numpy()
    found = runner(case)(x.numpy())
    assert expected.std() > 0.1
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    alone = np.concatenate([runner(case)(image[None]) for image in x.numpy()])
    np.testing.assert_allclose(alone, found, rtol=0, atol=1e-5)

    # It is clean. The two `Gather` of each transformer block select rows by constant indices.
    counts = count_nodes(graph)
    assert counts.total() == case.nodes, counts
    unwanted = {"Shape", "Slice", "Cast", "Unsqueeze", "Identity", "Constant", "BatchNormalization", "Expand", "Gelu"}
    assert not unwanted & counts.keys()
    constants = {entry.name for entry in graph.graph.initializer}
    assert all(node.input[1] in constants for node in graph.graph.node if node.op_type == "Gather")
    norms = sum(isinstance(module, nn.LayerNorm) for module in model.modules())
    assert counts["LayerNormalization"] == 2 * norms  # the backbone runs twice

    # A weight is stored once, however often it is used.
    stored = sum(len(entry.raw_data) for entry in graph.graph.initializer)
    own = sum(tensor.nbytes for tensor in model.state_dict().values())
    assert stored < 1.08 * own
