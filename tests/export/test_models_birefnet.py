"""BiRefNet: patch orders, deformable convolution, windows, independence of the images in a batch."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from matteserve_export.models import MODEL_BUILDERS, build_model  # noqa: E402
from matteserve_export.models.birefnet import convert_patch_order, stack_patches  # noqa: E402
from matteserve_export.models.deform_conv import deform_conv2d  # noqa: E402
from matteserve_export.models.swin import window_plan  # noqa: E402
from support.conformance import fill, pixel_values, recorded_vectors  # noqa: E402

BIREFNETS = [name for name in MODEL_BUILDERS if name.startswith("birefnet")]
BIG = {"birefnet": pytest.mark.slow}


@pytest.fixture(scope="module")
def lite() -> nn.Module:
    model = build_model("birefnet_lite")
    fill(model, seed=1)
    return model


@pytest.mark.parametrize("name", [pytest.param(name, marks=BIG.get(name, ())) for name in BIREFNETS])
def test_one_map_of_logits_for_each_image(name: str) -> None:
    model = build_model(name)
    x = pixel_values(2, (2, 3, 64, 96))
    with torch.no_grad():
        logits = model(x)
        alone = model(x[1:])
    assert logits.shape == (2, 1, 64, 96)
    torch.testing.assert_close(logits[1:], alone, rtol=0, atol=1e-4)


def test_size_must_be_a_multiple_of_32(lite: nn.Module) -> None:
    with pytest.raises(ValueError, match="the image is 64x80; BiRefNet needs multiples of 32"):
        lite(torch.zeros(1, 3, 64, 80))


def test_unknown_patch_order_is_refused() -> None:
    with pytest.raises(ValueError, match="patch_order is 'new'; allowed are current, legacy"):
        build_model("birefnet_lite", patch_order="new")


def test_patches_in_both_orders() -> None:
    image = torch.arange(2 * 3 * 4 * 8, dtype=torch.float32).reshape(2, 3, 4, 8)
    current, legacy = stack_patches(image, 2, "current"), stack_patches(image, 2, "legacy")
    for channel in range(3):
        for row in range(2):
            for column in range(2):
                patch = image[:, channel, 2 * row : 2 * row + 2, 4 * column : 4 * column + 4]
                assert torch.equal(current[:, (channel * 2 + row) * 2 + column], patch)
                assert torch.equal(legacy[:, (column * 2 + row) * 3 + channel], patch)


def test_legacy_weights_run_in_a_current_network_once_converted(lite: nn.Module) -> None:
    legacy = build_model("birefnet_lite", patch_order="legacy")
    legacy.load_state_dict(lite.state_dict())
    converted = build_model("birefnet_lite")
    converted.load_state_dict(convert_patch_order(lite.state_dict(), source="legacy"))
    x = pixel_values(1, (1, 3, 64, 96))
    with torch.no_grad():
        expected = legacy(x)
        torch.testing.assert_close(converted(x), expected, rtol=0, atol=1e-5)
        # Without the conversion nothing fails, and the result is another one.
        assert (lite(x) - expected).abs().max() > 0.1


def test_conversion_of_the_patch_order_can_be_undone(lite: nn.Module) -> None:
    state = lite.state_dict()
    there = convert_patch_order(state, source="current", target="legacy")
    back = convert_patch_order(there, source="legacy", target="current")
    assert not torch.equal(there["decoder.ipt_blk3.conv1.weight"], state["decoder.ipt_blk3.conv1.weight"])
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)
    assert all(same is state[name] for name, same in convert_patch_order(state, source="current").items())


def test_only_birefnet_has_a_patch_order() -> None:
    with pytest.raises(ValueError, match=r"no decoder\.ipt_blk5\.conv1\.weight of 3072 channels"):
        convert_patch_order(build_model("u2netp").state_dict(), source="legacy")


@pytest.mark.parametrize("case", range(5))
def test_deformable_convolution_equals_the_recorded_one(case: int) -> None:
    vectors = {key: torch.from_numpy(value) for key, value in recorded_vectors("deform_conv2d").items()}
    x, offset, mask, weight, expected = (
        vectors[f"{case}/{key}"] for key in ("input", "offset", "mask", "weight", "output")
    )
    assert int(vectors[f"{case}/padding"]) == weight.shape[-1] // 2
    torch.testing.assert_close(deform_conv2d(x, offset, mask, weight), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("height", "width", "window", "shift"), [(7, 14, 7, 3), (5, 9, 7, 3), (2, 3, 12, 6), (13, 8, 4, 0)]
)
def test_window_plan_is_padding_roll_and_partition(height: int, width: int, window: int, shift: int) -> None:
    plan = window_plan(height, width, window, shift)
    tokens = torch.arange(1, height * width + 1).reshape(height, width)
    padded = nn.functional.pad(tokens, (0, -width % window, 0, -height % window))
    rolled = padded.roll((-shift, -shift), (0, 1))
    windows = rolled.unfold(0, window, window).unfold(1, window, window).reshape(-1)
    with_padding = torch.cat((tokens.flatten(), torch.zeros(1, dtype=tokens.dtype)))
    assert torch.equal(with_padding[plan.gather], windows)
    assert torch.equal(windows[plan.scatter], tokens.flatten())
    assert (plan.mask is None) == (shift == 0)


def test_window_mask_parts_what_the_roll_brought_together() -> None:
    # Two tokens of a window may see each other if they lie in the map as they lie in the window.
    plan = window_plan(8, 12, 4, 2)
    assert plan.mask is not None
    places = plan.gather.reshape(6, 16)
    in_window = torch.arange(16)
    together = torch.ones(6, 16, 16, dtype=torch.bool)
    for of_map, of_window in ((places // 12, in_window // 4), (places % 12, in_window % 4)):
        together &= of_map[:, :, None] - of_map[:, None] == of_window[:, None] - of_window
    assert torch.equal(plan.mask[:, 0] == 0, together)
