"""U²-Net and IS-Net: which map is the result; and building models by name."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from matteserve_export.models import MODEL_BUILDERS, build_model  # noqa: E402
from support.conformance import pixel_values  # noqa: E402


def test_forward_is_the_fused_probability() -> None:
    model = build_model("u2netp")
    x = pixel_values(3, (2, 3, 64, 96))
    with torch.no_grad():
        probability = model(x)
        maps = model.side_logits(x)
    assert probability.shape == (2, 1, 64, 96)
    assert [tuple(logits.shape) for logits in maps] == [(2, 1, 64, 96)] * 7
    assert torch.equal(probability, torch.sigmoid(maps[0]))


def test_forward_of_isnet_is_the_finest_probability() -> None:
    model = build_model("isnet")
    x = pixel_values(3, (2, 3, 64, 96))
    with torch.no_grad():
        probability = model(x)
        maps = model.side_logits(x)
    assert [tuple(logits.shape) for logits in maps] == [(2, 1, 64, 96)] * 6
    assert torch.equal(probability, torch.sigmoid(maps[0]))


def test_models_are_built_in_evaluation_mode() -> None:
    assert not any(module.training for module in build_model("u2netp").modules())


def test_unknown_architecture_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown architecture 'u3net'; known ones are: .*u2net, u2netp") as caught:
        build_model("u3net")
    assert all(name in str(caught.value) for name in MODEL_BUILDERS)


def test_unknown_options_are_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"u2netp has no option patch_order; it has none"):
        build_model("u2netp", patch_order="legacy")
    with pytest.raises(ValueError, match=r"birefnet_lite has no option backbone, depth; it has patch_order"):
        build_model("birefnet_lite", depth=2, backbone="swin")
