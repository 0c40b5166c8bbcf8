"""IS-Net. Digests and sizes are those of rembg's assets; the checkpoints lie on a file hoster without digests."""

from __future__ import annotations

from matteserve_export.weights._entry import Source, Triple, Weights
from matteserve_export.weights._u2net import rembg_asset

__all__ = ["ISNET"]

_DIS_PAGE = "https://github.com/xuebinqin/DIS"
_PAPER = "Qin et al., Highly Accurate Dichotomous Image Segmentation, ECCV 2022, https://arxiv.org/abs/2203.03041"
_DIS5K = "Trained on DIS5K, whose own terms allow research and education only."


def _isnet(
    name: str, mean: Triple, note: str, *sources: Source, architecture: str = "isnet", aliases: tuple[str, ...] = ()
) -> Weights:
    return Weights(
        name=name,
        architecture=architecture,
        input_size=(1024, 1024),
        mean=mean,
        std=(1.0, 1.0, 1.0),
        resample="bilinear",
        alpha_resample="bilinear",
        sigmoid=False,
        min_max=True,
        code_licence="Apache-2.0",
        weights_licence="Apache-2.0",
        paper=_PAPER,
        sources=sources,
        aliases=aliases,
        note=note,
    )


ISNET = (
    _isnet(
        "isnet",
        (0.5, 0.5, 0.5),
        "The authors' weights for general use (isnet-general-use). Their script stretches the mask to 0..1 after "
        "resizing it to the picture, the served graph before.",
        Source("checkpoint", "isnet-general-use.pth", _DIS_PAGE),
        rembg_asset(
            "isnet-general-use.onnx",
            178_648_008,
            md5="fc16ebd8b0c10d971d3513d564d01e29",
            sha256="60920e99c45464f2ba57bee2ad08c919a52bbf852739e96947fbb4358c0d964a",
        ),
        aliases=("isnet-general-use",),
    ),
    _isnet(
        "isnet_dis5k",
        (0.5, 0.5, 0.5),
        f"The paper's weights, for comparisons. {_DIS5K}",
        Source("checkpoint", "isnet.pth", _DIS_PAGE),
    ),
    _isnet(
        "isnet_anime",
        (0.485, 0.456, 0.406),
        "Characters of Japanese animation, by a third party. Normalised as rembg does with this file; the authors' own "
        "script subtracts no mean and keeps the aspect ratio.",
        rembg_asset(
            "isnet-anime.onnx",
            176_069_933,
            md5="6f184e756bb3bd901c8849220a83e38e",
            sha256="f15622d853e8260172812b657053460e20806f04b9e05147d49af7bed31a6e99",
        ),
        # Their network is IS-Net with a training encoder beside it, but no checkpoint of theirs was seen here.
        architecture="isnet_anime",
        aliases=("anime",),
    ),
)
