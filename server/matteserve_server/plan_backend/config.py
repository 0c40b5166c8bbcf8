"""What `config.pbtxt` says about a plan, checked before any library is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

_DTYPES = {
    "TYPE_BOOL": np.dtype(np.bool_),
    "TYPE_UINT8": np.dtype(np.uint8),
    "TYPE_INT8": np.dtype(np.int8),
    "TYPE_INT32": np.dtype(np.int32),
    "TYPE_INT64": np.dtype(np.int64),
    "TYPE_FP16": np.dtype(np.float16),
    "TYPE_FP32": np.dtype(np.float32),
}
LIBRARIES = ("tensorrt", "tensorrt_rtx")


class PlanError(Exception):
    """A plan cannot be served; the message is for the server's log and for whoever asked to load it."""


@dataclass(frozen=True)
class Tensor:
    """One input or output.

    Attributes:
        name: Its name.
        dtype: Type of its elements.
        dims: Shape of one row, without the batch.
    """

    name: str
    dtype: np.dtype[Any]
    dims: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.dtype.itemsize * int(np.prod(self.dims, dtype=np.int64))


@dataclass(frozen=True)
class PlanConfig:
    """One instance of a plan.

    Attributes:
        model: Name of the engine.
        library: Which package loads it: "tensorrt" or "tensorrt_rtx".
        directory: The version directory.
        filename: The plan's file, unless the GPU has one of its own.
        filenames: Files by compute capability ("8.9"), for a mixed fleet.
        inputs: Inputs, in the order of the configuration.
        outputs: Outputs, in the order of the configuration.
        max_batch_size: Rows of the largest batch.
        graph_batch_sizes: Batch sizes to capture CUDA graphs for; empty if graphs are off.
        pinned: Gather in page-locked memory, from which copies run at full speed.
        device: Index of the GPU.
        on_gpu: Whether the instance was put on a GPU.
    """

    model: str
    library: str
    directory: Path
    filename: str
    filenames: Mapping[str, str]
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    max_batch_size: int
    graph_batch_sizes: tuple[int, ...]
    pinned: bool
    device: int
    on_gpu: bool

    @classmethod
    def from_triton(cls, config: Mapping[str, Any], arguments: Mapping[str, str]) -> PlanConfig:
        """Read what Triton hands to a model.

        Args:
            config: The model configuration, as JSON.
            arguments: What `initialize` gets.

        Raises:
            PlanError: It asks for what this backend does not do.
        """
        library = config["backend"]
        if library not in LIBRARIES:
            raise PlanError(f"backend {library!r} is not one of {', '.join(LIBRARIES)}")
        max_batch_size = int(config.get("max_batch_size", 0))
        if max_batch_size < 1:
            raise PlanError("max_batch_size is 0; plans are served in batches, build one with a profile from 1 on")
        optimization = config.get("optimization") or {}
        return cls(
            model=str(config["name"]),
            library=library,
            directory=Path(arguments["model_repository"]) / arguments["model_version"],
            filename=config.get("default_model_filename") or "model.plan",
            filenames=dict(config.get("cc_model_filenames") or {}),
            inputs=tuple(_tensor("input", tensor) for tensor in config["input"]),
            outputs=tuple(_tensor("output", tensor) for tensor in config["output"]),
            max_batch_size=max_batch_size,
            graph_batch_sizes=_graph_batch_sizes(optimization.get("cuda") or {}, max_batch_size),
            pinned=bool((optimization.get("input_pinned_memory") or {}).get("enable", True)),
            device=int(arguments.get("model_instance_device_id") or 0),
            on_gpu=arguments.get("model_instance_kind") == "GPU",
        )

    def path_for(self, capability: str) -> Path:
        """The plan's file on a GPU.

        Args:
            capability: Compute capability of the GPU, e.g. "8.9".

        Raises:
            PlanError: There is no such file.
        """
        path = self.directory / self.filenames.get(capability, self.filename)
        if not path.is_file():
            raise PlanError(f"no plan at {path}; make one with `matteserve build`")
        return path


def _tensor(kind: str, fields: Mapping[str, Any]) -> Tensor:
    name, data_type = fields["name"], fields["data_type"]
    if data_type not in _DTYPES:
        raise PlanError(f"{kind} {name!r} is {data_type}; this backend carries {', '.join(_DTYPES)}")
    dims = tuple(int(dim) for dim in fields["dims"])  # protobuf's JSON writes int64 as text
    if any(dim < 1 for dim in dims):
        raise PlanError(f"{kind} {name!r} has dims {list(dims)}; all but the batch must be fixed")
    return Tensor(name, _DTYPES[data_type], dims)


def _graph_batch_sizes(cuda: Mapping[str, Any], max_batch_size: int) -> tuple[int, ...]:
    """The batch sizes that are listed; without a list the smallest and the largest, as the native backend does."""
    if not cuda.get("graphs"):
        return ()
    listed = [int(spec.get("batch_size", 0)) for spec in cuda.get("graph_spec") or ()]
    sizes = sorted(set(listed or (1, max_batch_size)))
    wrong = [size for size in sizes if not 1 <= size <= max_batch_size]
    if wrong:
        raise PlanError(f"CUDA graphs are asked for batch sizes {wrong}; allowed are 1 to {max_batch_size}")
    return tuple(sizes)
