"""`matteserve demo`: a real Triton, one picture over gRPC, the cut-out on disk, and where the time went."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import numpy as np
from PIL import Image

from matteserve_client import Client, Matte
from matteserve_server import bundled
from matteserve_server._errors import TritonNotFoundError
from matteserve_server.binary import WHEEL_MEGABYTES, find_tritonserver, install_triton
from matteserve_server.embedded import EmbeddedServer
from matteserve_server.options import ServerOptions

MODEL = "demo"
_ENGINE = "demo_onnx_fp32"
_CHECK_PX = 16


@dataclass(frozen=True)
class DemoTimings:
    """Where the time of one picture went, in seconds.

    Attributes:
        decode: Reading and decoding the file.
        preprocess: Resizing to the model's input.
        grpc: Transport and server, without queue and inference.
        queue: Waiting in the dynamic batcher.
        infer: The model.
        postprocess: Alpha back to the picture's size, cut-out put together.
        encode: PNG of the cut-out.
    """

    decode: float
    preprocess: float
    grpc: float
    queue: float
    infer: float
    postprocess: float
    encode: float


def run_demo(image: Path, output_directory: Path, *, as_json: bool) -> None:
    """Cut out `image` and write cut-out, alpha and preview.

    Args:
        image: The picture's file.
        output_directory: Where `<name>-cutout.png`, `<name>-alpha.png` and `<name>-preview.png` go.
        as_json: Print a JSON object to stdout, not text.

    Raises:
        MatteserveError: Triton cannot be installed or started, or the picture cannot be used.
    """
    _ensure_triton()
    began = time.perf_counter()
    options = ServerOptions(bundled.bundled_repository(), (MODEL,), grpc_port=0, metrics_port=None)
    click.echo("starting Triton ...", err=True)
    with EmbeddedServer(options) as server, Client(server.address, model=MODEL) as client:
        start_s = time.perf_counter() - began
        client.contract(MODEL)  # read once per connection; not part of a picture's time
        before = server.control.statistics(_ENGINE)
        matte = client.matte(image)
        after = server.control.statistics(_ENGINE)
    files = {kind: output_directory / f"{image.stem}-{kind}.png" for kind in ("cutout", "alpha", "preview")}
    encode_s = _write(matte, files)
    queue_s, infer_s = after.queue_s - before.queue_s, after.infer_s - before.infer_s
    seconds = DemoTimings(
        decode=matte.timings.decode,
        preprocess=matte.timings.preprocess,
        grpc=matte.timings.request - queue_s - infer_s,
        queue=queue_s,
        infer=infer_s,
        postprocess=matte.timings.postprocess,
        encode=encode_s,
    )
    timings_ms = {name: round(1000 * value, 1) for name, value in asdict(seconds).items()}
    if as_json:
        names = {kind: str(path) for kind, path in files.items()}
        click.echo(json.dumps({"files": names, "start_s": round(start_s, 2), "timings_ms": timings_ms}))
        return
    height, width = matte.alpha.shape
    click.echo(f"{image.name} ({width}x{height}), cut out by a Triton that started in {start_s:.1f} s:")
    for kind, path in files.items():
        click.echo(f"  {kind:8} {path}")
    click.echo(f"  time     {sum(timings_ms.values()):.0f} ms: " + _join(f"{k} {v:g}" for k, v in timings_ms.items()))


def checkerboard_preview(cutout: Image.Image) -> Image.Image:
    """Original, alpha, and cut-out over a checkerboard, side by side.

    Args:
        cutout: RGBA with straight alpha, so that its RGB still is the original picture.
    """
    width, height = cutout.size
    rows, columns = np.indices((height, width)) // _CHECK_PX
    board = Image.fromarray(np.where((rows + columns) % 2, 255, 204).astype(np.uint8)).convert("RGB")
    board.paste(cutout, mask=cutout.getchannel("A"))
    preview = Image.new("RGB", (3 * width, height))
    for index, panel in enumerate((cutout.convert("RGB"), cutout.getchannel("A"), board)):
        preview.paste(panel, (index * width, 0))
    return preview


def _ensure_triton() -> None:
    try:
        find_tritonserver()
    except TritonNotFoundError:
        click.echo(f"installing Triton from the package index ({WHEEL_MEGABYTES} MB, once) ...", err=True)
        install_triton()


def _write(matte: Matte, files: dict[str, Path]) -> float:
    """Write the three pictures; return the seconds that encoding the cut-out took."""
    for path in files.values():
        path.parent.mkdir(parents=True, exist_ok=True)
    cutout = matte.cutout()
    began = time.perf_counter()
    cutout.save(files["cutout"], compress_level=1)
    encode_s = time.perf_counter() - began
    cutout.getchannel("A").save(files["alpha"])
    checkerboard_preview(cutout).save(files["preview"])
    return encode_s


def _join(parts: Iterable[str]) -> str:
    return ", ".join(parts)
