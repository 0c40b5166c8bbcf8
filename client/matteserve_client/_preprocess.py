"""From a picture to the tensor that the contract asks for."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from matteserve_client._contract import ModelContract
from matteserve_client._errors import ContractError
from matteserve_client._images import Picture

Parity = Literal["rembg"]
"""Whose numerics to follow instead of the contract's."""

FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "hamming": Image.Resampling.HAMMING,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


def check_parity(parity: str | None, contract: ModelContract, model: str) -> None:
    """Refuse a parity mode that is not defined for the model.

    Raises:
        ContractError: The engine does not have those numerics, and is not of the U²-Net family either.
    """
    if parity is not None and contract.numerics != parity and contract.architecture not in ("u2net", "u2netp"):
        raise ContractError(
            f"model {model!r}: parity={parity!r} is defined for u2net and u2netp, this model's architecture is "
            f"{contract.architecture!r}; use parity=None, or export it with `--numerics {parity}`"
        )


def image_tensor(picture: Picture, contract: ModelContract, *, parity: Parity | None = None) -> NDArray[np.uint8]:
    """Bring a picture to the model's input.

    With `parity="rembg"` the steps are rembg's own: Lanczos, then division by the largest sample *of the resized
    picture* (rembg divides by that instead of 255). The wire is uint8, so the division is `round(x * 255 / max)`:
    where the maximum is 255 this is exact, else each sample is off by at most half a step of 1/255. An engine whose
    contract has these numerics divides itself, exactly, and gets the resized picture as it is.

    Args:
        picture: The decoded picture.
        contract: Gives size and filter.
        parity: Whose numerics to follow.

    Returns:
        Tensor, shape (1, height, width, 3), uint8, RGB, 0 to 255.
    """
    name = "lanczos" if parity == "rembg" else contract.resample
    resized = picture.image.resize((contract.width, contract.height), FILTERS[name])
    tensor: NDArray[np.uint8] = np.asarray(resized)[None]
    if parity == "rembg" and contract.numerics != "rembg":
        top = int(tensor.max())
        if 0 < top < 255:
            table = (np.arange(256, dtype=np.uint32) * 510 + top) // (2 * top)  # round half up of x * 255 / top
            tensor = table.clip(0, 255).astype(np.uint8)[tensor]
    return tensor
