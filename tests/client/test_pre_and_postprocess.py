"""Contract-driven resizing, parity mode, alpha and cut-out."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from matteserve_client import ContractError, Matte, ModelContract, Timings
from matteserve_client._images import Picture, load_picture
from matteserve_client._postprocess import full_size_alpha
from matteserve_client._preprocess import FILTERS, check_parity, image_tensor

RNG = np.random.default_rng(3)
CONTRACT = ModelContract(
    height=24,
    width=32,
    max_batch_size=8,
    resample="bilinear",
    alpha_resample="bicubic",
    architecture="u2net",
    weights="w",
)
TIMINGS = Timings(decode=1.0, preprocess=2.0, request=3.0, postprocess=4.0)


def photo(height: int = 50, width: int = 70, channels: int = 3, top: int = 255) -> Any:
    return RNG.integers(0, top + 1, (height, width, channels), np.uint8)


def make_matte(image: Any, answer: Any) -> Matte:
    picture = load_picture(image)
    return Matte("demo", TIMINGS, full_size_alpha(answer, picture, CONTRACT), picture)


@pytest.mark.parametrize("name", FILTERS)
def test_tensor_follows_the_contract(name: Any) -> None:
    image = photo()
    tensor = image_tensor(load_picture(image), replace(CONTRACT, resample=name))
    assert tensor.shape == (1, 24, 32, 3)
    assert tensor.dtype == np.uint8
    expected = Image.fromarray(image).resize((32, 24), getattr(Image.Resampling, name.upper()))
    np.testing.assert_array_equal(tensor[0], np.asarray(expected))


def test_filters_of_the_contract_are_all_known() -> None:
    from typing import get_args

    from matteserve_client._contract import ResampleFilter

    assert set(get_args(ResampleFilter)) == set(FILTERS)


@pytest.mark.parametrize("top", [255, 254, 200, 3, 1, 0])
def test_parity_divides_by_the_maximum_of_the_resized_picture(top: int) -> None:
    image = np.full((24, 32, 3), top, np.uint8)
    image[:12] = top // 2
    tensor = image_tensor(load_picture(image), CONTRACT, parity="rembg")
    resized = np.asarray(Image.fromarray(image).resize((32, 24), Image.Resampling.LANCZOS)).astype(np.float64)
    exact = resized / max(resized.max(), 1e-6) * 255
    assert np.abs(tensor[0] - exact).max() <= 0.5
    assert tensor.max() == (255 if top else 0)


def test_parity_is_exact_where_the_maximum_is_255() -> None:
    image = photo()
    image[:20] = 255
    expected = np.asarray(Image.fromarray(image).resize((32, 24), Image.Resampling.LANCZOS))
    np.testing.assert_array_equal(image_tensor(load_picture(image), CONTRACT, parity="rembg")[0], expected)


def lanczos(mask: np.ndarray) -> np.ndarray:
    """A mask as rembg brings it to the size of `photo()`."""
    return np.asarray(Image.fromarray(mask).resize((70, 50), Image.Resampling.LANCZOS)).astype(int)


def parity_alpha(rounded: np.ndarray) -> np.ndarray:
    return np.asarray(full_size_alpha(rounded, load_picture(photo()), CONTRACT, parity="rembg")).astype(int)


def test_parity_follows_lanczos_of_a_truncated_mask() -> None:
    """The docstring's figures for a smooth mask: nearly everywhere within 1, at most 2."""
    coarse = Image.fromarray(RNG.random((5, 6), np.float32))
    exact = np.asarray(coarse.resize((32, 24), Image.Resampling.BICUBIC)).clip(0, 1) * 255
    difference = np.abs(parity_alpha(np.rint(exact).astype(np.uint8)) - lanczos(exact.astype(np.uint8)))
    assert difference.max() <= 2
    assert (difference > 1).mean() < 0.005
    assert (difference == 0).mean() > 0.5


def test_parity_bound_in_masks_of_noise() -> None:
    for _ in range(20):
        rounded = RNG.choice(np.array([0, 1, 128, 254, 255], np.uint8), (24, 32))
        truncated = rounded - RNG.integers(0, 2, rounded.shape, np.uint8) * (rounded > 0)
        assert np.abs(parity_alpha(rounded) - lanczos(truncated.astype(np.uint8))).max() <= 3


def test_parity_leaves_a_mask_of_the_right_size_alone() -> None:
    answer = RNG.integers(0, 256, (50, 70), np.uint8)
    np.testing.assert_array_equal(parity_alpha(answer), answer)


def test_parity_is_refused_for_other_architectures() -> None:
    check_parity("rembg", CONTRACT, "m")
    check_parity(None, replace(CONTRACT, architecture="birefnet"), "m")
    with pytest.raises(ContractError) as caught:
        check_parity("rembg", replace(CONTRACT, architecture="birefnet"), "m")
    assert str(caught.value) == (
        "model 'm': parity='rembg' is defined for u2net and u2netp, this model's architecture is 'birefnet'; "
        "use parity=None, or export it with `--numerics rembg`"
    )


def test_parity_leaves_an_engine_with_those_numerics_to_do_it() -> None:
    contract = replace(CONTRACT, architecture="isnet", numerics="rembg", resample="lanczos", alpha_resample="lanczos")
    check_parity("rembg", contract, "m")
    dark = load_picture(Image.fromarray(np.full((50, 70, 3), 100, np.uint8)))
    assert image_tensor(dark, contract, parity="rembg").max() == 100
    answer = RNG.integers(0, 256, (contract.height, contract.width), np.uint8)
    alphas = [full_size_alpha(answer, dark, contract, parity=parity) for parity in (None, "rembg")]
    assert alphas[0].tobytes() == alphas[1].tobytes()


def test_alpha_is_float_in_0_to_1_at_the_pictures_size() -> None:
    answer = RNG.integers(0, 256, (24, 32), np.uint8)
    matte = make_matte(photo(), answer)
    assert matte.alpha.shape == (50, 70) == matte.size
    assert matte.alpha.dtype == np.float32
    assert matte.alpha.min() >= 0
    assert matte.alpha.max() <= 1
    expected = np.asarray(Image.fromarray(answer).resize((70, 50), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(np.rint(matte.alpha * 255).astype(np.uint8), expected)
    assert matte.alpha is matte.alpha  # computed once
    assert matte.alpha_image().tobytes() == expected.tobytes()


def test_alpha_of_the_same_size_is_not_resampled() -> None:
    answer = RNG.integers(0, 256, (24, 32), np.uint8)
    np.testing.assert_array_equal(np.asarray(make_matte(photo(24, 32), answer).alpha_image()), answer)


def test_input_alpha_multiplies_with_rounding() -> None:
    every = np.arange(256, dtype=np.uint8)
    contract = replace(CONTRACT, height=256, width=256)
    answer = np.repeat(every[:, None], 256, 1)
    own = Image.fromarray(np.repeat(every[None], 256, 0))
    picture = Picture(Image.new("RGB", (256, 256)), own)
    product = np.asarray(full_size_alpha(answer, picture, contract))
    expected = np.rint(every[:, None].astype(float) * every[None] / 255)
    np.testing.assert_array_equal(product, expected)


def test_cutout_keeps_rgb_and_profile() -> None:
    image = Image.fromarray(photo())
    stream = io.BytesIO()
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image.save(stream, "TIFF", icc_profile=profile, description="private")
    cutout = make_matte(stream.getvalue(), np.zeros((24, 32), np.uint8)).cutout()
    assert cutout.mode == "RGBA"
    np.testing.assert_array_equal(np.asarray(cutout)[..., :3], np.asarray(image))
    assert cutout.info == {"icc_profile": profile}
    for format_name in ("PNG", "TIFF"):
        stream = io.BytesIO()
        cutout.save(stream, format_name)
        assert Image.open(stream).info["icc_profile"] == profile


def test_cutout_does_not_touch_the_callers_image() -> None:
    image = Image.fromarray(photo())
    before = image.tobytes()
    make_matte(image, np.full((24, 32), 7, np.uint8)).cutout().putpixel((0, 0), (1, 2, 3, 4))
    assert image.tobytes() == before
    assert image.mode == "RGB"


def test_timings() -> None:
    assert TIMINGS.total == 10.0


@settings(max_examples=80, deadline=None)
@given(
    height=st.integers(1, 60),
    width=st.integers(1, 60),
    channels=st.sampled_from([3, 4]),
    orientation=st.integers(1, 8),
    parity=st.sampled_from([None, "rembg"]),
)
def test_any_picture(height: int, width: int, channels: int, orientation: int, parity: Any) -> None:
    image = Image.fromarray(photo(height, width, channels))
    image.getexif()[0x0112] = orientation
    picture = load_picture(image)
    answer = image_tensor(picture, CONTRACT, parity=parity)[0, ..., 1]
    matte = Matte("demo", TIMINGS, full_size_alpha(answer, picture, CONTRACT, parity=parity), picture)
    oriented = (width, height) if orientation >= 5 else (height, width)
    assert matte.size == matte.alpha.shape == oriented
    assert matte.alpha.dtype == np.float32
    assert 0 <= matte.alpha.min() <= matte.alpha.max() <= 1
    cutout = np.asarray(matte.cutout())
    assert cutout.shape == (*oriented, 4)
    np.testing.assert_array_equal(np.sort(cutout[..., :3], None), np.sort(np.asarray(image)[..., :3], None))
    np.testing.assert_array_equal(cutout[..., :3], np.asarray(picture.image))
