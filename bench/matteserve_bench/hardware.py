"""How much work an image is, how much a device can do, and the share of it that was reached.

Work is counted in multiply-accumulates (MAC) of the network; one MAC is two operations.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# 10^9 MAC of one image at (height, width), for engines whose manifest is out of reach. The exporter writes the same
# figures into manifests, and its tests count them with torch's FLOP counter.
_WORK = {
    "birefnet": (1265.8, (1024, 1024)),
    "birefnet_swin_b": (671.7, (1024, 1024)),
    "birefnet_swin_s": (438.0, (1024, 1024)),
    "birefnet_pvt_v2_b2": (345.5, (1024, 1024)),
    "birefnet_lite": (319.4, (1024, 1024)),
    "isnet": (159.6, (1024, 1024)),
    "u2net": (58.6, (320, 320)),
    "u2netp": (19.76, (320, 320)),
}

# 10^12 dense operations per second, as the vendor states them: fp16 and bf16 on tensor cores, fp32 without them, int8.
# Matched in this order against the name that the driver gives.
_PEAKS: tuple[tuple[str, tuple[float, float, float], str], ...] = (
    (r"H200", (989.0, 67.0, 1979.0), "NVIDIA H200 datasheet, half of the sparse figures"),
    (r"H100.*(PCIe)", (756.0, 51.0, 1513.0), "NVIDIA H100 datasheet, half of the sparse figures"),
    (r"H100.*NVL", (835.0, 60.0, 1671.0), "NVIDIA H100 datasheet, half of the sparse figures"),
    (r"H100", (989.0, 67.0, 1979.0), "NVIDIA H100 SXM datasheet, half of the sparse figures"),
    (r"A100", (312.0, 19.5, 624.0), "NVIDIA A100 datasheet"),
    (r"L40S", (362.0, 91.6, 733.0), "NVIDIA L40S datasheet"),
    (r"\bL4\b", (121.0, 30.3, 242.0), "NVIDIA L4 datasheet, half of the sparse figures"),
    (r"\bA10\b", (125.0, 31.2, 250.0), "NVIDIA A10 datasheet"),
    (r"\bT4\b", (65.0, 8.1, 130.0), "NVIDIA T4 datasheet"),
    (r"RTX 4090", (165.2, 82.6, 660.6), "NVIDIA Ada whitepaper, fp16 with fp32 accumulation"),
)


@dataclass(frozen=True)
class Roofline:
    """Share of a device's peak.

    Attributes:
        share: Operations of the images that were answered over what the device could do, 0 to 1.
        gmac_per_image: Work of one image in 10^9 MAC.
        peak_tops: The peak of one device in 10^12 operations per second.
        source: Where the peak is from.
    """

    share: float
    gmac_per_image: float
    peak_tops: float
    source: str


def gmac_per_image(model: Mapping[str, Any]) -> float | None:
    """Work of one image in 10^9 MAC: from the model's manifest, else from the table, scaled by pixels; None if unknown.

    Args:
        model: The part `model` of a header.
    """
    measured = (model.get("manifest") or {}).get("giga_macs")
    if measured:
        return float(measured)
    known = _WORK.get(str(model.get("architecture")))
    if known is None:
        return None
    gmac, (height, width) = known
    return gmac * int(model["height"]) * int(model["width"]) / (height * width)


def peak_tops_of(device: str, precision: str) -> tuple[float, str] | None:
    """(peak, source) of a known card at a precision; None if it is not in the table."""
    column = {"fp16": 0, "bf16": 0, "fp32": 1, "int8": 2}.get(precision)
    for pattern, peaks, source in _PEAKS:
        if column is not None and re.search(pattern, device):
            return peaks[column], source
    return None


def roofline_of(header: Mapping[str, Any], images_per_s: float, peak_tops: float | None = None) -> Roofline | None:
    """Share of the peak that a throughput is.

    Args:
        header: Of the run; says model and card.
        images_per_s: Throughput of one device.
        peak_tops: Its peak; None looks it up.
    """
    model = header.get("model", {})
    gmac = gmac_per_image(model)
    source = "--peak-tops"
    if peak_tops is None:
        gpus = header.get("server", {}).get("gpus", [])
        found = peak_tops_of(gpus[0]["name"], str(model.get("precision"))) if gpus else None
        if found is None:
            return None
        peak_tops, source = found
    if gmac is None or not images_per_s > 0:
        return None
    return Roofline(images_per_s * gmac * 2e9 / (peak_tops * 1e12), gmac, peak_tops, source)
