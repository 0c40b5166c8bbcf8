"""The alias that clients call: which engine it points at, and pointing it at another one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from matteserve_client import ModelContract
from matteserve_server._errors import RepositoryError, SwapError

# What a client reads once per connection and goes on using: it must be the same behind every engine of an alias.
_FIXED = ("height", "width", "resample", "alpha_resample", "fit", "numerics")
# Engines that the alias of a running server was moved from while its disk stayed as it is; the last one is the latest.
_MOVED_FROM = "matteserve.moved_from"


def target_of(config: Any) -> str:
    """Name of the engine that an alias points at.

    Raises:
        RepositoryError: The configuration is not an alias of one engine.
    """
    steps = config.ensemble_scheduling.step
    if len(steps) != 1:
        what = f"an ensemble of {len(steps)} models" if steps else "an engine itself"
        raise RepositoryError(
            f"model {config.name!r} is {what}; only an alias, an ensemble with one step, can be pointed at another"
        )
    return str(steps[0].model_name)


def pointed_at(alias: Any, engine: Any) -> Any:
    """The configuration of an alias that points at another engine.

    Everything of the alias is kept but the step's model and the contract's parameters, which are the engine's.
    `max_batch_size` is kept too, because clients were told; an engine that takes less is refused.

    Args:
        alias: The alias' `inference.ModelConfig`.
        engine: The engine's.

    Raises:
        SwapError: Clients of the alias could not use the engine: it has another input size, resampling or a smaller
            batch.
        ContractError: One of the two was not written by matteserve.
    """
    old, new = ModelContract.from_config(alias), ModelContract.from_config(engine)
    different = [name for name in _FIXED if getattr(old, name) != getattr(new, name)]
    if different:
        found = ", ".join(f"{name} {getattr(new, name)} instead of {getattr(old, name)}" for name in different)
        raise SwapError(
            f"{engine.name!r} cannot stand behind {alias.name!r}: {found}. Clients read that once per connection; "
            "serve the engine under a name of its own"
        )
    if engine.max_batch_size < alias.max_batch_size:
        raise SwapError(
            f"{engine.name!r} cannot stand behind {alias.name!r}: it takes batches of {engine.max_batch_size}, clients "
            f"were promised {alias.max_batch_size}; build it with a profile up to {alias.max_batch_size}"
        )
    config = model_config_pb2.ModelConfig()
    config.CopyFrom(alias)
    config.ensemble_scheduling.step[0].model_name = engine.name
    for key, value in new.to_parameters().items():
        config.parameters[key].string_value = value
    return config


def moved_from(alias: Any) -> list[str]:
    """Engines that a server's alias was moved from without its disk, oldest first."""
    # Not by index alone: a protobuf map would get an empty entry.
    return alias.parameters[_MOVED_FROM].string_value.split(",") if _MOVED_FROM in alias.parameters else []


def note_moved_from(alias: Any, engines: list[str]) -> None:
    """Write into an alias' configuration what `moved_from` is to give."""
    alias.parameters.pop(_MOVED_FROM, None)
    if engines:
        alias.parameters[_MOVED_FROM].string_value = ",".join(engines)


def is_writable(repository: Path, model: str) -> bool:
    """Whether a repository has a model and lets this user change it."""
    folder = repository / model
    return (folder / "config.pbtxt").is_file() and os.access(folder, os.W_OK)


def write_config(folder: Path, config: Any) -> None:
    """Replace a model's `config.pbtxt`: a reader, and a machine that loses power, has the old file or the new one.

    Raises:
        RepositoryError: The disk is full, or the folder cannot be written to. The old file is as it was.
    """
    replace_file(folder / "config.pbtxt", str(text_format.MessageToString(config)))


def replace_file(path: Path, text: str) -> None:
    """Write a small file through a temporary one beside it, flushed before the rename.

    Raises:
        RepositoryError: It cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")  # one name: what a killed process left is overwritten, not gathered
    try:
        with temporary.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as exc:
        temporary.unlink(missing_ok=True)
        raise RepositoryError(
            f"cannot write {path}: {exc.strerror or exc}; it is as it was. On a server whose repository is elsewhere, "
            "use --server-only"
        ) from exc
