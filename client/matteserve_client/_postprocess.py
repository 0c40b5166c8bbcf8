"""From the model's answer to an alpha of the picture's size, and the cut-out."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from matteserve_client._contract import ModelContract
from matteserve_client._encode import Format, encode, with_alpha
from matteserve_client._images import Picture
from matteserve_client._preprocess import FILTERS, Parity


@dataclass(frozen=True)
class Timings:
    """Where the time of one call went, in seconds.

    Attributes:
        decode: Reading and decoding the picture, up to upright RGB.
        preprocess: Resizing it to the model's input.
        request: From handing over the tensor to having the answer: network, queue and inference.
        postprocess: Resizing the alpha to the picture's size.
    """

    decode: float
    preprocess: float
    request: float
    postprocess: float

    @property
    def total(self) -> float:
        """Sum of the parts."""
        return self.decode + self.preprocess + self.request + self.postprocess


@dataclass(frozen=True)
class Matte:
    """The alpha of one picture, and the picture for cutting it out.

    Attributes:
        model: Name of the model that made it.
        timings: Where the time went.
    """

    model: str
    timings: Timings
    _alpha: Image.Image = field(repr=False)
    _picture: Picture | None = field(repr=False)  # None if only the alpha was wanted

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the picture, upright."""
        return self._alpha.height, self._alpha.width

    @cached_property
    def alpha(self) -> NDArray[np.float32]:
        """Alpha, shape (H, W), float32 in [0, 1], at the size of the upright picture."""
        alpha: NDArray[np.float32] = np.divide(np.asarray(self._alpha), np.float32(255), dtype=np.float32)
        return alpha

    def alpha_image(self) -> Image.Image:
        """Alpha as a new PIL image, mode "L", 0 to 255."""
        return self._alpha.copy()

    def cutout(self) -> Image.Image:
        """The cut-out: a new PIL image, mode "RGBA", straight alpha.

        RGB is the input's, untouched (also where alpha is 0), and so is its ICC profile, in `info["icc_profile"]`:
        Pillow's PNG and TIFF writers store it by themselves, to the WebP writer pass it as `icc_profile=`.
        """
        picture = self._with_colours()
        cutout, profile = with_alpha(picture.image, self._alpha), picture.icc_profile
        if profile is not None:
            cutout.info["icc_profile"] = profile
        return cutout

    def flattened(self, background: tuple[int, int, int]) -> Image.Image:
        """The cut-out on a colour: a new PIL image, mode "RGB", with the picture's profile in `info`.

        Args:
            background: Red, green and blue, 0 to 255.
        """
        picture = self._with_colours()
        flat, profile = Image.new("RGB", self._alpha.size, background), picture.icc_profile
        flat.paste(picture.image, mask=self._alpha)
        if profile is not None:
            flat.info["icc_profile"] = profile
        return flat

    def encode(
        self,
        format_name: Format = "png",
        *,
        alpha_only: bool = False,
        background: tuple[int, int, int] | None = None,
        clear_transparent: bool = False,
    ) -> bytes:
        """The cut-out as a file; much faster than `cutout().save(...)`, and equal to it pixel by pixel.

        Args:
            format_name: "png", "webp" and "tiff" lose nothing; "jpeg", at quality 95, needs one of the options.
            alpha_only: Write the alpha as a grey picture instead.
            background: Put the cut-out on this colour, (red, green, blue), 0 to 255.
            clear_transparent: Store black instead of the picture's colours where alpha is 0. The file is smaller, and
                does not give away what was behind; but who resizes it by straight alpha gets dark edges.

        Raises:
            ValueError: An unknown format, both options, JPEG without either, or a picture larger than the format
                can be.
        """
        if alpha_only and background is not None:
            raise ValueError("alpha_only and background exclude each other")
        if alpha_only:
            return encode(self._alpha, format_name)  # the picture's profile says nothing about its alpha
        picture = self._with_colours()
        if background is not None:
            return encode(self.flattened(background), format_name, icc_profile=picture.icc_profile)
        return encode(
            picture.image,
            format_name,
            alpha=self._alpha,
            icc_profile=picture.icc_profile,
            clear_transparent=clear_transparent,
        )

    def _with_colours(self) -> Picture:
        if self._picture is None:
            raise ValueError("this matte was made with alpha_only=True, so it has no colours; ask again without")
        return self._picture


def full_size_alpha(
    answer: NDArray[np.uint8], picture: Picture, contract: ModelContract, *, parity: Parity | None = None
) -> Image.Image:
    """Bring the model's alpha to the picture's size and multiply the picture's own alpha into it.

    With `parity="rembg"` the filter is Lanczos, as in rembg. rembg truncates its mask to uint8 where the server rounds,
    so before the filter the two differ by at most 1/255, and after it this follows the middle between the two:
    within 1/255 of rembg's, but for about 0.2 % of the pixels of a picture of another size, which reach 2/255
    (3/255 in masks of noise), because Pillow's uint8 filter rounds between its two passes. An engine whose contract has
    rembg's numerics truncates itself; then nothing is left to do.

    Args:
        answer: Alpha of the model, shape (height, width), uint8.
        picture: The picture it belongs to.
        contract: Gives the filter.
        parity: Whose numerics to follow.

    Returns:
        Mode "L" at the picture's size, 0 to 255.
    """
    height, width = picture.size
    alpha = Image.fromarray(answer)
    if answer.shape != (height, width):
        if parity == "rembg" and contract.numerics != "rembg":
            alpha = _lanczos_of_truncated(answer, (height, width))
        else:
            alpha = alpha.resize((width, height), FILTERS[contract.alpha_resample])
    if picture.alpha is None:
        return alpha
    product = np.asarray(alpha, np.uint16) * np.asarray(picture.alpha, np.uint16)  # at most 65025
    return Image.fromarray(((product + np.uint16(127)) // np.uint16(255)).astype(np.uint8))


def _lanczos_of_truncated(rounded: NDArray[np.uint8], size: tuple[int, int]) -> Image.Image:
    """Lanczos of the mask that truncation would have given: `rounded` or one less, so half a step less is nearest."""
    height, width = size
    lanczos = Image.Resampling.LANCZOS
    expected = Image.fromarray(np.maximum(rounded - np.float32(0.5), 0))
    # Two passes, the first clipped, as Pillow's uint8 filter does it; but not rounded in between. Which of them Pillow
    # does first depends on the sizes and on its version, so it is asked.
    mask, across = Image.fromarray(rounded), (width, len(rounded))
    across_first = mask.resize(across, lanczos).resize((width, height), lanczos).tobytes()
    is_first = across_first == mask.resize((width, height), lanczos).tobytes()
    between = np.asarray(expected.resize(across if is_first else (rounded.shape[1], height), lanczos)).clip(0, 255)
    resized = Image.fromarray(between).resize((width, height), lanczos)
    return Image.fromarray(np.rint(np.asarray(resized)).clip(0, 255).astype(np.uint8))
