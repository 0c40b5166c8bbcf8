"""Which mask belongs to which picture: the one with the same name, whatever the suffixes are."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from matteserve_bench._errors import EvaluationError

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif"})
"""Suffixes of picture files, in lower case."""

_SHOWN = 5  # names in a message


@dataclass(frozen=True)
class Pair:
    """One picture with its ground truth.

    Attributes:
        image: The picture.
        mask: Its mask or alpha.
        trimap: Says where the alpha is in question; None without `--trimaps`.
    """

    image: Path
    mask: Path
    trimap: Path | None = None

    @property
    def name(self) -> str:
        """The picture's file name."""
        return self.image.name


@dataclass(frozen=True)
class Pairing:
    """What two or three folders hold.

    Attributes:
        pairs: Complete ones, sorted by the picture's name.
        incomplete: A line for each folder that lacks partners, with their names; empty if nothing is missing.
    """

    pairs: tuple[Pair, ...]
    incomplete: tuple[str, ...]


def find_pairs(images: Path, masks: Path, trimaps: Path | None = None) -> Pairing:
    """Pair pictures with masks by file name without suffix; subfolders and hidden files are left out.

    Args:
        images: Folder of pictures.
        masks: Folder of masks.
        trimaps: Folder of trimaps; None if there are none.

    Raises:
        EvaluationError: Two files of one folder have the same name but for the suffix, a folder stands for two of the
            three, or nothing pairs.
    """
    folders = {"images": images, "masks": masks} | ({} if trimaps is None else {"trimaps": trimaps})
    for name, folder in folders.items():
        if sum(folder.resolve() == other.resolve() for other in folders.values()) > 1:
            raise EvaluationError(f"--{name} {folder} is given twice; pictures and masks need folders of their own")
    found = {name: _by_stem(folder) for name, folder in folders.items()}
    stems = set.intersection(*(set(files) for files in found.values()))
    if not stems:
        counts = ", ".join(f"{len(files)} in {folders[name]}" for name, files in found.items())
        raise EvaluationError(
            f"no picture has a mask of its name ({counts}); names must be equal but for the suffix, "
            f"which must be one of {' '.join(sorted(SUFFIXES))}"
        )
    everything = set[str]().union(*found.values())
    incomplete = []
    for name, files in found.items():
        if missing := sorted(everything - files.keys()):
            incomplete.append(f"--{name} {folders[name]} has no file for {_some(missing)}")
    pairs = tuple(Pair(*(files[stem] for files in found.values())) for stem in sorted(stems))
    return Pairing(pairs, tuple(incomplete))


def _by_stem(folder: Path) -> dict[str, Path]:
    files: defaultdict[str, list[Path]] = defaultdict(list)
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in SUFFIXES and path.is_file() and not path.name.startswith("."):
            files[path.stem].append(path)
    if doubles := [" and ".join(path.name for path in paths) for paths in files.values() if len(paths) > 1]:
        raise EvaluationError(
            f"{folder} holds files that differ by their suffix only: {_some(doubles)}; keep one of each"
        )
    return {stem: paths[0] for stem, paths in files.items()}


def _some(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
