"""Reading a model repository before Triton does, so that what is wrong with it is said in one sentence.

Names in it: an *engine* is a model with files (`u2netp_onnx_fp32`), an *alias* is an ensemble with one step that
clients call (`u2netp`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from matteserve_server import preflight
from matteserve_server._errors import RepositoryError, UnknownModelError
from matteserve_server.plan_backend.fit import Machine


@dataclass(frozen=True)
class RepositoryModel:
    """One folder of the repository.

    Attributes:
        name: Name of the folder, which is the model's name.
        config: The parsed `config.pbtxt` (`inference.ModelConfig`).
    """

    name: str
    config: Any

    @property
    def steps(self) -> tuple[str, ...]:
        """Names of the models that this one is made of; empty for an engine."""
        return tuple(step.model_name for step in self.config.ensemble_scheduling.step)

    @property
    def is_alias(self) -> bool:
        """Whether this is a name for another model."""
        return bool(self.steps)

    def tensor_bytes(self) -> int:
        """Bytes of the largest batch's inputs and outputs, counting one byte for an element of unknown size."""
        batch = max(1, self.config.max_batch_size)
        return sum(batch * _elements(t.dims) * _ITEM_BYTES.get(t.data_type, 1) for t in _tensors(self.config))


@dataclass(frozen=True)
class Repository:
    """The models of a directory, by name.

    Attributes:
        path: The directory.
        models: Every readable model.
    """

    path: Path
    models: dict[str, RepositoryModel]

    @classmethod
    def read(cls, path: Path, variant: str = "") -> Repository:
        """Read every `config.pbtxt` of a directory.

        Args:
            path: The directory.
            variant: What `tritonserver --model-config-name` is given: a model that has `configs/<variant>.pbtxt` is
                read from there.

        Raises:
            RepositoryError: The directory is missing, has no models, or a configuration cannot be parsed.
        """
        if not path.is_dir():
            raise RepositoryError(
                f"model repository {path} is not a directory; make one with `matteserve export`, or name another with "
                "--model-repository"
            )
        folders = [folder for folder in sorted(path.iterdir()) if _is_model_folder(folder)]
        models = {folder.name: read_model(folder, variant) for folder in folders}
        if not models:
            raise RepositoryError(
                f"model repository {path} has no models (no folder with a config.pbtxt); add one with "
                "`matteserve export`"
            )
        return cls(path, models)

    def default_models(self) -> list[str]:
        """What is loaded when nothing is asked for: every alias with what it needs, or all if there is no alias."""
        aliases = [name for name, model in self.models.items() if model.is_alias]
        return aliases or list(self.models)

    def check(self, names: Iterable[str], machine: Machine | None = None) -> None:
        """Check that models can be loaded: they exist, their parts exist, and engines have a version with a file.

        Args:
            names: Aliases and engines.
            machine: Where they are to run, for plans, which fit only what they were built for; None does not ask.

        Raises:
            UnknownModelError: A name, or a part of an alias, is not in the repository.
            RepositoryError: An engine has no version folder with a model file.
            EngineMismatchError: A plan is not the file that was built, or was built for another machine.
        """
        names = list(names)
        for name in names:
            if name not in self.models:
                raise UnknownModelError(f"no model {name!r} in {self.path}; it has {', '.join(self.models)}")
            model = self.models[name]
            if missing := [step for step in model.steps if step not in self.models]:
                raise UnknownModelError(
                    f"alias {name!r} in {self.path} points at {', '.join(missing)}, which is not there; "
                    f"it has {', '.join(self.models)}"
                )
            for part in (model, *(self.models[step] for step in model.steps)):
                self._check_files(part)
        if machine is not None:
            for engine in self.plans_of(names):
                preflight.check_files(self.path / engine.name, engine.config)
                preflight.check_machine(self.path / engine.name, engine.config, machine)

    def engines_of(self, names: Iterable[str]) -> list[RepositoryModel]:
        """The engines behind some models, each once, in order."""
        found = {part: self.models[part] for name in names for part in self.models[name].steps or (name,)}
        return list(found.values())

    def plans_of(self, names: Iterable[str]) -> list[RepositoryModel]:
        """The engines behind some models that are plans, which are tied to a GPU and a TensorRT."""
        return [engine for engine in self.engines_of(names) if preflight.is_plan(engine.config)]

    def _check_files(self, model: RepositoryModel) -> None:
        folder = self.path / model.name
        versions = [entry for entry in folder.iterdir() if entry.is_dir() and entry.name.isdigit()]
        if not versions:
            raise RepositoryError(f"model {model.name!r} has no version folder: {folder}/1 is missing")
        filename = model.config.default_model_filename
        if filename and not model.is_alias and not any((version / filename).is_file() for version in versions):
            raise RepositoryError(
                f"model {model.name!r} has no {filename} in {', '.join(str(v) for v in sorted(versions))}; "
                "engines are built, not shipped: make it with `matteserve export` or `matteserve build`"
            )


def _is_model_folder(folder: Path) -> bool:
    return folder.is_dir() and (folder / "config.pbtxt").is_file()


def read_model(folder: Path, variant: str = "") -> RepositoryModel:
    """Read one model's folder, from its `configs/<variant>.pbtxt` where it has one.

    Raises:
        RepositoryError: Its `config.pbtxt` cannot be parsed, or names another model.
    """
    path = folder / "configs" / f"{variant}.pbtxt"
    if not variant or not path.is_file():
        path = folder / "config.pbtxt"
    try:
        config = text_format.Parse(path.read_text(encoding="utf-8"), model_config_pb2.ModelConfig())
    except (text_format.ParseError, UnicodeDecodeError) as exc:
        raise RepositoryError(f"{path} is not a valid Triton model configuration: {exc}") from exc
    if config.name and config.name != folder.name:
        raise RepositoryError(f"{path} names the model {config.name!r}, its folder is {folder.name!r}; they must agree")
    return RepositoryModel(folder.name, config)


_ITEM_BYTES = {
    model_config_pb2.TYPE_UINT16: 2,
    model_config_pb2.TYPE_INT16: 2,
    model_config_pb2.TYPE_FP16: 2,
    model_config_pb2.TYPE_BF16: 2,
    model_config_pb2.TYPE_UINT32: 4,
    model_config_pb2.TYPE_INT32: 4,
    model_config_pb2.TYPE_FP32: 4,
    model_config_pb2.TYPE_UINT64: 8,
    model_config_pb2.TYPE_INT64: 8,
    model_config_pb2.TYPE_FP64: 8,
}


def _tensors(config: Any) -> Iterator[Any]:
    yield from config.input
    yield from config.output


def _elements(dims: Iterable[int]) -> int:
    count = 1
    for dim in dims:
        count *= max(1, dim)  # -1, a dimension known only at run time, cannot be counted
    return count
