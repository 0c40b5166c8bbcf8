"""What a picture costs outside the model, step by step: ours, rembg's, and libjpeg-turbo's decode as the floor."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from matteserve_bench.comparisons.pictures import render_cutout
from matteserve_client import Matte, ModelContract, Timings
from matteserve_client._images import load_picture
from matteserve_client._postprocess import full_size_alpha
from matteserve_client._preprocess import image_tensor

Array = NDArray[np.uint8]

_ROUNDS = 5
_STEPS = ("decode", "pre", "post", "encode")
_SIZES = (0.8, 5.0, 24.0)
_INPUTS = (320, 1024)


def measure() -> list[dict[str, Any]]:
    """CPU milliseconds per megapixel; the least of several rounds, which are interleaved.

    Returns:
        One row for each size, model input and side: `megapixels`, `input`, `side`, and one figure a step.
    """
    rows = []
    for megapixels in _SIZES:
        picture, alpha = render_cutout(megapixels)
        stream = io.BytesIO()
        picture.save(stream, "JPEG", quality=90)
        size = picture.width * picture.height / 1e6
        for side in _INPUTS:
            answer = np.asarray(alpha.resize((side, side), Image.Resampling.BILINEAR))
            best = _least(stream.getvalue(), answer, _ROUNDS if megapixels < 10 else 2)
            for name, seconds in best.items():
                steps = {step: 1000 * took / size for step, took in seconds.items()}
                rows.append({"megapixels": megapixels, "input": side, "side": name, **steps})
    return rows


def _least(data: bytes, answer: Array, rounds: int) -> dict[str, dict[str, float]]:
    """Seconds by side and step."""
    sides = {"libjpeg-turbo": _floor, "ours": _ours, "ours, alpha only": _ours_alpha_only, "rembg": _rembg}
    best: dict[str, dict[str, float]] = {name: {} for name in sides}
    for _ in range(rounds):
        for name, perform in sides.items():
            perform(data, answer, _Stopwatch(best[name]))
    return best


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "CPU ms per megapixel, JPEG in, PNG out (alpha only: an array).",
        "",
        "| megapixels | model input | side | decode | pre | post | encode | all |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        steps = [row.get(step) for step in _STEPS]
        cells = " | ".join("" if step is None else f"{step:.1f}" for step in steps)
        total = sum(step for step in steps if step is not None)
        lines.append(f"| {row['megapixels']:g} | {row['input']} | {row['side']} | {cells} | {total:.1f} |")
    return "\n".join(lines)


class _Stopwatch:
    """Performs a step and keeps the least CPU time that it took so far."""

    def __init__(self, best: dict[str, float]) -> None:
        self._best = best

    def __call__(self, step: str, function: Callable[[], Any]) -> Any:
        began = time.process_time()
        result = function()
        took = time.process_time() - began
        self._best[step] = min(took, self._best.get(step, took))
        return result


def _floor(data: bytes, answer: Array, take: _Stopwatch) -> None:
    """The plainest decode there is: simplejpeg calls libjpeg-turbo and nothing else; else Pillow, which adds little."""
    try:
        import simplejpeg
    except ImportError:
        take("decode", lambda: Image.open(io.BytesIO(data)).load())
    else:
        take("decode", lambda: simplejpeg.decode_jpeg(data))


def _contract(answer: Array) -> ModelContract:
    height, width = answer.shape
    return ModelContract(height, width, 8, "bilinear", "bilinear", "u2netp", "none")


def _ours(data: bytes, answer: Array, take: _Stopwatch) -> None:
    contract = _contract(answer)
    picture = take("decode", lambda: load_picture(data))
    take("pre", lambda: image_tensor(picture, contract))
    alpha = take("post", lambda: full_size_alpha(answer, picture, contract))
    matte = Matte("none", Timings(0, 0, 0, 0), alpha, picture)
    take("encode", matte.encode)


def _ours_alpha_only(data: bytes, answer: Array, take: _Stopwatch) -> None:
    contract = _contract(answer)
    picture = take("decode", lambda: load_picture(data, at_least=2 * contract.height))
    take("pre", lambda: image_tensor(picture, contract))
    alpha = take("post", lambda: full_size_alpha(answer, picture, contract))
    take("encode", lambda: Matte("none", Timings(0, 0, 0, 0), alpha, None).alpha)


def _rembg(data: bytes, answer: Array, take: _Stopwatch) -> None:
    """The steps of `rembg.remove()` around its session's run, by its own functions where they are functions."""
    from rembg.bg import fix_image_orientation, naive_cutout
    from rembg.sessions.base import BaseSession

    def decode() -> Any:
        image = fix_image_orientation(Image.open(io.BytesIO(data)))
        image.load()
        return image

    session: Any = SimpleNamespace(inner_session=SimpleNamespace(get_inputs=lambda: [SimpleNamespace(name="input")]))
    prediction = (answer / 255).astype(np.float32)[None]

    def post(image: Image.Image) -> Image.Image:
        high, low = np.max(prediction), np.min(prediction)
        stretched = np.squeeze((prediction - low) / (high - low))
        mask = Image.fromarray((stretched * 255).astype("uint8")).resize(image.size, Image.Resampling.LANCZOS)
        cutout: Image.Image = naive_cutout(image, mask)
        return cutout

    image = take("decode", decode)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    take("pre", lambda: BaseSession.normalize(session, image, mean, std, answer.shape))
    cutout = take("post", lambda: post(image))
    take("encode", lambda: cutout.save(io.BytesIO(), "PNG"))
