"""The registry of weights: where they come from, what they expect, and under which licence they are.

A fact that could not be established stands as None (a number, a digest, an address) or "unknown" (a licence); nothing
here is guessed. MD5 digests are the ones that rembg states (for `u2net.pth` and `u2net_human_seg.pth` public code
disagrees which digest is whose, so neither stands here); SHA-256 digests and sizes are those of the same assets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

from matteserve_client._contract import ResampleFilter
from matteserve_export._errors import ExportError

__all__ = ["REGISTRY", "Source", "SourceKind", "Weights", "find_weights"]

SourceKind = Literal["checkpoint", "onnx"]
Triple = tuple[float, float, float]

_IMAGENET_MEAN: Triple = (0.485, 0.456, 0.406)
_IMAGENET_STD: Triple = (0.229, 0.224, 0.225)
_REMBG = "https://github.com/danielgatis/rembg/releases/download/v0.0.0/"
_U2NET_PAGE = "https://github.com/xuebinqin/U-2-Net"
_U2NET_PAPER = "Qin et al., U²-Net, Pattern Recognition 2020, https://arxiv.org/abs/2005.09007"


@dataclass(frozen=True)
class Source:
    """One published file of a set of weights.

    Attributes:
        kind: "checkpoint" (a torch state dict) or "onnx" (float32 in, float32 out).
        file_name: Name under which the file is kept in the cache.
        page: Page where a person finds the file.
        address: Stable https address of the file; None where there is none (a file hoster with confirmation pages).
        size_bytes: Size of the file; None if unknown.
        md5: Hex digest that the publisher states; None if unknown.
        sha256: Hex digest; None if unknown.
    """

    kind: SourceKind
    file_name: str
    page: str
    address: str | None = None
    size_bytes: int | None = None
    md5: str | None = None
    sha256: str | None = None

    @property
    def verifiable(self) -> bool:
        """Whether a digest is known."""
        return self.md5 is not None or self.sha256 is not None


@dataclass(frozen=True)
class Weights:
    """A set of weights and everything that the exporter must know about it.

    Attributes:
        name: Name of the weights, and of the served model unless another one is given.
        architecture: Key of `matteserve_export.models.MODEL_BUILDERS`, or a name that has no builder (then only
            an ONNX source can be exported).
        input_size: (height, width) the weights were trained for.
        mean: Mean per channel (R, G, B), subtracted after the division by 255.
        std: Standard deviation per channel (R, G, B).
        resample: Filter that brings a picture to the input size.
        alpha_resample: Filter that brings the alpha back to the picture's size.
        sigmoid: Whether the core's output are logits, so that the serving graph applies the sigmoid.
        min_max: Whether the reference stretches each map to 0..1 by its own minimum and maximum.
        code_licence: SPDX expression of the architecture's code, or "unknown".
        weights_licence: SPDX expression of the weights, or "unknown".
        paper: Authors, title, address.
        sources: The published files; the first one with an address is what `matteserve pull` takes.
        size_multiple: Height and width must be multiples of it.
        options: Keyword arguments of the architecture's builder.
        training_only: Prefixes of entries that released checkpoints carry and that inference does not need.
        non_commercial: Whether the licence forbids commercial use.
        note: What a user should know.
    """

    name: str
    architecture: str
    input_size: tuple[int, int]
    mean: Triple
    std: Triple
    resample: ResampleFilter
    alpha_resample: ResampleFilter
    sigmoid: bool
    min_max: bool
    code_licence: str
    weights_licence: str
    paper: str
    sources: tuple[Source, ...]
    size_multiple: int = 32
    options: Mapping[str, object] = field(default_factory=lambda: MappingProxyType({}))
    training_only: tuple[str, ...] = ()
    non_commercial: bool = False
    note: str = ""

    def __post_init__(self) -> None:
        height, width = self.input_size
        if height % self.size_multiple or width % self.size_multiple:
            raise ExportError(f"weights {self.name!r}: size {height}x{width} is no multiple of {self.size_multiple}")
        if not all(value > 0 for value in self.std):
            raise ExportError(f"weights {self.name!r}: std {self.std} must be positive")

    def source(self, kind: SourceKind) -> Source | None:
        """The published file of that kind, if there is one."""
        return next((source for source in self.sources if source.kind == kind), None)

    @property
    def downloadable(self) -> Source | None:
        """The file that `matteserve pull` takes: the first one with an address."""
        return next((source for source in self.sources if source.address is not None), None)


def _u2net_family(name: str, weights_licence: str, note: str, *sources: Source, architecture: str = "") -> Weights:
    return Weights(
        name=name,
        architecture=architecture or name,
        input_size=(320, 320),
        mean=_IMAGENET_MEAN,
        std=_IMAGENET_STD,
        resample="bilinear",
        alpha_resample="bilinear",
        sigmoid=False,
        min_max=True,
        code_licence="Apache-2.0",
        weights_licence=weights_licence,
        paper=_U2NET_PAPER,
        sources=sources,
        note=note,
    )


def _drive(file_name: str, md5: str | None = None) -> Source:
    """A checkpoint that its authors publish on Google Drive, which has no stable direct address."""
    return Source("checkpoint", file_name, _U2NET_PAGE, md5=md5)


def _rembg(asset: str, size_bytes: int, md5: str, sha256: str) -> Source:
    return Source("onnx", asset, "https://github.com/danielgatis/rembg", _REMBG + asset, size_bytes, md5, sha256)


_ALL = (
    _u2net_family(
        "u2net",
        "Apache-2.0",
        "The authors ask to keep 320x320 for these weights.",
        _drive("u2net.pth"),
        _rembg(
            "u2net.onnx",
            175_997_641,
            "60024c5c889badc19c04ad937298a77b",
            "8d10d2f3bb75ae3b6d527c77944fc5e7dcd94b29809d47a739a7a728a912b491",
        ),
    ),
    _u2net_family(
        "u2netp",
        "Apache-2.0",
        "The small variant. The authors ask to keep 320x320 for these weights.",
        _drive("u2netp.pth", md5="e4f636406ca4e2af789941e7f139ee2e"),
        _rembg(
            "u2netp.onnx",
            4_574_861,
            "8e83ca70e441ab06c318d82300c84806",
            "309c8469258dda742793dce0ebea8e6dd393174f89934733ecc8b14c76f4ddd8",
        ),
    ),
    _u2net_family(
        "u2net_human_seg",
        "Apache-2.0",
        "People only. Trained on the Supervisely Person data set, which has terms of its own.",
        _drive("u2net_human_seg.pth"),
        _rembg(
            "u2net_human_seg.onnx",
            175_997_641,
            "c09ddc2e0104f800e3e1bb4652583d1f",
            "01eb6a29a5c4d8edb30b56adad9bb3a2a0535338e480724a213e0acfd2d1c73c",
        ),
        architecture="u2net",
    ),
    _u2net_family(
        "silueta",
        "unknown",
        "U²-Net made smaller by a third party; no licence of the weights was found.",
        _rembg(
            "silueta.onnx",
            44_173_029,
            "55e59e0d8062d2f5d013f4725ee84782",
            "75da6c8d2f8096ec743d071951be73b4a8bc7b3e51d9a6625d63644f90ffeedb",
        ),
        architecture="silueta",
    ),
    Weights(
        name="demo",
        architecture="u2netp",
        input_size=(192, 192),
        mean=_IMAGENET_MEAN,
        std=_IMAGENET_STD,
        resample="bilinear",
        alpha_resample="bilinear",
        sigmoid=False,
        min_max=True,
        code_licence="Apache-2.0",
        weights_licence="Apache-2.0",
        paper=_U2NET_PAPER,
        sources=(Source("checkpoint", "u2netp_demo.safetensors", "export/demo_weights of the source tree"),),
        note="Trained from scratch by this project on generated scenes; for demonstrations and tests.",
    ),
)

REGISTRY: Mapping[str, Weights] = MappingProxyType({weights.name: weights for weights in _ALL})
"""All known weights by name."""


def find_weights(name: str) -> Weights:
    """Look weights up.

    Raises:
        ExportError: No weights have this name; the message lists those that exist.
    """
    try:
        return REGISTRY[name]
    except KeyError as exc:
        raise ExportError(f"no weights are called {name!r}; known are: {', '.join(REGISTRY)}") from exc
