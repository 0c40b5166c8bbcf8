"""BiRefNet's official weights, and a relative that is not free.

Checkpoints are those of the author's repositories on Hugging Face, at a fixed revision where size and SHA-256 are
known; the others follow the repository's main branch, and the digest that the server announces is checked instead. The
ONNX files are rembg's assets, which carry the names of the author's own (of the lite one both are known to be the same
file), or the author's.

All of them differ from what rembg does in three ways, and the official way is recorded here: bilinear resize (rembg:
Lanczos), division by 255 (rembg: by the picture's maximum), and after the sigmoid no stretching by minimum and maximum
(rembg stretches). The client's parity mode does not cover BiRefNet.

Patch order: it changed in the official code on 2024-11-05 (commit 5198d3f), and what was trained before needs the old
one. The dates are those of the official repository's README, history and issues; no checkpoint was at hand to try.
"""

from __future__ import annotations

from matteserve_export.weights._entry import IMAGENET_MEAN, IMAGENET_STD, PatchOrder, Source, SourceKind, Weights
from matteserve_export.weights._u2net import rembg_asset

__all__ = ["BIREFNET"]

_HUB = "https://huggingface.co/"
_RELEASE = "https://github.com/ZhengPeng7/BiRefNet/releases/download/v1/"
_PAGE = "https://github.com/ZhengPeng7/BiRefNet"
_PAPER = (
    "Zheng et al., Bilateral Reference for High-Resolution Dichotomous Image Segmentation, CAAI Artificial "
    "Intelligence Research 2024, https://arxiv.org/abs/2401.03407"
)
_DIS5K = "Trained on DIS5K among others, whose own terms allow research and education only."
_SWIN_L_FP32, _SWIN_L_FP16, _SWIN_T_FP32, _SWIN_T_FP16 = 884_878_856, 444_473_596, 177_634_392, 88_965_896
_SWIN_L_ONNX = 972_666_916


def _hub(repository: str, revision: str = "main", size_bytes: int | None = None, sha256: str | None = None) -> Source:
    """The `model.safetensors` of one of the author's repositories on Hugging Face."""
    page = f"{_HUB}ZhengPeng7/{repository}"
    address = f"{page}/resolve/{revision}/model.safetensors"
    return Source("checkpoint", f"{repository}.safetensors", page, address, size_bytes, sha256=sha256)


def _release(asset: str, size_bytes: int | None = None, sha256: str | None = None) -> Source:
    """A file of the GitHub release."""
    kind: SourceKind = "onnx" if asset.endswith(".onnx") else "checkpoint"
    return Source(kind, asset, f"{_PAGE}/releases/tag/v1", _RELEASE + asset, size_bytes, sha256=sha256)


def _birefnet(
    name: str,
    note: str,
    *sources: Source,
    order: PatchOrder | None,
    basis: str,
    architecture: str = "birefnet",
    size: tuple[int, int] = (1024, 1024),
    size_range: tuple[int, int] | None = None,
    size_effect: str = "",
    aliases: tuple[str, ...] = (),
) -> Weights:
    return Weights(
        name=name,
        architecture=architecture,
        input_size=size,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        resample="bilinear",
        alpha_resample="bicubic",
        sigmoid=True,
        min_max=False,
        code_licence="MIT",
        weights_licence="MIT" if sources else "unknown",
        paper=_PAPER,
        sources=sources,
        aliases=aliases,
        size_range=size_range,
        size_effect=size_effect,
        patch_order=order,
        patch_order_basis=basis,
        note=note,
    )


BIREFNET = (
    _birefnet(
        "birefnet",
        f"General use, Swin-L. {_DIS5K} The code beside the checkpoint on Hugging Face has the current patch order, "
        "although the weights are older than it: compare both on a picture of yours.",
        _hub(
            "BiRefNet",
            "e2bf8e4460fc8fa32bba5ea4d94b3233d367b0e4",
            _SWIN_L_FP16,
            "9ab37426bf4de0567af6b5d21b16151357149139362e6e8992021b8ce356a154",
        ),
        _release("BiRefNet-general-epoch_244.pth"),
        rembg_asset(
            "BiRefNet-general-epoch_244.onnx",
            _SWIN_L_ONNX,
            md5="7a35a0141cbbc80de11d9c9a28f52697",
            sha256="58f621f00f5d756097615970a88a791584600dcf7c45b18a0a6267535a1ebd3c",
        ),
        order="legacy",
        basis="published by 2024-07-28, before the change",
        size_effect="maximum F on DIS-VD: .908 at 1024x1024, .888 at 2048x2048, .834 at 512x512 (the author's cards)",
        aliases=("birefnet-general",),
    ),
    _birefnet(
        "birefnet_lite",
        f"General use, Swin-T: a quarter of the work. {_DIS5K}",
        _hub(
            "BiRefNet_lite",
            "aa62cd87eafb9cc43056d08ef3615a14628b831d",
            _SWIN_T_FP32,
            "4417d89795250e698c3cb0ae8df15743810065f646f48a694fdfa7ca052d0815",
        ),
        _release("BiRefNet-general-bb_swin_v1_tiny-epoch_232.pth"),
        rembg_asset(
            "BiRefNet-general-bb_swin_v1_tiny-epoch_232.onnx",
            224_005_088,
            md5="4fab47adc4ff364be1713e97b7e66334",
            sha256="5600024376f572a557870a5eb0afb1e5961636bef4e1e22132025467d0f03333",
        ),
        order="legacy",
        basis="published by 2024-08-19, before the change",
        architecture="birefnet_lite",
        aliases=("birefnet-general-lite", "BiRefNet_T"),
    ),
    _birefnet(
        "birefnet_lite_2k",
        f"Wide pictures, Swin-T. {_DIS5K}",
        _hub("BiRefNet_lite-2K"),
        _release(
            "BiRefNet_lite-general-2K-epoch_232.onnx",
            331_082_421,
            "6003d2f758bdb4e4802a09e39167529bc2eef9288d5b8fa537331467cbc4759d",
        ),
        order="legacy",
        basis="published by 2024-09-24, before the change",
        architecture="birefnet_lite",
        size=(1440, 2560),
    ),
    _birefnet(
        "birefnet_lite_matting",
        "Matting, Swin-T.",
        _hub(
            "BiRefNet_lite-matting",
            "99c33412e3f58e1f33187abdc8c435c645243690",
            _SWIN_T_FP16,
            "ce8bcfc045e336322c0424a5863dcfb7e9ce8fed0a5fd4d1b2b20adf12d97243",
        ),
        order=None,
        basis="no date of publication was found",
        architecture="birefnet_lite",
    ),
    _birefnet(
        "birefnet_matting",
        "Hair, fur and what is half transparent; no trimap. Trained on matting sets with terms of their own.",
        _hub(
            "BiRefNet-matting",
            "eccde0a8cbdce7ac5fecfeb06340fe7b949e85d9",
            _SWIN_L_FP32,
            "a9875de5b1e6c8eb5fdaa8c727a82927ce442cdc87ba3abee6a77e6fa46c25bb",
        ),
        _release(
            "BiRefNet-matting-epoch_100.onnx",
            972_667_742,
            "6065d27c615ea27308f5b88598dd8db116eb07436c7a323ca40d13b2866c309e",
        ),
        order="legacy",
        basis="published by 2024-10-06, before the change",
    ),
    _birefnet(
        "birefnet_portrait",
        "People. Trained on P3M-10k and a set of people, which have terms of their own.",
        _hub(
            "BiRefNet-portrait",
            "b6561965a70070d9143fd9e558f6ca3c481510db",
            _SWIN_L_FP32,
            "4a4eb3a5469b75f0cccaec6772c22fc30e6c12ed429c2c0ba71b43e3d8d97182",
        ),
        rembg_asset("BiRefNet-portrait-epoch_150.onnx", _SWIN_L_ONNX, md5="c3a64a6abf20250d090cd055f12a3b67"),
        order="legacy",
        basis="published by 2024-08-27, before the change",
    ),
    _birefnet(
        "birefnet_hr",
        f"General use at 2048x2048, Swin-L. {_DIS5K}",
        _hub(
            "BiRefNet_HR",
            "a7a562f6fd16021180f2f4348f4de003a2d3d1e1",
            _SWIN_L_FP16,
            "9d678bafec0b0019fbb073b7fd02f05ede25dc4b15254f23b2fb0be333200c0d",
        ),
        _release(
            "BiRefNet_HR-general-epoch_130.onnx",
            1_098_928_953,
            "db0217e99b25e0c4f6f4dca2892ff1f7ea7aba38fb6ad84f93122a4024be536a",
        ),
        order="current",
        basis="published on 2025-02-01, after the change, with code that has the current order",
        size=(2048, 2048),
        size_effect="maximum F on DIS-VD: .925 at 2048x2048, .876 at 1024x1024, .540 at 512x512 (the author's cards)",
    ),
    _birefnet(
        "birefnet_hr_matting",
        "Matting at 2048x2048, Swin-L. Trained on matting sets with terms of their own.",
        _hub(
            "BiRefNet_HR-matting",
            "5d6b6f8adcb5b417c871b1d84ceaae9871355b7f",
            _SWIN_L_FP16,
            "a5a4de698739ea5e0e8bbab28e1b293dde95092b87a442d566cbc585c53cef55",
        ),
        _release(
            "BiRefNet_HR-matting-epoch_135.onnx",
            1_098_928_867,
            "45b7d92ce0e2e75e1c8a564a9e84c87ac9da7f4315d2deeef3674864e809aef3",
        ),
        order="current",
        basis="published on 2025-02-12, after the change",
        size=(2048, 2048),
    ),
    _birefnet(
        "birefnet_dynamic",
        f"General use at any size from 256 to 2304, Swin-L. {_DIS5K}",
        _hub(
            "BiRefNet_dynamic",
            "280306042f57b7a33854319da62fd86aaa89ec4c",
            _SWIN_L_FP16,
            "e3d2e4884e51ff30f0cd630edc6b1e41b06b7f23a0a2a5169f7b7cb33a711c2d",
        ),
        _release("BiRefNet_dynamic-general-epoch_174.pth"),
        order="current",
        basis="published on 2025-03-31, after the change",
        size_range=(256, 2304),
    ),
    _birefnet(
        "birefnet_dynamic_matting",
        "Matting at any size from 256 to 2304, Swin-L.",
        _hub("BiRefNet_dynamic-matting"),
        order="current",
        basis="trained with changing sizes, which the official code does since 2025-03-10",
        size_range=(256, 2304),
    ),
    _birefnet(
        "birefnet_512",
        f"General use at 512x512, Swin-L. {_DIS5K}",
        _hub("BiRefNet_512x512"),
        _release("BiRefNet-general-resolution_512x512-fp16-epoch_216.onnx"),
        order="current",
        basis="its card compares with BiRefNet_HR, so it is younger than 2025-02-01",
        size=(512, 512),
        aliases=("BiRefNet_512x512",),
    ),
    _birefnet(
        "birefnet_dis5k",
        f"The paper's weights for dichotomous segmentation, for comparisons. {_DIS5K}",
        _hub("BiRefNet-DIS5K"),
        _release("BiRefNet-DIS-epoch_590.pth"),
        rembg_asset("BiRefNet-DIS-epoch_590.onnx", _SWIN_L_ONNX, md5="2d4d44102b446f33a4ebb2e56c051f2b"),
        order="legacy",
        basis="published by 2024-08-19, before the change",
        aliases=("birefnet-dis",),
    ),
    _birefnet(
        "birefnet_massive",
        f"Trained on all of DIS5K but its validation set. {_DIS5K}",
        _hub("BiRefNet-DIS5K-TR_TEs"),
        rembg_asset(
            "BiRefNet-massive-TR_DIS5K_TR_TEs-epoch_420.onnx", _SWIN_L_ONNX, md5="33e726a2136a3d59eb0fdf613e31e3e9"
        ),
        order="legacy",
        basis="published by 2024-07-29, before the change",
        aliases=("BiRefNet-DIS5K-TR_TEs",),
    ),
    _birefnet(
        "birefnet_hrsod",
        "The paper's weights for salient objects at high resolution, for comparisons.",
        _hub("BiRefNet-HRSOD"),
        rembg_asset("BiRefNet-HRSOD_DHU-epoch_115.onnx", _SWIN_L_ONNX, md5="c017ade5de8a50ff0fd74d790d268dda"),
        order="legacy",
        basis="published by 2024-08-19, before the change",
    ),
    _birefnet(
        "birefnet_cod",
        "The paper's weights for camouflaged objects, for comparisons.",
        _hub("BiRefNet-COD"),
        rembg_asset("BiRefNet-COD-epoch_125.onnx", _SWIN_L_ONNX, md5="f6d0d21ca89d287f17e7afe9f5fd3b45"),
        order="legacy",
        basis="published by 2024-08-19, before the change",
    ),
    _birefnet(
        "birefnet_legacy",
        "The general weights before those of July 2024.",
        _hub("BiRefNet-legacy"),
        order="legacy",
        basis="published by 2024-08-26, before the change",
    ),
    *(
        _birefnet(
            f"birefnet_{backbone}",
            f"The architecture with another backbone ({spoken}), for weights of your own; none are released.",
            order="current",
            basis="what the official code trains since 2024-11-05",
            architecture=f"birefnet_{backbone}",
        )
        for backbone, spoken in (("swin_b", "Swin-B"), ("swin_s", "Swin-S"), ("pvt_v2_b2", "PVT v2 b2"))
    ),
    Weights(
        name="rmbg_2",
        architecture="rmbg_2",
        input_size=(1024, 1024),
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        resample="bilinear",
        alpha_resample="bicubic",
        sigmoid=False,  # it is in the ONNX
        min_max=False,
        code_licence="unknown",
        weights_licence="CC-BY-NC-4.0",
        paper="BRIA AI, RMBG-2.0, https://huggingface.co/briaai/RMBG-2.0; a BiRefNet trained on pictures of their own",
        sources=(
            rembg_asset(
                "bria-rmbg-2.0.onnx",
                1_024_331_469,
                sha256="5b486f08200f513f460da46dd701db5fbb47d79b4be4b708a19444bcd4e79958",
            ),
        ),
        aliases=("bria-rmbg", "bria-rmbg-2.0", "RMBG-2.0"),
        non_commercial=True,
        note="Commercial use needs a contract with BRIA.",
    ),
)
