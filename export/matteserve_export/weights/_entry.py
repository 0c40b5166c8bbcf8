"""What the registry records about a set of weights and about each file that it is published as."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Literal

from matteserve_client._contract import Numerics, ResampleFilter
from matteserve_export._errors import ExportError

__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "PatchOrder", "Source", "SourceKind", "Triple", "Weights"]

SourceKind = Literal["checkpoint", "onnx"]
PatchOrder = Literal["current", "legacy"]
Triple = tuple[float, float, float]

IMAGENET_MEAN: Triple = (0.485, 0.456, 0.406)
IMAGENET_STD: Triple = (0.229, 0.224, 0.225)


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
        aliases: Other names that people know the weights by, rembg's above all.
        size_range: Smallest and largest side of weights that were trained at many sizes; None for one size.
        size_effect: What is known about these weights at another size than their own.
        size_multiple: Height and width must be multiples of it.
        options: Keyword arguments of the architecture's builder.
        patch_order: BiRefNet only: in which order the checkpoint expects the channels of its image patches. The
            official code changed it on 2024-11-05 and left all names and shapes as they were, so that a wrong choice
            fails nowhere and only makes masks worse. None if it is unknown (or the architecture has no such thing).
        patch_order_basis: How that is known.
        non_commercial: Whether the licence forbids commercial use; such weights must be asked for explicitly.
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
    aliases: tuple[str, ...] = ()
    size_range: tuple[int, int] | None = None
    size_effect: str = ""
    size_multiple: int = 32
    options: Mapping[str, object] = field(default_factory=lambda: MappingProxyType({}))
    patch_order: PatchOrder | None = None
    patch_order_basis: str = ""
    non_commercial: bool = False
    note: str = ""

    def __post_init__(self) -> None:
        height, width = self.input_size
        if height % self.size_multiple or width % self.size_multiple:
            raise ExportError(f"weights {self.name!r}: size {height}x{width} is no multiple of {self.size_multiple}")
        if not all(value > 0 for value in self.std):
            raise ExportError(f"weights {self.name!r}: std {self.std} must be positive")

    def source(self, kind: SourceKind) -> Source | None:
        """The published file of that kind, if there is one; the one that can be downloaded before others."""
        of_kind = [source for source in self.sources if source.kind == kind]
        return next((source for source in of_kind if source.address is not None), of_kind[0] if of_kind else None)

    @property
    def downloadable(self) -> Source | None:
        """The file that `matteserve pull` takes: the first one with an address."""
        return next((source for source in self.sources if source.address is not None), None)

    def with_numerics(self, numerics: Numerics) -> Weights:
        """The entry with somebody's pre- and post-processing in place of its authors'.

        rembg treats all models alike: Lanczos both ways, each map stretched by its minimum and maximum; what it does
        inside the graph is in `ServingConfig`. Mean and standard deviation are the same.

        Args:
            numerics: "reference" changes nothing.
        """
        if numerics == "reference":
            return self
        return replace(self, resample="lanczos", alpha_resample="lanczos", min_max=True)

    def require_acceptance(self, accepted: bool) -> None:
        """Refuse weights that forbid commercial use unless that was accepted.

        Raises:
            ExportError: It was not.
        """
        if self.non_commercial and not accepted:
            raise ExportError(
                f"{self.name}: its weights are under {self.weights_licence}, which forbids commercial use. {self.note} "
                "If that fits what you do, say so with --accept-non-commercial"
            )

    @property
    def has_patch_order(self) -> bool:
        """Whether the architecture has image patches whose order must be known."""
        return self.architecture.startswith("birefnet")
