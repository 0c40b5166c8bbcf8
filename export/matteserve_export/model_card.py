"""A short page beside every engine: what it is, where it comes from, what it was compared with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matteserve_export.weights import Weights

__all__ = ["model_card"]


def model_card(manifest: Mapping[str, Any], weights: Weights) -> str:
    """Write a model card, in Markdown.

    Args:
        manifest: The engine's manifest.
        weights: The registry's entry of its weights.
    """
    origin, size = manifest["weights"], manifest["input"]
    sections = [
        f"# {manifest['model']}",
        _summary(manifest, weights),
        "## Weights\n\n" + _bullets(_weights(origin, weights)),
        "## Input and output\n\n" + _bullets(_processing(size, weights)),
        "## Compared before it was published\n\n" + _comparisons(manifest["parity"]),
        f"## Cite\n\n{weights.paper}",
    ]
    made = ", ".join(f"{name} {version}" for name, version in manifest["producer"].items())
    return (
        "\n\n".join([*sections, f"Made on {manifest['created_utc']} by {made}; details in `1/manifest.json`."]) + "\n"
    )


def _summary(manifest: Mapping[str, Any], weights: Weights) -> str:
    size = manifest["input"]
    if manifest["weights"]["random"]:
        return (
            f"**Random weights.** The architecture {weights.architecture} with weights that follow from the names of "
            "its entries: it is as fast and as large as the real one, and its masks mean nothing."
        )
    return (
        f"{weights.note}\n\nArchitecture {weights.architecture} at {size['height']}x{size['width']}, "
        f"{manifest['precision']}, {manifest['giga_macs']} giga-MACs a picture."
    )


def _weights(origin: Mapping[str, Any], weights: Weights) -> list[str]:
    lines = [f"licence of the weights: {origin['licence']}; of the architecture's code: {weights.code_licence}"]
    if origin["random"]:
        return lines
    lines.insert(0, f"file: {origin['file']}, SHA-256 {origin['sha256']}")
    lines += [f"published at {page}" for page in dict.fromkeys(source.page for source in weights.sources)]
    if "patch_order" in origin:
        lines.append(f"patch order of the checkpoint: {origin['patch_order']} ({origin['patch_order_basis']})")
    return lines


def _processing(size: Mapping[str, Any], weights: Weights) -> list[str]:
    post = " then ".join(
        [
            *(["the sigmoid"] if size["sigmoid"] else []),
            *(["stretching each map to 0..1 by its own minimum and maximum"] if size["min_max"] else []),
        ]
    )
    # Manifests of before there was a choice have no numerics.
    divisor = "its largest sample, as rembg does," if size.get("numerics") == "rembg" else "255"
    mean, std = (", ".join(f"{value:g}" for value in size[key]) for key in ("mean", "std"))
    lines = [
        f"in: UINT8 [B, {size['height']}, {size['width']}, 3], RGB, B up to {size['max_batch_size']}; a picture is "
        f"stretched to it ({weights.resample})",
        f"in the graph: division by {divisor}, mean {mean}, standard deviation {std}{', then ' + post if post else ''}",
        f"out: UINT8 [B, {size['height']}, {size['width']}], alpha; brought back to the picture's size "
        f"({weights.alpha_resample})",
    ]
    if weights.size_effect:
        lines.append(f"other sizes: {weights.size_effect}")
    return lines


def _comparisons(parity: list[Mapping[str, Any]]) -> str:
    rows = [
        f"| {gate['name']} | {gate['figures']['max_abs']:.1e} | {gate['figures']['mean_abs']:.1e} "
        f"| {gate['figures']['iou']:.4f} |"
        for gate in parity
    ]
    return "\n".join(["| Comparison | max abs | mean abs | IoU at 0.5 |", "| --- | --- | --- | --- |", *rows])


def _bullets(lines: list[str]) -> str:
    return "\n".join(f"* {line}" for line in lines)
