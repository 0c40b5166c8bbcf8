"""Stage checkpoint → torch: read a state dict safely and load it strictly."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from matteserve_export._errors import CheckpointError
from matteserve_export.models import MODEL_BUILDERS, TRAINING_ONLY

__all__ = ["load_into", "read_state_dict"]

# What torch.compile and DataParallel leave in front of the names.
_PREFIXES = ("module.", "_orig_mod.")
# Where training scripts put the state dict inside a larger dictionary.
_WRAPPERS = ("state_dict", "model_state_dict", "model", "net")
_SHOWN = 5


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read a `.pth`, `.pt` or `.safetensors` file.

    Pickled code is never run. The prefixes `module.` and `_orig_mod.` are taken off the names, and a state dict inside
    a training script's dictionary is unwrapped.

    Raises:
        CheckpointError: No such file, truncated, with pickled code, or not a state dict.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; give a .pth, .pt or .safetensors with --weights")
    with path.open("rb") as stream:
        head = stream.read(512)
    if not head:
        raise CheckpointError(f"{path}: the file is empty; fetch it again")
    if head.lstrip()[:1] == b"<":
        raise CheckpointError(
            f"{path}: this is a web page, not a checkpoint; file hosters answer a download with a page that asks for a "
            "confirmation: open the address in a browser and save the file itself"
        )
    if path.suffix == ".onnx":
        raise CheckpointError(f"{path}: this is an ONNX model; pass it with --onnx instead of --weights")
    loaded = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path, head)
    return _clean(_unwrap(loaded), path)


def load_into(model: nn.Module, state: Mapping[str, Tensor], training_only: Sequence[str] = ()) -> None:
    """Load a state dict strictly, every entry in its place.

    Args:
        model: The network.
        state: Names and tensors; other floating dtypes are converted.
        training_only: Prefixes of entries that may be there and are dropped.

    Raises:
        CheckpointError: Entries are missing, left over, or have other shapes; the message names the architecture that
            would fit, if one does.
    """
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    dropped = {name for name in state if name not in own and name.startswith(tuple(training_only))}
    found = {name: tuple(tensor.shape) for name, tensor in state.items() if name not in dropped}
    if found != own:
        raise CheckpointError(_misfit(own, found))
    model.load_state_dict({name: state[name] for name in own})


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return dict(load_file(str(path)))
    except SafetensorError as exc:
        raise CheckpointError(f"{path}: not a .safetensors file, or it is cut short ({exc}); fetch it again") from exc


def _read_pickle(path: Path, head: bytes) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as exc:  # the unpickler raises whatever the bytes lead it to
        raise CheckpointError(f"{path}: {_why_unreadable(path, head, exc)}") from exc


def _why_unreadable(path: Path, head: bytes, exc: Exception) -> str:
    size = path.stat().st_size
    code = (
        "the file holds pickled code besides tensors and was not loaded, as that would run it; ask for a plain state "
        "dict, or convert it to .safetensors where you trust it"
    )
    if head.startswith(b"PK"):
        if zipfile.is_zipfile(path) and isinstance(exc, pickle.UnpicklingError):
            return code
        return f"a torch checkpoint that is damaged or cut short ({size} bytes); fetch it again"
    if head.startswith(b"\x80"):  # a bare pickle, torch's format before 1.6
        return f"an old checkpoint that is cut short ({size} bytes), or {code}"
    return "this is not a torch checkpoint; expected are a state dict saved by torch, or a .safetensors file"


def _unwrap(loaded: Any) -> Any:
    for key in _WRAPPERS:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            return loaded[key]
    return loaded


def _clean(loaded: Any, path: Path) -> dict[str, Tensor]:
    """Check that it is a state dict; take prefixes off."""
    if not isinstance(loaded, Mapping) or not loaded:
        raise CheckpointError(f"{path}: expected a state dict (names and tensors), found {type(loaded).__name__}")
    state: dict[str, Tensor] = {}
    for name, tensor in loaded.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise CheckpointError(
                f"{path}: expected a state dict (names and tensors); entry {name!r} is a {type(tensor).__name__}"
            )
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{path}: entry {name!r} has values that are not finite; the weights are broken")
        state[_strip(name)] = tensor
    return state


def _strip(name: str) -> str:
    while name.startswith(_PREFIXES):
        name = name.split(".", 1)[1]
    return name


def _misfit(own: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> str:
    missing, unexpected = sorted(own.keys() - found.keys()), sorted(found.keys() - own.keys())
    shapes = [
        f"{name} {list(found[name])} instead of {list(own[name])}"
        for name in own
        if name in found and found[name] != own[name]
    ]
    parts = [
        f"{len(names)} {what}: {', '.join(names[:_SHOWN])}{', …' if len(names) > _SHOWN else ''}"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("with another shape", shapes))
        if names
    ]
    fitting = [name for name in MODEL_BUILDERS if _fits(name, found)]
    hint = f"; these weights fit the architecture {' or '.join(fitting)}" if fitting else ""
    return f"the weights do not fit the architecture: {'; '.join(parts)}{hint}"


def _fits(architecture: str, found: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether entries are those of an architecture, training-only ones aside. No memory is taken for its weights."""
    with torch.device("meta"):
        model = MODEL_BUILDERS[architecture]()
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    dropped = TRAINING_ONLY.get(architecture, ())
    return own == {name: shape for name, shape in found.items() if name in own or not name.startswith(dropped)}
