"""Room in /dev/shm, and what a killed server leaves there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from matteserve_server import ResourceError, shared_memory
from matteserve_server.repository import Repository
from support.tiny_model import write_repository


def test_too_little_room_says_how_much_is_needed(tmp_path: Path) -> None:
    engines = Repository.read(write_repository(tmp_path)).engines_of(["tiny"])
    with pytest.raises(ResourceError, match=r"/dev/shm has 0 MiB free, the models need 1 MiB .*--shm-size"):
        shared_memory.check_room(engines, free_bytes=100_000)
    shared_memory.check_room(engines, free_bytes=2 << 20)


@pytest.fixture
def shm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(shared_memory, "SHM", tmp_path)
    return tmp_path


def test_only_regions_of_dead_owners_are_stale(shm: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    mine = shm / f"{shared_memory.new_prefix()}1234"
    dead = shm / f"matteserve_{ended.pid}_0123abcd_1234"
    foreign = shm / "psm_somebody"
    for file in (mine, dead, foreign):
        file.touch()
    assert shared_memory.remove_stale_regions() == [dead.name]
    assert sorted(shm.iterdir()) == sorted([mine, foreign])


def test_regions_of_one_server_are_removed_by_prefix(shm: Path) -> None:
    prefix, other = shared_memory.new_prefix(), shared_memory.new_prefix()
    (shm / f"{prefix}a").touch()
    (shm / f"{other}a").touch()
    assert shared_memory.remove_regions(prefix) == [f"{prefix}a"]
    assert [file.name for file in shm.iterdir()] == [f"{other}a"]
