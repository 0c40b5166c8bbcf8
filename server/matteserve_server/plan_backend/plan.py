"""A plan on a GPU, through the Python interface of TensorRT (10.12 and later) or TensorRT for RTX.

Both have the same classes; where they differ is said at the place. What is here needs a GPU; nothing of it but the
refusals has been run yet (tests marked `gpu` do).
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import numpy as np

from .batching import Array, gather, split, view
from .config import PlanConfig, PlanError
from .cuda import Cuda
from .fit import INSTALL, TITLES, Builder, Gpu, Machine, rebuild_command, unfit

_MODULES = {
    "tensorrt": ("tensorrt",),
    "tensorrt_rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings"),  # the second is what the bindings' wheel installs
}


class Plan:
    """A loaded plan with its buffers; one thread uses it.

    Args:
        config: What to load, and where.

    Raises:
        PlanError: It cannot be loaded here; the message has the library's reason.
    """

    def __init__(self, config: PlanConfig) -> None:
        self._config = config
        self._library = import_library(config.library)
        self._log = _log_of(self._library)
        self._cuda = Cuda(config.device)
        try:
            if not config.on_gpu:
                raise PlanError("instance_group asks for KIND_CPU; a plan runs on a GPU, with KIND_GPU")
            self._engine = self._deserialize()
            self._check_engine()
            self._context = self._make_context()
            largest = config.max_batch_size
            tensors = (*config.inputs, *config.outputs)
            self._host = {t.name: self._cuda.host_buffer(largest * t.row_bytes, pinned=config.pinned) for t in tensors}
            self._device = {t.name: self._cuda.device_buffer(largest * t.row_bytes) for t in tensors}
            for name, address in self._device.items():
                self._context.set_tensor_address(name, address)
            self._graphs = self._capture_graphs()
        except BaseException:
            self._cuda.close()
            raise

    def infer(self, requests: Sequence[Mapping[str, Array]]) -> list[list[Array]]:
        """Run several requests in one batch.

        Args:
            requests: For each request its inputs by name, shape (rows, *dims).

        Returns:
            For each request its outputs, in the order of the configuration; valid until the next call.

        Raises:
            PlanError: A request does not fit, or the GPU failed.
        """
        config = self._config
        rows: list[int] = []
        for tensor in config.inputs:
            rows = gather([request[tensor.name] for request in requests], self._host[tensor.name], tensor)
        batch = sum(rows)
        for tensor in config.inputs:
            self._cuda.copy_in(self._device[tensor.name], self._host[tensor.name], batch * tensor.row_bytes)
        graph = self._graphs.get(batch)
        if graph is None:
            self._enqueue(batch)
        else:
            self._cuda.launch(graph)
        for tensor in config.outputs:
            self._cuda.copy_out(self._host[tensor.name], self._device[tensor.name], batch * tensor.row_bytes)
        self._cuda.synchronize()
        outputs = [split(view(self._host[t.name], t, batch), rows) for t in config.outputs]
        return [list(parts) for parts in zip(*outputs, strict=True)]

    def close(self) -> None:
        """Give the GPU's memory back."""
        self._graphs.clear()
        self._context = self._engine = None
        self._cuda.close()

    def _deserialize(self) -> Any:
        path = self._config.path_for(self._cuda.capability)
        check_manifest(self._config, str(self._library.__version__), self._cuda.capability)
        runtime = self._library.Runtime(self._log)
        engine = runtime.deserialize_cuda_engine(path.read_bytes())
        if engine is None:
            raise PlanError(
                f"{TITLES[self._config.library]} {self._library.__version__} cannot load {path}: {self._log.reason()}"
            )
        self._runtime = runtime  # must outlive the engine
        return engine

    def _check_engine(self) -> None:
        """Compare the plan's tensors with the configuration's."""
        if complaint := compare(self._config, describe_engine(self._library, self._engine)):
            raise PlanError(f"config.pbtxt does not fit the plan: {complaint}")

    def _make_context(self) -> Any:
        """The execution context, on memory of our own.

        A captured graph stays valid while the context is used for other batch sizes only if the activations' memory
        does not move; TensorRT promises that for memory that the application provides.
        """
        strategy = self._library.ExecutionContextAllocationStrategy.USER_MANAGED
        if hasattr(self._engine, "create_runtime_config") and hasattr(self._library, "CudaGraphStrategy"):
            # TensorRT for RTX compiles kernels for a shape while it runs, so it alone knows when a graph is final.
            options = self._engine.create_runtime_config()
            options.set_execution_context_allocation_strategy(strategy)
            if self._config.graph_batch_sizes:
                options.cuda_graph_strategy = self._library.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            context = self._engine.create_execution_context(options)
        else:
            context = self._engine.create_execution_context(strategy)
        if context is None:
            raise PlanError(f"no execution context: {self._log.reason()}")
        size = int(self._engine.device_memory_size_v2)
        context.set_device_memory(self._cuda.device_buffer(size), size)
        if not context.set_optimization_profile_async(0, self._cuda.stream):
            raise PlanError(f"no optimization profile 0: {self._log.reason()}")
        return context

    def _capture_graphs(self) -> dict[int, Any]:
        if self._config.library == "tensorrt_rtx":
            return {}
        graphs = {}
        for batch in self._config.graph_batch_sizes:
            self._enqueue(batch)  # the first run with a shape does what must not happen while a graph is captured
            self._cuda.synchronize()
            graphs[batch] = self._cuda.capture(lambda batch=batch: self._enqueue(batch))  # type: ignore[misc]
        return graphs

    def _enqueue(self, batch: int) -> None:
        for tensor in self._config.inputs:
            if not self._context.set_input_shape(tensor.name, (batch, *tensor.dims)):
                raise PlanError(f"the plan refuses a batch of {batch}: {self._log.reason()}")
        if not self._context.execute_async_v3(self._cuda.stream):
            raise PlanError(f"a batch of {batch} was not enqueued: {self._log.reason()}")


def import_library(name: str) -> ModuleType:
    """Import the package that loads a kind of plan.

    Raises:
        PlanError: It is not installed.
    """
    for module in _MODULES[name]:
        try:
            return importlib.import_module(module)
        except ImportError:
            continue
    raise PlanError(
        f"backend {name!r} needs the Python package {' or '.join(_MODULES[name])}, which the server's Python cannot "
        f"import: {INSTALL[name]}"
    )


def check_manifest(config: PlanConfig, version: str, capability: str) -> None:
    """Hold the plan's manifest, where there is one, against what is here.

    Args:
        config: The plan.
        version: Version of the library that is to load it.
        capability: Compute capability of the GPU.

    Raises:
        PlanError: It was built for another one; one sentence that names both, and how to build it again.
    """
    try:
        fields = json.loads((config.directory / "manifest.json").read_text(encoding="utf-8"))
        builder = Builder.from_dict(fields["builder"])
        precision = str(fields["precision"])
    except (OSError, ValueError, KeyError, TypeError):
        return  # nothing to compare with; the library will say what it thinks of the plan
    builder = replace(builder, compute_capabilities=(*builder.compute_capabilities, *config.filenames))
    machine = Machine((Gpu(f"GPU {config.device}", capability),), **{config.library: version})
    if reason := unfit(builder, config.library, machine):
        command = rebuild_command(config.model, config.library, precision)
        raise PlanError(f"engine {config.model!r} {reason}: build it for this machine with `{command}`")


@dataclass(frozen=True)
class PlanTensor:
    """A tensor as the plan has it.

    Attributes:
        kind: "input" or "output".
        dtype: Type of its elements.
        shape: Its shape, -1 for the batch.
        largest_batch: Where the profile ends; 0 for an output, which has none.
    """

    kind: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    largest_batch: int = 0


def describe_engine(library: Any, engine: Any) -> dict[str, PlanTensor]:
    """A loaded plan's tensors by name."""
    found = {}
    for name in map(engine.get_tensor_name, range(engine.num_io_tensors)):
        is_input = engine.get_tensor_mode(name) == library.TensorIOMode.INPUT
        found[name] = PlanTensor(
            kind="input" if is_input else "output",
            dtype=np.dtype(library.nptype(engine.get_tensor_dtype(name))),
            shape=tuple(int(dim) for dim in engine.get_tensor_shape(name)),
            largest_batch=int(engine.get_tensor_profile_shape(name, 0)[2][0]) if is_input else 0,
        )
    return found


def compare(config: PlanConfig, found: Mapping[str, PlanTensor]) -> str:
    """What is different between a configuration and a plan's tensors; empty if nothing is."""
    wanted = [("input", tensor) for tensor in config.inputs] + [("output", tensor) for tensor in config.outputs]
    if unset := sorted(found.keys() - {tensor.name for _, tensor in wanted}):
        return f"the plan also has {', '.join(unset)}"
    for kind, tensor in wanted:
        actual = found.get(tensor.name)
        if actual is None:
            return f"{kind} {tensor.name!r} is not in the plan, which has {', '.join(sorted(found))}"
        shape = (-1, *tensor.dims)
        if (actual.kind, actual.dtype, actual.shape) != (kind, tensor.dtype, shape):
            return (
                f"{kind} {tensor.name!r} is {tensor.dtype} {shape}, in the plan it is an {actual.kind}, "
                f"{actual.dtype} {actual.shape}"
            )
        if kind == "input" and actual.largest_batch < config.max_batch_size:
            return f"max_batch_size is {config.max_batch_size}, the plan's profile ends at {actual.largest_batch}"
    return ""


def _log_of(library: Any) -> Any:
    """A logger that keeps the last errors, which is where these libraries say why they return None."""

    class Log(library.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            library.ILogger.__init__(self)
            self._errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (library.ILogger.Severity.ERROR, library.ILogger.Severity.INTERNAL_ERROR):
                self._errors.append(message)

        def reason(self) -> str:
            """What was logged since this was asked last."""
            errors, self._errors = self._errors, []
            return "; ".join(errors[-2:]) or "it gives no reason"

    return Log()
