"""What a figure was measured on; no figure is quoted without it."""

from __future__ import annotations

import os
import platform
from datetime import datetime, timezone
from pathlib import Path

from matteserve_client import ModelContract, __version__


def describe_environment(model: str, contract: ModelContract) -> dict[str, str]:
    """The client's machine, the software and the model, as text by name."""
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "cpu": f"{_cpu_model()}, {len(os.sched_getaffinity(0))} cores",
        "python": platform.python_version(),
        "matteserve": __version__,
        "model": f"{model} ({contract.engine} {contract.precision}, {contract.width}x{contract.height})",
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
