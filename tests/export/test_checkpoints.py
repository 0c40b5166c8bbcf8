"""Checkpoints: what is accepted, and each way in which one can be wrong."""

from __future__ import annotations

import os
import pickle
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from matteserve_export import CheckpointError
from matteserve_export.checkpoints import load_into, read_state_dict
from matteserve_export.models import MODEL_BUILDERS, build_model
from support.conformance import recorded_keys

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def state(lively_u2netp: nn.Module) -> State:
    return lively_u2netp.state_dict()


def _save(state: object, path: Path) -> Path:
    if path.suffix == ".safetensors":
        save_file(state, str(path))
    else:
        torch.save(state, path)
    return path


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_formats_and_prefixes(state: State, tmp_path: Path, suffix: str, prefix: str) -> None:
    path = _save({prefix + name: tensor for name, tensor in state.items()}, tmp_path / f"w{suffix}")
    loaded = read_state_dict(path)
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], state[name]) for name in state)


@pytest.mark.parametrize("key", ["state_dict", "model"])
def test_a_training_dictionary_is_unwrapped(state: State, tmp_path: Path, key: str) -> None:
    path = _save({key: state, "epoch": 3, "optimizer": {}}, tmp_path / "w.pth")
    assert read_state_dict(path).keys() == state.keys()


def test_every_entry_arrives(state: State) -> None:
    model = build_model("u2netp")
    load_into(model, state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_half_precision_is_converted(state: State) -> None:
    half = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    model = build_model("u2netp")
    load_into(model, half)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_named_training_only_entries_are_dropped(state: State) -> None:
    extra = {**state, "head_aux.weight": torch.zeros(3)}
    load_into(build_model("u2netp"), extra, training_only=("head_aux.",))
    with pytest.raises(CheckpointError, match=r"1 unexpected: head_aux\.weight"):
        load_into(build_model("u2netp"), extra)


def test_missing_entries_are_listed_shortly(state: State) -> None:
    few = {name: tensor for name, tensor in state.items() if not name.startswith("stage1.")}
    with pytest.raises(CheckpointError, match=r"\d+ missing: stage1\.\S+, .*, …") as caught:
        load_into(build_model("u2netp"), few)
    assert len(str(caught.value)) < 600
    assert "fit the architecture" not in str(caught.value).split(": ", 1)[1]


def test_the_fitting_architecture_is_named(state: State) -> None:
    with pytest.raises(CheckpointError, match=r"with another shape: .* these weights fit the architecture u2netp$"):
        load_into(build_model("u2net"), state)


@pytest.mark.parametrize("architecture", MODEL_BUILDERS)
def test_every_architecture_is_recognised_by_its_released_entries(architecture: str) -> None:
    """Training-only entries included, as they come; without memory for the weights."""
    entries = recorded_keys()[architecture]["entries"]
    released = {name: torch.empty(shape, device="meta") for name, shape, *_ in entries}
    other = "u2netp" if architecture != "u2netp" else "u2net"
    with pytest.raises(CheckpointError, match=rf"these weights fit the architecture {architecture}$"):
        load_into(build_model(other), released)


class _RunsCode:
    """Unpickles to a call."""

    def __reduce__(self) -> tuple[Callable[..., int], tuple[str]]:
        return os.system, ("touch pwned",)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5000])


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("none.pth", lambda path, state: None, "no such file"),
        ("empty.pth", lambda path, state: path.touch(), "the file is empty"),
        ("page.pth", lambda path, state: path.write_text("\n<!DOCTYPE html><html>"), "a web page, not a checkpoint"),
        ("model.onnx", lambda path, state: path.write_bytes(b"\x08\x08"), "pass it with --onnx"),
        ("noise.pth", lambda path, state: path.write_bytes(random.Random(0).randbytes(999)), "not a torch checkpoint"),
        ("noise.safetensors", lambda path, state: path.write_bytes(b"\xff" * 99), "not a .safetensors file"),
        ("cut.pth", lambda path, state: (_save(state, path), _truncate(path)), "damaged or cut short"),
        ("cut.safetensors", lambda path, state: (_save(state, path), _truncate(path)), "it is cut short"),
        ("code.pth", lambda path, state: torch.save({"w": _RunsCode()}, path), "pickled code"),
        (
            "code.pt",
            lambda path, state: path.write_bytes(pickle.dumps(_RunsCode(), 2)),
            "an old checkpoint .* pickled code",
        ),
        ("list.pth", lambda path, state: torch.save([1, 2], path), "expected a state dict .* found list"),
        ("nothing.pth", lambda path, state: torch.save({}, path), "expected a state dict"),
        ("number.pth", lambda path, state: torch.save({"a": 1}, path), "entry 'a' is a int"),
        ("nan.pth", lambda path, state: torch.save({"a": torch.tensor([0.0, float("nan")])}, path), "not finite"),
    ],
)
def test_not_a_usable_checkpoint(
    state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, make: Callable, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / name
    make(path, state)
    with pytest.raises(CheckpointError, match=message):
        read_state_dict(path)
    assert not (tmp_path / "pwned").exists()
