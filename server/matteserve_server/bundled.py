"""The demonstration model and picture that travel with the package."""

from __future__ import annotations

from pathlib import Path

from matteserve_server._errors import RepositoryError

_INSTALLED = Path(__file__).parent / "bundled"
_CHECKOUT = Path(__file__).parents[2]


def bundled_repository() -> Path:
    """The model repository with the demonstration model: inside an installed wheel, or at the top of a checkout."""
    return _find("model_repository")


def bundled_image() -> Path:
    """The picture that the demonstration cuts out."""
    return _find("examples") / "scene.jpg"


def default_repository() -> Path:
    """What is served when no repository is named: `model_repository` here, else the bundled one."""
    here = Path("model_repository")
    return here if here.is_dir() else bundled_repository()


def _find(name: str) -> Path:
    for root in (_INSTALLED, _CHECKOUT):
        if (root / name).is_dir():
            return root / name
    raise RepositoryError(
        f"this installation of matteserve has no {name}; install it from its wheel or its source tree"
    )
