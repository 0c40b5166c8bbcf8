"""U²-Net and its relatives: small pictures, small cost.

MD5 digests are the ones that rembg states; for `u2net.pth` and `u2net_human_seg.pth` public code disagrees which digest
is whose, so neither stands here. SHA-256 digests and sizes are those of rembg's assets.
"""

from __future__ import annotations

from matteserve_export.weights._entry import IMAGENET_MEAN, IMAGENET_STD, Source, Weights

__all__ = ["DEMO", "U2NET", "rembg_asset"]

_REMBG_PAGE = "https://github.com/danielgatis/rembg"
_REMBG = _REMBG_PAGE + "/releases/download/v0.0.0/"
_PAGE = "https://github.com/xuebinqin/U-2-Net"
_PAPER = "Qin et al., U²-Net, Pattern Recognition 2020, https://arxiv.org/abs/2005.09007"


def rembg_asset(asset: str, size_bytes: int, *, md5: str | None = None, sha256: str | None = None) -> Source:
    """One of rembg's ONNX files, at a stable address."""
    return Source("onnx", asset, _REMBG_PAGE, _REMBG + asset, size_bytes, md5, sha256)


def _drive(file_name: str, md5: str | None = None) -> Source:
    """A checkpoint that its authors publish on Google Drive, which has no stable direct address."""
    return Source("checkpoint", file_name, _PAGE, md5=md5)


def _u2net(
    name: str,
    weights_licence: str,
    note: str,
    *sources: Source,
    architecture: str = "",
    size: int = 320,
) -> Weights:
    return Weights(
        name=name,
        architecture=architecture or name,
        input_size=(size, size),
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        resample="bilinear",
        alpha_resample="bilinear",
        sigmoid=False,
        min_max=True,
        code_licence="Apache-2.0",
        weights_licence=weights_licence,
        paper=_PAPER,
        sources=sources,
        note=note,
    )


U2NET = (
    _u2net(
        "u2net",
        "Apache-2.0",
        "The authors ask to keep 320x320 for these weights.",
        _drive("u2net.pth"),
        rembg_asset(
            "u2net.onnx",
            175_997_641,
            md5="60024c5c889badc19c04ad937298a77b",
            sha256="8d10d2f3bb75ae3b6d527c77944fc5e7dcd94b29809d47a739a7a728a912b491",
        ),
    ),
    _u2net(
        "u2netp",
        "Apache-2.0",
        "The small variant. The authors ask to keep 320x320 for these weights.",
        _drive("u2netp.pth", md5="e4f636406ca4e2af789941e7f139ee2e"),
        rembg_asset(
            "u2netp.onnx",
            4_574_861,
            md5="8e83ca70e441ab06c318d82300c84806",
            sha256="309c8469258dda742793dce0ebea8e6dd393174f89934733ecc8b14c76f4ddd8",
        ),
    ),
    _u2net(
        "u2net_human_seg",
        "Apache-2.0",
        "People only. Trained on the Supervisely Person data set, which has terms of its own.",
        _drive("u2net_human_seg.pth"),
        rembg_asset(
            "u2net_human_seg.onnx",
            175_997_641,
            md5="c09ddc2e0104f800e3e1bb4652583d1f",
            sha256="01eb6a29a5c4d8edb30b56adad9bb3a2a0535338e480724a213e0acfd2d1c73c",
        ),
        architecture="u2net",
    ),
    _u2net(
        "silueta",
        "unknown",
        "U²-Net made smaller by a third party; no licence of the weights was found.",
        rembg_asset(
            "silueta.onnx",
            44_173_029,
            md5="55e59e0d8062d2f5d013f4725ee84782",
            sha256="75da6c8d2f8096ec743d071951be73b4a8bc7b3e51d9a6625d63644f90ffeedb",
        ),
    ),
)

DEMO = _u2net(
    "demo",
    "Apache-2.0",
    "Trained from scratch by this project on generated scenes; for demonstrations and tests.",
    Source("checkpoint", "u2netp_demo.safetensors", "export/demo_weights of the source tree"),
    architecture="u2netp",
    size=192,
)
