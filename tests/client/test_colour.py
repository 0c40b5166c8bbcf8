"""Each conversion to 8-bit RGB against values worked out by hand."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from matteserve_client import InvalidImageError
from matteserve_client._images import Picture, load_picture

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def other_space(profile: bytes, space: bytes) -> bytes:
    """The same profile, its header claiming another colour space (and so unusable for a conversion)."""
    return profile[:16] + space + profile[20:]


def encode(image: Image.Image, format_name: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format_name, **options)
    return stream.getvalue()


def rgb(picture: Picture) -> list[tuple[int, ...]]:
    return [tuple(pixel) for pixel in np.asarray(picture.image).reshape(-1, 3).tolist()]


def grey(picture: Picture) -> list[int]:
    values = np.asarray(picture.image)
    assert (values == values[..., :1]).all()
    return [int(value) for value in values[..., 0].ravel()]


def alpha(picture: Picture) -> list[int] | None:
    return None if picture.alpha is None else [int(value) for value in np.asarray(picture.alpha).ravel()]


@pytest.mark.parametrize("format_name", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_not_clipped(format_name: str) -> None:
    samples = np.array([[0, 128, 129, 257, 32768, 65407, 65535]], np.uint16)
    expected = [round(value / 257) for value in samples[0].tolist()]
    assert expected == [0, 0, 1, 1, 128, 255, 255]
    assert grey(load_picture(encode(Image.fromarray(samples), format_name))) == expected


def test_16_bit_big_endian() -> None:
    image = Image.frombytes("I;16B", (2, 1), b"\x80\x00\x12\x34")
    assert grey(load_picture(image)) == [128, round(0x1234 / 257)]


def test_16_bit_grey_with_colour_key() -> None:
    samples = np.array([[1000, 40_000, 1000]], np.uint16)
    picture = load_picture(encode(Image.fromarray(samples), "PNG", transparency=1000))
    assert grey(picture) == [4, 156, 4]
    assert alpha(picture) == [0, 255, 0]


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        ([0, 257, 65535], [0, 1, 255]),
        ([0, 200], [0, 1]),  # dark 16-bit, not 8-bit
        ([-100, 0, 100], [0, 128, 255]),  # outside of 0 to 65535: from minimum to maximum
        ([0, 50_000, 100_000], [0, 128, 255]),
        ([2**31 - 1, -(2**31)], [255, 0]),
        ([70_000, 70_000], [0, 0]),
    ],
)
def test_32_bit_integers(samples: list[int], expected: list[int]) -> None:
    assert grey(load_picture(Image.fromarray(np.array([samples], np.int32)))) == expected


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        ([0.0, 0.5, 1.0], [0, 128, 255]),
        ([0.0, 100.4, 255.0], [0, 100, 255]),
        ([0.0, 257.0, 65535.0], [0, 1, 255]),
        ([-1.0, 0.0, 1.0], [0, 128, 255]),
        ([1e9, 2e9], [0, 255]),
    ],
)
@pytest.mark.parametrize("as_file", [False, True])
def test_float_samples(samples: list[float], expected: list[int], as_file: bool) -> None:
    image = Image.fromarray(np.array([samples], np.float32))
    assert grey(load_picture(encode(image, "TIFF") if as_file else image)) == expected


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_float_samples_that_are_no_numbers(value: float) -> None:
    image = Image.fromarray(np.array([[0.5, value]], np.float32))
    with pytest.raises(InvalidImageError) as caught:
        load_picture(encode(image, "TIFF"))
    assert str(caught.value) == ("image bytes: the float samples hold NaN or infinity; replace them before sending")


def test_1_bit() -> None:
    assert grey(load_picture(encode(Image.fromarray(np.array([[True, False, True]])), "PNG"))) == [255, 0, 255]


def test_grey_with_alpha() -> None:
    image = Image.fromarray(np.array([[[10, 255], [200, 0], [90, 128]]], np.uint8), "LA")
    picture = load_picture(encode(image, "PNG"))
    assert grey(picture) == [10, 200, 90]
    assert alpha(picture) == [255, 0, 128]


def test_palette() -> None:
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    image.putpalette([255, 0, 0, 0, 255, 0, 10, 20, 30])
    picture = load_picture(encode(image, "PNG"))
    assert rgb(picture) == [(255, 0, 0), (0, 255, 0), (10, 20, 30)]
    assert alpha(picture) is None


@pytest.mark.parametrize(("transparency", "expected"), [(1, [255, 0, 255]), (bytes([0, 128, 255]), [0, 128, 255])])
def test_palette_with_transparency(transparency: Any, expected: list[int]) -> None:
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    image.putpalette([255, 0, 0, 0, 255, 0, 10, 20, 30])
    picture = load_picture(encode(image, "PNG", transparency=transparency))
    assert rgb(picture) == [(255, 0, 0), (0, 255, 0), (10, 20, 30)]
    assert alpha(picture) == expected


def test_gif_with_transparency() -> None:
    image = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    image.putpalette([255, 0, 0, 0, 255, 0])
    picture = load_picture(encode(image, "GIF", transparency=1))
    assert rgb(picture)[0] == (255, 0, 0)
    assert alpha(picture) == [255, 0]


def test_rgb_with_colour_key() -> None:
    image = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8))
    picture = load_picture(encode(image, "PNG", transparency=(4, 5, 6)))
    assert rgb(picture) == [(1, 2, 3), (4, 5, 6)]
    assert alpha(picture) == [255, 0]


def test_grey_with_colour_key() -> None:
    picture = load_picture(encode(Image.fromarray(np.array([[7, 9]], np.uint8)), "PNG", transparency=9))
    assert grey(picture) == [7, 9]
    assert alpha(picture) == [255, 0]


def test_straight_alpha_keeps_colour_under_transparency() -> None:
    pixels = np.array([[[200, 100, 50, 0], [200, 100, 50, 1], [200, 100, 50, 255]]], np.uint8)
    picture = load_picture(encode(Image.fromarray(pixels), "PNG"))
    assert rgb(picture) == [(200, 100, 50)] * 3
    assert alpha(picture) == [0, 1, 255]


def test_premultiplied_alpha_is_divided_out() -> None:
    image = Image.frombytes("RGBa", (1, 1), bytes([50, 25, 0, 128]))
    picture = load_picture(image)
    assert rgb(picture) == [(99, 49, 0)]
    assert alpha(picture) == [128]


def test_fully_opaque_alpha_counts_as_none() -> None:
    assert alpha(load_picture(np.full((2, 2, 4), 255, np.uint8))) is None


# -- CMYK and profiles


def test_cmyk_jpeg_is_not_inverted() -> None:
    # Pillow writes CMYK JPEGs as Adobe does, inverted, and its reader turns them back.
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    picture = load_picture(encode(image, "JPEG", quality=95))
    red, green, blue = picture.image.getpixel((8, 8))  # type: ignore[misc]
    assert red > 240
    assert max(green, blue) < 15
    assert picture.icc_profile is None


def test_cmyk_tiff_without_profile() -> None:
    picture = load_picture(encode(Image.new("CMYK", (2, 1), (255, 0, 0, 51)), "TIFF"))
    assert rgb(picture) == [(0, 204, 204)] * 2


@pytest.mark.parametrize("space", [b"CMYK", b"RGB "])
def test_unusable_cmyk_profile_falls_back_and_is_dropped(space: bytes) -> None:
    data = encode(Image.new("CMYK", (2, 1), (255, 0, 0, 51)), "TIFF", icc_profile=other_space(SRGB, space))
    picture = load_picture(data)
    assert rgb(picture) == [(0, 204, 204)] * 2
    assert picture.icc_profile is None


def test_profile_conversion_is_used_for_cmyk(monkeypatch: pytest.MonkeyPatch) -> None:
    # No CMYK profile may be shipped here, so the conversion itself is watched; the next test runs it for real on Lab.
    seen: list[Any] = []

    def convert(image: Image.Image, source: Any, target: Any, **options: Any) -> Image.Image:
        seen.append((image.mode, options))
        return Image.new("RGB", image.size, (1, 2, 3))

    monkeypatch.setattr(ImageCms, "profileToProfile", convert)
    data = encode(Image.new("CMYK", (1, 1)), "TIFF", icc_profile=other_space(SRGB, b"CMYK"))
    picture = load_picture(data)
    assert seen == [("CMYK", {"outputMode": "RGB"})]
    assert rgb(picture) == [(1, 2, 3)]
    assert picture.icc_profile is None


def test_lab_goes_through_littlecms() -> None:
    image = Image.merge("LAB", [Image.new("L", (1, 1), value) for value in (138, 209, 196)])  # about sRGB red
    ((red, green, blue),) = rgb(load_picture(image))
    assert red > 250
    assert green < 25
    assert blue < 40


def grey_profile() -> bytes:
    """A minimal ICC v2 grey profile with gamma 1.0."""
    white = b"XYZ \0\0\0\0" + b"".join(round(v * 65536).to_bytes(4, "big") for v in (0.9642, 1.0, 0.8249))
    curve = b"curv\0\0\0\0" + (1).to_bytes(4, "big") + (256).to_bytes(2, "big") + b"\0\0"  # u8Fixed8: 1.0
    text = b"grey\0"
    desc = b"desc\0\0\0\0" + len(text).to_bytes(4, "big") + text + bytes(78 + 3)
    blocks = [(b"desc", desc), (b"wtpt", white), (b"kTRC", curve)]
    offset, table, body = 128 + 4 + 12 * len(blocks), b"", b""
    for name, block in blocks:
        block += bytes(-len(block) % 4)
        table += name + (offset + len(body)).to_bytes(4, "big") + len(block).to_bytes(4, "big")
        body += block
    size = offset + len(body)
    header = size.to_bytes(4, "big") + b"\0\0\0\0\x02\x20\0\0" + b"mntr" + b"GRAY" + b"XYZ " + bytes(12) + b"acsp"
    header += bytes(28) + white[8:]
    return header.ljust(128, b"\0") + len(blocks).to_bytes(4, "big") + table + body


def test_grey_profile_is_applied_and_dropped() -> None:
    picture = load_picture(encode(Image.new("L", (1, 1), 64), "PNG", icc_profile=grey_profile()))
    # Linear 64/255 = 0.251 is 0.537 in sRGB.
    (value,) = grey(picture)
    assert abs(value - 137) <= 2
    assert picture.icc_profile is None


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P"])
def test_rgb_profile_is_kept(mode: str) -> None:
    image = Image.new("RGBA", (2, 2), (10, 20, 30, 40)).convert("RGB" if mode in ("L", "P") else mode).convert(mode)
    picture = load_picture(encode(image, "PNG", icc_profile=SRGB))
    assert picture.icc_profile == SRGB


@pytest.mark.parametrize("profile", [other_space(SRGB, b"GRAY"), other_space(SRGB, b"CMYK"), b"junk", b""])
def test_profile_that_does_not_fit_is_dropped(profile: bytes) -> None:
    picture = load_picture(encode(Image.new("RGB", (2, 2), (9, 8, 7)), "TIFF", icc_profile=profile))
    assert rgb(picture) == [(9, 8, 7)] * 4
    assert picture.icc_profile is None


def test_a_mode_that_cannot_become_rgb(monkeypatch: pytest.MonkeyPatch) -> None:
    image = Image.new("HSV", (1, 1))

    def refuse(*_: Any, **__: Any) -> Image.Image:
        raise ValueError("conversion from HSV to RGB not supported")

    monkeypatch.setattr(image, "convert", refuse)
    with pytest.raises(InvalidImageError, match="PIL image: mode 'HSV' cannot be converted to RGB"):
        load_picture(image)
