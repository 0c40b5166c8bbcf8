"""Whether the engines of a repository or of a server answer what their FP32 engine answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import onnx
from google.protobuf import text_format
from numpy.typing import NDArray
from tritonclient.grpc import model_config_pb2

from matteserve_client import AlphaTolerance, ContractError, ModelContract, Transport
from matteserve_export._errors import ExportError
from matteserve_export._session import make_runner
from matteserve_export.compare import EngineParity, EngineRun, Method, gate_engine, graph_runs
from matteserve_export.precision import check_precision, tolerance_for
from matteserve_export.serving import load_core

__all__ = ["EngineFiles", "EngineUnderTest", "Engines", "ServedEngines", "verify_engine"]

LARGEST_BATCH = 4
"""Batches larger than this show nothing that this one does not."""
_REFERENCE = "onnx_fp32"


@dataclass(frozen=True)
class EngineUnderTest:
    """An engine, and every way in which it can be run here.

    Attributes:
        name: Name in the repository.
        contract: Size and batch.
        tolerance: How far its alpha may lie from the FP32 engine's.
        runs: Who computes, and what opens the run.
    """

    name: str
    contract: ModelContract
    tolerance: AlphaTolerance
    runs: tuple[tuple[Method, Callable[[], EngineRun]], ...]


class Engines(Protocol):
    """Where the engines of one model are."""

    reference: str

    def names(self) -> list[str]:
        """The model's engines but for the FP32 ONNX one."""

    def contract(self, engine: str) -> ModelContract:
        """Size and batch of an engine."""

    def open(self, engine: str) -> EngineUnderTest:
        """Make an engine ready to run."""

    def open_reference(self) -> EngineRun:
        """Make the FP32 engine ready to run."""


def verify_engine(
    engines: Engines, engine: str, images: NDArray[np.uint8], reference_run: EngineRun
) -> tuple[EngineParity, ...]:
    """Compare one engine with the FP32 engine, in every way that is possible here.

    Args:
        engines: Where it is.
        engine: Its name.
        images: RGB, [N, H, W, 3] uint8, at the model's size.
        reference_run: Result of `open_reference`.

    Raises:
        ExportError: The engine cannot be read or run here, or has another size.
        MatteserveError: The server failed.
    """
    subject = engines.open(engine)
    size = subject.contract.height, subject.contract.width
    if size != images.shape[1:3]:
        raise ExportError(f"{engine} is for {size[0]}x{size[1]}, {engines.reference} for {images.shape[1:3]}")
    batches = sorted({1, min(LARGEST_BATCH, subject.contract.max_batch_size)})
    return tuple(
        gate_engine(
            open_run(),
            reference_run,
            images,
            subject.tolerance,
            method,
            batch_sizes=batches,
            name=f"{engine} vs {engines.reference}",
        )
        for method, open_run in subject.runs
    )


class EngineFiles:
    """The ONNX engines of a model repository, run in this process on the CPU.

    Args:
        repository: Model repository.
        model: Name of the alias.

    Raises:
        ExportError: The repository has no FP32 ONNX engine of this model.
    """

    def __init__(self, repository: Path, model: str) -> None:
        self._repository, self._model = repository, model
        self.reference = f"{model}_{_REFERENCE}"
        if not (repository / self.reference / "1" / "model.onnx").is_file():
            found = sorted(path.parent.name for path in repository.glob(f"*_{_REFERENCE}/1"))
            known = ", ".join(name.removesuffix(f"_{_REFERENCE}") for name in found) or "no model at all"
            raise ExportError(
                f"{repository} has no {self.reference}/1/model.onnx, with which {model}'s engines are compared; it has "
                f"{known}. `matteserve export` makes one"
            )

    def names(self) -> list[str]:
        """The model's ONNX engines but for the FP32 one."""
        folders = self._repository.glob(f"{self._model}_onnx_*")
        return sorted(folder.name for folder in folders if folder.name != self.reference)

    def contract(self, engine: str) -> ModelContract:
        """Read an engine's config.pbtxt."""
        path = self._repository / engine / "config.pbtxt"
        config = model_config_pb2.ModelConfig()
        try:
            text_format.Parse(path.read_text(encoding="utf-8"), config)
            return ModelContract.from_config(config)
        except OSError as exc:
            others = ", ".join(self.names()) or "no other than " + self.reference
            raise ExportError(f"{path}: {exc.strerror}; the repository has {others}") from exc
        except (UnicodeDecodeError, text_format.ParseError, ContractError) as exc:
            raise ExportError(f"{path} is not a configuration of matteserve: {exc}") from exc

    def open(self, engine: str) -> EngineUnderTest:
        """Load an engine's graph."""
        contract = self.contract(engine)
        if contract.engine != "onnx":
            raise ExportError(
                f"{engine} is a plan, which only a server runs; give the server's address with --address HOST:PORT"
            )
        return EngineUnderTest(engine, contract, self._tolerance(engine, contract), graph_runs(self._graph(engine)))

    def open_reference(self) -> EngineRun:
        """Load the FP32 graph."""
        return make_runner(self._graph(self.reference))

    def reference_graph(self) -> onnx.ModelProto:
        """The FP32 graph itself, for `activation_peaks`."""
        return self._graph(self.reference)

    def _graph(self, engine: str) -> onnx.ModelProto:
        return load_core(self._repository / engine / "1" / "model.onnx")

    def _tolerance(self, engine: str, contract: ModelContract) -> AlphaTolerance:
        """What the manifest states; an engine without one is held to what its precision promises."""
        path = self._repository / engine / "1" / "manifest.json"
        try:
            stated = json.loads(path.read_text(encoding="utf-8"))["tolerance"]
            return AlphaTolerance.from_dict(stated)
        except (OSError, ValueError, KeyError, TypeError):
            return tolerance_for(check_precision(contract.precision), contract.architecture)


class ServedEngines:
    """The engines that a server has loaded, of any kind.

    Args:
        transport: Connection to the server.
        model: Name of the alias.
        timeout_s: Seconds to wait for each answer.

    Raises:
        ExportError: The server has no FP32 ONNX engine of this model.
    """

    def __init__(self, transport: Transport, model: str, *, timeout_s: float) -> None:
        self._transport, self._model, self._timeout_s = transport, model, timeout_s
        self.reference = f"{model}_{_REFERENCE}"
        self._loaded = [status.name for status in transport.repository_index(timeout_s=timeout_s) if status.ready]
        if self.reference not in self._loaded:
            raise ExportError(
                f"{transport.address} has not loaded {self.reference}, with which {model}'s engines are compared; "
                f"loaded are {', '.join(self._loaded) or 'none'}. Serve it too: --model {self.reference}"
            )

    def names(self) -> list[str]:
        """The model's loaded engines but for the FP32 ONNX one."""
        engines = tuple(f"{self._model}_{kind}_" for kind in ("onnx", "trt", "rtx"))
        return [name for name in self._loaded if name.startswith(engines) and name != self.reference]

    def contract(self, engine: str) -> ModelContract:
        """Ask for an engine's contract."""
        return ModelContract.from_config(self._transport.model_config(engine, timeout_s=self._timeout_s))

    def open(self, engine: str) -> EngineUnderTest:
        """Look an engine up."""
        if engine not in self._loaded:
            raise ExportError(
                f"{self._transport.address} has not loaded {engine}; loaded are {', '.join(self._loaded)}"
            )
        contract = self.contract(engine)
        tolerance = tolerance_for(check_precision(contract.precision), contract.architecture)
        return EngineUnderTest(engine, contract, tolerance, (("server", lambda: self._run(engine)),))

    def open_reference(self) -> EngineRun:
        """A run of the FP32 engine."""
        return self._run(self.reference)

    def _run(self, engine: str) -> EngineRun:
        return lambda images: self._transport.infer(engine, images, timeout_s=self._timeout_s).result()


def engine_names(model: str, wanted: Sequence[str]) -> list[str]:
    """Full names: "onnx_fp16" and "demo_onnx_fp16" both name the latter for the model "demo"."""
    return [name if name.startswith(f"{model}_") else f"{model}_{name}" for name in wanted]
