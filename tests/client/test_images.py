"""What may be passed as an image, what it becomes, and what is refused with which words."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, TiffImagePlugin

from matteserve_client import ImageTooLargeError, InvalidImageError, UnsupportedFormatError
from matteserve_client._images import FORMATS, load_picture

RNG = np.random.default_rng(7)


def noise(height: int, width: int, channels: int | None = 3) -> Any:
    shape = (height, width) if channels is None else (height, width, channels)
    return RNG.integers(0, 256, shape, np.uint8)


def encode(image: Image.Image, format_name: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format_name, **options)
    return stream.getvalue()


PHOTO = noise(40, 60)


# -- sources


def png(array: Any = PHOTO) -> bytes:
    return encode(Image.fromarray(array), "PNG")


@pytest.fixture
def photo_path(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    path.write_bytes(png())
    return path


@pytest.mark.parametrize(
    "make",
    [
        lambda path: str(path),
        lambda path: path,
        lambda path: path.read_bytes(),
        lambda path: bytearray(path.read_bytes()),
        lambda path: memoryview(path.read_bytes()),
        lambda path: io.BytesIO(path.read_bytes()),
        lambda path: Image.fromarray(PHOTO),
        lambda path: PHOTO,
        lambda path: np.asfortranarray(PHOTO),
    ],
    ids=["str", "Path", "bytes", "bytearray", "memoryview", "file", "pil", "array", "fortran array"],
)
def test_every_source_gives_the_same_picture(photo_path: Path, make: Any) -> None:
    picture = load_picture(make(photo_path))
    assert picture.size == (40, 60)
    assert picture.alpha is None
    np.testing.assert_array_equal(np.asarray(picture.image), PHOTO)


def test_file_object_stays_open_and_is_read_from_where_it_stands(photo_path: Path) -> None:
    stream = io.BytesIO(b"header" + photo_path.read_bytes())
    stream.seek(6)
    assert load_picture(stream).size == (40, 60)
    assert not stream.closed


def test_lazily_opened_pil_image(photo_path: Path) -> None:
    with Image.open(photo_path) as image:
        np.testing.assert_array_equal(np.asarray(load_picture(image).image), PHOTO)


def test_array_shapes() -> None:
    rgba, grey = noise(5, 7, 4), noise(5, 7, None)
    picture = load_picture(rgba)
    np.testing.assert_array_equal(np.asarray(picture.image), rgba[..., :3])
    assert picture.alpha is not None
    np.testing.assert_array_equal(np.asarray(picture.alpha), rgba[..., 3])
    np.testing.assert_array_equal(np.asarray(load_picture(grey).image), np.repeat(grey[..., None], 3, 2))


@pytest.mark.parametrize("format_name", FORMATS)
def test_every_allowed_format(format_name: str) -> None:
    data = encode(Image.fromarray(PHOTO), format_name)
    picture = load_picture(data)
    assert picture.image.mode == "RGB"
    assert picture.size == (40, 60)
    # Usable after the stream is gone, whatever plugin it came from.
    assert picture.image.resize((8, 8)).getpixel((0, 0)) is not None
    assert picture.image.convert("RGBA").size == (60, 40)


@pytest.mark.parametrize("format_name", ["GIF", "WEBP", "TIFF", "PNG"])
def test_first_picture_of_several(format_name: str) -> None:
    frames = [Image.new("RGB", (9, 6), colour) for colour in ("red", "lime", "blue")]
    data = encode(frames[0], format_name, save_all=True, append_images=frames[1:], lossless=True)
    assert load_picture(data).image.getpixel((3, 3)) == (255, 0, 0)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (20_000, 10), (10, 20_000), (1, 9)])
def test_extreme_shapes(height: int, width: int) -> None:
    assert load_picture(png(noise(height, width))).size == (height, width)


# -- decoded smaller


def jpeg(height: int, width: int, orientation: int = 1, **options: Any) -> bytes:
    """A smooth picture, in which a smaller decode differs little."""
    small = Image.fromarray(noise(6, 8)).resize((width, height), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(small, "JPEG", quality=95, exif=exif, **options)


@pytest.mark.parametrize(
    ("at_least", "expected"),
    [(None, (321, 643)), (400, (321, 643)), (161, (321, 643)), (160, (161, 322)), (80, (81, 161)), (1, (41, 81))],
)
def test_jpeg_is_decoded_as_large_as_needed(at_least: int | None, expected: tuple[int, int]) -> None:
    picture = load_picture(jpeg(321, 643), at_least=at_least)
    assert picture.size == (321, 643)
    assert (picture.image.height, picture.image.width) == expected
    assert (picture.full_size is None) == (expected == (321, 643))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_smaller_decode_is_upright_too(orientation: int) -> None:
    data = jpeg(320, 640, orientation)
    full, smaller = load_picture(data), load_picture(data, at_least=80)
    assert smaller.size == full.size == ((640, 320) if orientation >= 5 else (320, 640))
    expected = np.asarray(full.image.resize(smaller.image.size, Image.Resampling.BOX)).astype(int)
    assert np.abs(np.asarray(smaller.image) - expected).mean() < 1.5


def test_only_encoded_jpegs_are_decoded_smaller(tmp_path: Path) -> None:
    for source in (noise(80, 90), Image.fromarray(noise(80, 90)), png(noise(80, 90))):
        picture = load_picture(source, at_least=8)
        assert (picture.image.height, picture.image.width) == picture.size == (80, 90)


def test_grey_and_cmyk_jpegs_are_decoded_smaller() -> None:
    for mode in ("L", "CMYK"):
        data = encode(Image.fromarray(noise(80, 96)).convert(mode), "JPEG")
        picture = load_picture(data, at_least=20)
        assert (picture.size, picture.image.size, picture.image.mode) == ((80, 96), (24, 20), "RGB")


def test_a_broken_jpeg_is_refused_in_any_size() -> None:
    with pytest.raises(InvalidImageError, match="the JPEG data is truncated or damaged"):
        load_picture(jpeg(320, 640)[:2000], at_least=40)


# -- refused


TIFF = encode(Image.fromarray(PHOTO), "TIFF")


def header_only_png(width: int, height: int) -> bytes:
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    header = struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    return b"\x89PNG\r\n\x1a\n" + header + struct.pack(">I", 1 << 20) + b"IDAT" + bytes(64)


@pytest.mark.parametrize("max_pixels", [100_000_000, 89_000_000])
def test_bomb_is_refused_from_its_header(max_pixels: int) -> None:
    with pytest.raises(ImageTooLargeError) as caught:
        load_picture(header_only_png(50_000, 40_000), max_pixels=max_pixels)
    assert str(caught.value) == (
        f"image bytes: is 40000 x 50000 = 2,000,000,000 pixels, the limit is {max_pixels:,}; "
        "make it smaller, or raise max_pixels if you trust where it comes from"
    )


@pytest.mark.parametrize("format_name", FORMATS)
def test_limit_holds_for_every_format(format_name: str) -> None:
    data = encode(Image.fromarray(PHOTO), format_name)
    assert load_picture(data, max_pixels=2400).size == (40, 60)
    with pytest.raises(ImageTooLargeError, match=r"40 x 60 = 2,400 pixels, the limit is 2,399"):
        load_picture(data, max_pixels=2399)


def test_limit_holds_for_arrays_and_pil_images() -> None:
    for source in (PHOTO, Image.fromarray(PHOTO)):
        with pytest.raises(ImageTooLargeError, match="2,400 pixels, the limit is 100;"):
            load_picture(source, max_pixels=100)


def test_pillows_own_guard_is_neither_used_nor_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1500)  # 2,400 pixels: Image.open would warn, and warnings are errors
    assert load_picture(png()).size == (40, 60)
    assert Image.MAX_IMAGE_PIXELS == 1500


def test_pillows_guard_while_decoding_is_translated(monkeypatch: pytest.MonkeyPatch) -> None:
    # Recent Pillow versions look once more at the tiles of a TIFF, beyond twice MAX_IMAGE_PIXELS.
    def bomb(self: Image.Image) -> None:
        raise Image.DecompressionBombError("could be decompression bomb DOS attack")

    monkeypatch.setattr(TiffImagePlugin.TiffImageFile, "load", bomb)
    with pytest.raises(ImageTooLargeError, match="image bytes: could be decompression bomb"):
        load_picture(TIFF)


def test_zero_bytes() -> None:
    with pytest.raises(InvalidImageError) as caught:
        load_picture(b"")
    assert str(caught.value) == "image bytes: is empty (0 bytes)"


def test_not_an_image(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("hello there, no picture here")
    with pytest.raises(InvalidImageError) as caught:
        load_picture(path)
    assert type(caught.value) is InvalidImageError
    assert str(caught.value) == (
        f"{str(path)!r}: is not an image (it starts with b'hello th'); allowed: JPEG, PNG, WebP, TIFF, BMP, GIF"
    )


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (encode(Image.fromarray(PHOTO), "ICO"), "ICO"),
        (encode(Image.fromarray(PHOTO), "PPM"), "PPM/PGM/PBM"),
        (encode(Image.fromarray(PHOTO), "JPEG2000"), "JPEG 2000"),
        (b"\0\0\0\x20ftypavif\0\0\0\0", "AVIF"),
        (b"\0\0\0\x20ftypheic\0\0\0\0", "HEIC"),
        (b"%PDF-1.7", "PDF"),
        (b"<svg xmlns=''/>", "SVG"),
        (b"8BPS\0\1", "PSD"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_formats_are_named(data: bytes, found: str) -> None:
    with pytest.raises(UnsupportedFormatError) as caught:
        load_picture(data)
    assert str(caught.value) == (
        f"image bytes: is {found}, which is not read; allowed: JPEG, PNG, WebP, TIFF, BMP, GIF"
    )


@pytest.mark.parametrize("format_name", FORMATS)
def test_truncated_in_the_data(format_name: str) -> None:
    data = encode(Image.fromarray(noise(200, 300)), format_name)
    with pytest.raises(InvalidImageError, match=rf"image bytes: the {format_name}.* (truncated|damaged)") as caught:
        load_picture(data[: len(data) // 2])
    assert type(caught.value) is InvalidImageError
    assert caught.value.__cause__ is not None


def test_truncated_jpeg_says_so() -> None:
    data = encode(Image.fromarray(noise(200, 300)), "JPEG")
    with pytest.raises(InvalidImageError, match=r"^image bytes: the JPEG data is truncated or damaged "):
        load_picture(data[: len(data) // 2])


@pytest.mark.parametrize("format_name", FORMATS)
def test_truncated_in_the_header(format_name: str) -> None:
    data = encode(Image.fromarray(PHOTO), format_name)
    with pytest.raises(InvalidImageError, match=rf"^image bytes: the {format_name} header is damaged or cut off "):
        load_picture(data[:13])


@settings(max_examples=150, deadline=None)
@given(
    format_name=st.sampled_from(FORMATS),
    edits=st.lists(st.tuples(st.integers(8, 10_000), st.integers(0, 255)), min_size=1, max_size=20),
)
def test_damaged_files_give_a_picture_or_our_error(format_name: str, edits: list[tuple[int, int]]) -> None:
    data = bytearray(encode(Image.fromarray(PHOTO), format_name))
    for position, value in edits:
        data[position % len(data)] = value
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of odd metadata; here only the outcome counts
        try:
            picture = load_picture(bytes(data), max_pixels=1_000_000)
        except InvalidImageError:
            return
    assert picture.image.mode == "RGB"


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (
            np.full((4, 4, 3), np.nan, np.float32),
            "image array: dtype is float32 with NaN or infinity in it, must be uint8 with values 0 to 255; "
            "for floats in [0, 1] pass (array * 255).round().astype(np.uint8)",
        ),
        (
            np.zeros((4, 4, 3)),
            "image array: dtype is float64, must be uint8 with values 0 to 255; "
            "for floats in [0, 1] pass (array * 255).round().astype(np.uint8)",
        ),
        (
            np.zeros((4, 4), np.uint16),
            "image array: dtype is uint16, must be uint8 with values 0 to 255; "
            "for floats in [0, 1] pass (array * 255).round().astype(np.uint8)",
        ),
        (
            np.zeros((2, 4, 4, 3), np.uint8),
            "image array: shape is (2, 4, 4, 3), must be (H, W, 3) RGB, (H, W, 4) RGBA or (H, W) grey; "
            "pass one image at a time, channels last",
        ),
        (
            np.zeros((3, 40, 40), np.uint8),
            "image array: shape is (3, 40, 40), must be (H, W, 3) RGB, (H, W, 4) RGBA or (H, W) grey; "
            "pass one image at a time, channels last",
        ),
        (
            np.zeros(9, np.uint8),
            "image array: shape is (9,), must be (H, W, 3) RGB, (H, W, 4) RGBA or (H, W) grey",
        ),
        (np.zeros((0, 4, 3), np.uint8), "image array: shape is (0, 4, 3), it has no pixels"),
    ],
    ids=["nan", "float", "uint16", "batch", "channels first", "flat", "empty"],
)
def test_wrong_arrays(array: Any, message: str) -> None:
    with pytest.raises(InvalidImageError) as caught:
        load_picture(array)
    assert str(caught.value) == message


def test_wrong_types(tmp_path: Path) -> None:
    with pytest.raises(InvalidImageError) as caught:
        load_picture(42)  # type: ignore[arg-type]
    assert str(caught.value) == (
        "cannot take an image from int; pass a path, bytes, a binary file object, a PIL image or a uint8 array"
    )
    with pytest.raises(InvalidImageError, match="returned str, not bytes; open it with mode 'rb'"):
        load_picture(io.StringIO("text"))  # type: ignore[arg-type]
    with pytest.raises(InvalidImageError) as caught:
        load_picture(tmp_path / "absent.jpg")
    assert str(caught.value) == f"{str(tmp_path / 'absent.jpg')!r}: cannot be read: No such file or directory"
    with pytest.raises(InvalidImageError, match="Is a directory"):
        load_picture(tmp_path)
    with pytest.raises(InvalidImageError, match="cannot be read"):
        load_picture("nul\0byte.jpg")
    closed = io.BytesIO(b"x")
    closed.close()
    with pytest.raises(InvalidImageError, match="cannot be read: I/O operation on closed file"):
        load_picture(closed)
    with pytest.raises(InvalidImageError, match="PIL image: has no pixels"):
        load_picture(Image.new("RGB", (0, 5)))


# -- orientation

TURNS = {  # orientation -> what undoes it, on an array
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize("format_name", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", TURNS)
def test_exif_orientation(format_name: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(
        Image.fromarray(PHOTO), format_name, exif=exif, **({"lossless": True} if format_name == "WEBP" else {})
    )
    np.testing.assert_array_equal(np.asarray(load_picture(data).image), TURNS[orientation](PHOTO))


def test_damaged_exif_does_not_matter() -> None:
    data = encode(Image.fromarray(PHOTO), "PNG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert load_picture(data).size == (40, 60)


# -- any mode, size, orientation


@settings(max_examples=120, deadline=None)
@given(
    mode=st.sampled_from(
        [
            "1",
            "L",
            "LA",
            "P",
            "PA",
            "RGB",
            "RGBA",
            "RGBa",
            "La",
            "RGBX",
            "CMYK",
            "YCbCr",
            "HSV",
            "LAB",
            "I",
            "F",
            "I;16",
        ]
    ),
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    orientation=st.integers(0, 9),
)
def test_any_pil_image(mode: str, height: int, width: int, orientation: int) -> None:
    base = Image.fromarray(noise(height, width, 4))
    if mode in ("PA", "La"):
        image = base.convert("LA").convert(mode) if mode == "La" else base.convert("P").convert("PA")
    elif mode == "RGBa":
        image = base.convert(mode)
    elif mode == "LAB":
        image = Image.merge("LAB", base.split()[:3])
    elif mode == "I;16":
        image = Image.fromarray(noise(height, width, None).astype(np.uint16) * 257)
    else:
        image = base.convert("RGB").convert(mode)
    image.getexif()[0x0112] = orientation
    before = image.tobytes()
    picture = load_picture(image)
    assert picture.size == ((width, height) if orientation in (5, 6, 7, 8) else (height, width))
    assert picture.image.mode == "RGB"
    if picture.alpha is not None:
        assert picture.alpha.mode == "L"
        assert picture.alpha.size == picture.image.size
    assert image.tobytes() == before
    assert image.mode == mode
