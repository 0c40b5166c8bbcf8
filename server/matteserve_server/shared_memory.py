"""The Python backend's regions in /dev/shm: is there room, and what did a killed server leave."""

from __future__ import annotations

import os
import re
import shutil
import uuid
from collections.abc import Iterable
from pathlib import Path

from matteserve_server._errors import ResourceError
from matteserve_server.repository import RepositoryModel

SHM = Path("/dev/shm")
_OWNED = re.compile(r"matteserve_(?P<pid>\d+)_[0-9a-f]{8}_")
_MEBIBYTE = 1 << 20


def new_prefix() -> str:
    """A prefix that names this process, so that what it leaves can be recognised."""
    return f"matteserve_{os.getpid()}_{uuid.uuid4().hex[:8]}_"


def remove_regions(prefix: str) -> list[str]:
    """Remove the regions of one server that has ended; return their names."""
    return _unlink(entry for entry in _entries() if entry.name.startswith(prefix))


def remove_stale_regions() -> list[str]:
    """Remove the regions whose owner is gone, as after `kill -9`; return their names."""
    return _unlink(
        entry
        for entry in _entries()
        if (match := _OWNED.match(entry.name)) and not Path(f"/proc/{match['pid']}").exists()
    )


def check_room(engines: Iterable[RepositoryModel], *, free_bytes: int | None = None) -> None:
    """Check that /dev/shm can hold the tensors of a full batch for every instance.

    Args:
        engines: The engines that will be loaded.
        free_bytes: Room there is; None asks the machine.

    Raises:
        ResourceError: There is too little.
    """
    needed = sum(_region_bytes(engine) for engine in engines)
    free = shutil.disk_usage(SHM).free if free_bytes is None and SHM.is_dir() else free_bytes or 0
    if free < needed:
        raise ResourceError(
            f"/dev/shm has {free / _MEBIBYTE:.0f} MiB free, the models need {needed / _MEBIBYTE:.0f} MiB (a full batch "
            "per instance); in a container start it with a larger --shm-size, or load fewer models or a smaller "
            "max_batch_size"
        )


def _region_bytes(engine: RepositoryModel) -> int:
    instances = sum(max(1, group.count) for group in engine.config.instance_group) or 1
    return instances * (_MEBIBYTE + engine.tensor_bytes())


def _entries() -> list[Path]:
    return list(SHM.iterdir()) if SHM.is_dir() else []


def _unlink(entries: Iterable[Path]) -> list[str]:
    removed = []
    for entry in entries:
        entry.unlink(missing_ok=True)
        removed.append(entry.name)
    return removed
