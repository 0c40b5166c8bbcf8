"""U²-Net: names as in the released checkpoints, values as recorded from the original code, a clean exported graph."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.conformance import fill, pixel_values

torch = pytest.importorskip("torch")

from matteserve_export.models import MODEL_BUILDERS, build_model  # noqa: E402

FOLDER = Path(__file__).parent / "conformance"
CASES = [(name, case) for name in ("u2net", "u2netp") for case in ("a", "odd")]


@pytest.mark.parametrize("name", ["u2net", "u2netp"])
def test_state_dict_is_that_of_the_checkpoints(name: str) -> None:
    expected = json.loads((FOLDER / f"{name}.keys.json").read_text())
    found = [
        [key, list(value.shape), str(value.dtype).removeprefix("torch.")]
        for key, value in build_model(name).state_dict().items()
    ]
    assert found == expected


@pytest.mark.parametrize(("name", "case"), CASES)
def test_outputs_and_intermediate_tensors_equal_the_original(name: str, case: str) -> None:
    vectors = np.load(FOLDER / f"{name}.npz")
    seed, step = int(vectors["seed"]), int(vectors[f"{case}/step"])
    model = build_model(name)
    fill(model, seed)
    tapped: dict[str, Any] = {}
    for module_name, module in model.named_modules():
        module.register_forward_hook(
            lambda _module, _inputs, output, key=module_name: (
                tapped.__setitem__(key, output.numpy().copy()) if isinstance(output, torch.Tensor) else None
            )
        )
    x = pixel_values(seed, tuple(int(n) for n in vectors[f"{case}/shape"]))
    with torch.no_grad():
        maps = model.side_logits(x)

    checked = 0
    for key in vectors.files:
        if key.startswith(f"{case}/at/") and key.endswith("/value"):
            stem = key.removesuffix("/value")
            value = tapped[stem.split("/")[2]].ravel()[vectors[f"{stem}/index"]]
            np.testing.assert_allclose(value, vectors[key], rtol=0, atol=1e-3 * float(vectors[f"{stem}/std"]))
            checked += 1
    assert checked == 21
    # The original code in float32 differs from itself in float64 by 7e-6; a wrong flag moves the map by 5e-5 at least.
    for number, output in ((0, "d0"), (3, "d3")):
        probability = torch.sigmoid(maps[number])[..., ::step, ::step].numpy()
        np.testing.assert_allclose(probability, vectors[f"{case}/{output}"], rtol=0, atol=3e-5)


def test_forward_is_the_fused_probability() -> None:
    model = build_model("u2netp")
    x = pixel_values(3, (2, 3, 64, 96))
    with torch.no_grad():
        probability = model(x)
        maps = model.side_logits(x)
    assert probability.shape == (2, 1, 64, 96)
    assert [tuple(logits.shape) for logits in maps] == [(2, 1, 64, 96)] * 7
    assert torch.equal(probability, torch.sigmoid(maps[0]))


def test_models_are_built_in_evaluation_mode() -> None:
    assert not any(module.training for module in build_model("u2netp").modules())


def test_unknown_architecture_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown architecture 'u3net'; known ones are: .*u2net, u2netp") as caught:
        build_model("u3net")
    assert all(name in str(caught.value) for name in MODEL_BUILDERS)


def test_exported_graph_has_no_shape_arithmetic_and_a_free_batch(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    onnxslim = pytest.importorskip("onnxslim")
    path = tmp_path / "u2netp.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the TorchScript exporter announces its end
        torch.onnx.export(
            build_model("u2netp"),
            (torch.zeros(1, 3, 320, 320),),
            str(path),
            opset_version=17,
            dynamo=False,
            input_names=["pixel_values"],
            output_names=["alpha"],
            dynamic_axes={"pixel_values": {0: "batch"}, "alpha": {0: "batch"}},
        )
    graph = onnxslim.slim(onnx.load(str(path))).graph
    operators = Counter(node.op_type for node in graph.node)
    assert set(operators) == {"Conv", "Relu", "Concat", "Resize", "MaxPool", "Add", "Sigmoid"}
    assert sum(operators.values()) == 365
    assert graph.input[0].type.tensor_type.shape.dim[0].dim_param
