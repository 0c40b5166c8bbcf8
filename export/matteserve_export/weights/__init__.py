"""The registry of weights: where they come from, what they expect, and under which licence they are.

A fact that could not be established stands as None (a number, a digest, an address, a patch order) or "unknown" (a
licence); nothing here is guessed.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from types import MappingProxyType

from matteserve_export._errors import ExportError
from matteserve_export.weights._birefnet import BIREFNET
from matteserve_export.weights._entry import PatchOrder, Source, SourceKind, Weights
from matteserve_export.weights._isnet import ISNET
from matteserve_export.weights._u2net import DEMO, U2NET

__all__ = ["REGISTRY", "PatchOrder", "Source", "SourceKind", "Weights", "find_weights"]

REGISTRY: Mapping[str, Weights] = MappingProxyType(
    {weights.name: weights for weights in (*U2NET, *ISNET, *BIREFNET, DEMO)}
)
"""All known weights by name."""


def find_weights(name: str) -> Weights:
    """Look weights up by name or alias; upper case and hyphens are read as lower case and underscores.

    Raises:
        ExportError: No weights have this name; the message names the nearest ones and lists those that exist.
    """
    known = {_plain(alias): weights for weights in REGISTRY.values() for alias in (*weights.aliases, weights.name)}
    if _plain(name) in known:
        return known[_plain(name)]
    near = list(dict.fromkeys(known[key].name for key in difflib.get_close_matches(_plain(name), known, n=3)))
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise ExportError(f"no weights are called {name!r}; {hint}known are: {', '.join(REGISTRY)}")


def _plain(name: str) -> str:
    return name.lower().replace("-", "_")
