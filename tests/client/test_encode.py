"""Every encoder against Pillow's decoder: nothing is lost, whatever the size, mode and content."""

from __future__ import annotations

import io
import sys
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from matteserve_client import Matte, Timings, _png
from matteserve_client._encode import SUFFIXES, encode, with_alpha
from matteserve_client._images import Picture
from matteserve_client._png import write_png

PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
CHANNELS = {"L": (), "LA": (2,), "RGB": (3,), "RGBA": (4,)}

try:
    from isal import isal_zlib
except ImportError:
    DEFLATES = [zlib]
else:
    DEFLATES = [zlib, isal_zlib]


def picture(mode: str, height: int, width: int, seed: int = 0, levels: int = 256) -> Image.Image:
    samples = np.random.default_rng(seed).integers(0, levels, (height, width, *CHANNELS[mode])) * (255 // (levels - 1))
    return Image.fromarray(samples.astype(np.uint8), mode)


def decoded(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def make_matte(height: int = 30, width: int = 40, profile: bytes | None = None) -> Matte:
    alpha = picture("L", height, width, seed=1, levels=4)  # a quarter is fully transparent
    return Matte("demo", Timings(1, 1, 1, 1), alpha, Picture(picture("RGB", height, width), None, profile))


# -- the PNG writer


@settings(max_examples=150, deadline=None)
@given(
    mode=st.sampled_from(list(CHANNELS)),
    height=st.integers(1, 70),
    width=st.integers(1, 70),
    seed=st.integers(0, 1000),
    levels=st.sampled_from([2, 4, 256]),
    deflate=st.sampled_from(DEFLATES),
    strip_bytes=st.sampled_from([1, 300, 1 << 18]),
)
def test_png_round_trip(
    mode: str, height: int, width: int, seed: int, levels: int, deflate: Any, strip_bytes: int
) -> None:
    image = picture(mode, height, width, seed, levels)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_png, "_STRIP_BYTES", strip_bytes)
        data = write_png(image, compressor=lambda: deflate.compressobj(1))
    back = decoded(data)
    assert (back.mode, back.size, back.tobytes()) == (mode, image.size, image.tobytes())


@settings(max_examples=60, deadline=None)
@given(height=st.integers(1, 60), width=st.integers(1, 60), seed=st.integers(0, 1000), clear=st.booleans())
def test_png_of_picture_and_alpha(height: int, width: int, seed: int, clear: bool) -> None:
    image, alpha = picture("RGB", height, width, seed), picture("L", height, width, seed + 1, 3)
    before = image.tobytes(), alpha.tobytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_png, "_STRIP_BYTES", 400)
        back = np.asarray(decoded(write_png(image, alpha, clear_transparent=clear)))
    colours, opacity = np.array(image), np.asarray(alpha)
    if clear:
        colours[opacity == 0] = 0
    np.testing.assert_array_equal(back, np.dstack([colours, opacity]))
    assert (image.tobytes(), alpha.tobytes()) == before


def test_png_of_a_photograph_sized_picture() -> None:
    image = picture("RGBA", 700, 1100)
    data = write_png(image)
    assert decoded(data).tobytes() == image.tobytes()
    assert data.count(b"IDAT") > 3  # no chunk grows with the picture


def test_png_is_valid_for_pillows_verifier() -> None:
    with Image.open(io.BytesIO(write_png(picture("RGB", 20, 30), icc_profile=PROFILE))) as image:
        image.verify()  # checks every chunk's checksum


def test_png_keeps_the_profile() -> None:
    assert decoded(write_png(picture("RGB", 5, 5), icc_profile=PROFILE)).info["icc_profile"] == PROFILE
    assert "icc_profile" not in decoded(write_png(picture("RGB", 5, 5))).info


@pytest.mark.parametrize(
    ("image", "alpha", "message"),
    [
        (Image.new("P", (3, 4)), None, "cannot write mode 'P'; allowed: L, RGB, LA, RGBA, or RGB with L"),
        (Image.new("RGBA", (3, 4)), Image.new("L", (3, 4)), "cannot write mode 'RGBA' with alpha of mode 'L'; allowed"),
        (Image.new("RGB", (3, 4)), Image.new("1", (3, 4)), "cannot write mode 'RGB' with alpha of mode '1'; allowed"),
        (Image.new("RGB", (3, 4)), Image.new("L", (4, 3)), "the alpha is 3 x 4, its picture 4 x 3"),
    ],
)
def test_png_refuses(image: Image.Image, alpha: Image.Image | None, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        write_png(image, alpha)


# -- formats


@settings(max_examples=40, deadline=None)
@given(
    format_name=st.sampled_from(["png", "webp", "tiff"]),
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    clear=st.booleans(),
)
def test_lossless_formats_keep_everything(format_name: Any, height: int, width: int, clear: bool) -> None:
    image, alpha = picture("RGB", height, width), picture("L", height, width, 5, 4)
    back = np.asarray(decoded(encode(image, format_name, alpha=alpha, clear_transparent=clear)).convert("RGBA"))
    colours = np.array(image)
    if clear:
        colours[np.asarray(alpha) == 0] = 0
    np.testing.assert_array_equal(back, np.dstack([colours, np.asarray(alpha)]))


@pytest.mark.parametrize("format_name", dict.fromkeys(SUFFIXES.values()))
def test_every_format_keeps_the_profile(format_name: Any) -> None:
    data = encode(picture("RGB", 16, 16), format_name, icc_profile=PROFILE)
    assert decoded(data).info["icc_profile"] == PROFILE


@pytest.mark.parametrize("format_name", ["png", "webp", "tiff"])
def test_grey_stays_grey(format_name: Any) -> None:
    alpha = picture("L", 9, 13)
    assert decoded(encode(alpha, format_name)).convert("L").tobytes() == alpha.tobytes()


def test_unknown_format() -> None:
    with pytest.raises(ValueError, match="unknown format 'gif'; allowed: png, webp, tiff, jpeg"):
        encode(picture("RGB", 3, 3), "gif")  # type: ignore[arg-type]


def test_jpeg_has_no_alpha() -> None:
    for image, alpha in ((picture("RGB", 3, 3), picture("L", 3, 3)), (picture("RGBA", 3, 3), None)):
        with pytest.raises(ValueError, match="JPEG has no transparency; write PNG or WebP, or put the cut-out on a"):
            encode(image, "jpeg", alpha=alpha)


def test_a_picture_too_large_for_its_format() -> None:
    with pytest.raises(ValueError, match="encoding error"):
        encode(Image.new("L", (16_384, 1)), "webp")


def test_nothing_private_travels_with_a_cutout() -> None:
    image = picture("RGB", 4, 4)
    image.info = {"exif": b"where it was taken", "comment": b"private"}
    assert with_alpha(image, picture("L", 4, 4)).info == {}
    assert b"private" not in encode(image, "tiff", alpha=picture("L", 4, 4))


# -- mattes


@pytest.mark.parametrize("format_name", ["png", "webp", "tiff"])
def test_encoded_matte_equals_its_cutout(format_name: Any) -> None:
    matte = make_matte(profile=PROFILE)
    back = decoded(matte.encode(format_name))
    assert back.convert("RGBA").tobytes() == matte.cutout().tobytes()
    assert back.info["icc_profile"] == PROFILE


def test_encoded_alpha() -> None:
    matte = make_matte(profile=PROFILE)
    back = decoded(matte.encode(alpha_only=True))
    assert (back.mode, back.tobytes()) == ("L", matte.alpha_image().tobytes())
    assert "icc_profile" not in back.info


@pytest.mark.parametrize("format_name", ["png", "jpeg"])
def test_encoded_on_a_colour(format_name: Any) -> None:
    matte = make_matte(profile=PROFILE)
    back = decoded(matte.encode(format_name, background=(250, 10, 20)))
    alpha = np.asarray(matte.alpha_image())[..., None] / 255
    expected = np.asarray(matte.cutout())[..., :3] * alpha + np.array([250, 10, 20]) * (1 - alpha)
    assert np.abs(np.asarray(back) - expected).max() <= (0.51 if format_name == "png" else 255)
    assert back.mode == "RGB"
    assert back.info["icc_profile"] == PROFILE
    assert matte.flattened((250, 10, 20)).info == {"icc_profile": PROFILE}


def test_alpha_only_and_background_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="alpha_only and background exclude each other"):
        make_matte().encode(alpha_only=True, background=(0, 0, 0))


@pytest.mark.parametrize("use", [Matte.cutout, Matte.encode, lambda matte: matte.flattened((0, 0, 0))])
def test_a_matte_without_colours(use: Any) -> None:
    matte = Matte("demo", Timings(1, 1, 1, 1), picture("L", 5, 6), None)
    assert matte.size == matte.alpha.shape == (5, 6)
    assert decoded(matte.encode(alpha_only=True)).size == (6, 5)
    with pytest.raises(ValueError, match="made with alpha_only=True, so it has no colours; ask again without"):
        use(matte)


def test_without_the_extra_zlib_deflates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "isal", None)  # `import isal` then fails
    assert _png._fastest_deflate() is zlib
