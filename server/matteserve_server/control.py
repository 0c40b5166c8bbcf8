"""Talking to a running server as its operator: load, reload, probe, look at statistics."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
import tritonclient.grpc as triton
from google.protobuf import json_format
from tritonclient.utils import InferenceServerException, triton_to_np_dtype

from matteserve_server._errors import ModelLoadError, StartError

_RELOADS = "matteserve.reloads"
_CALL_TIMEOUT_S = 10.0


class Health(Enum):
    """What a probe found."""

    WELL = "well"
    BUSY = "busy"  # no answer in time, or the queue is full: says nothing about the model
    DEAD = "dead"  # the model's process is gone; Triton will not start it again by itself
    ABSENT = "absent"  # not loaded


@dataclass(frozen=True)
class EngineStatistics:
    """Counters of one model since it was loaded.

    Attributes:
        inferences: Rows that were inferred.
        executions: Runs of the model; `inferences / executions` is the mean batch.
        successes: Requests that were answered.
        failures: Requests that failed.
        queue_s: Seconds that requests waited, summed.
        infer_s: Seconds that the model computed, summed over requests.
    """

    inferences: int
    executions: int
    successes: int
    failures: int
    queue_s: float
    infer_s: float


class Control:
    """Operator's connection to one server; threads may share it.

    Args:
        address: `host:port` of its gRPC endpoint.
        headers: Sent with every call, such as the key of a restricted protocol.
    """

    def __init__(self, address: str, headers: Mapping[str, str] | None = None) -> None:
        self._client = triton.InferenceServerClient(address)
        self._headers = dict(headers or {})

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def wait_until_live(self, timeout_s: float, still_running: Callable[[], bool]) -> None:
        """Wait until the server answers.

        Args:
            timeout_s: Seconds to wait.
            still_running: Whether the process is alive; waiting ends when it is not.

        Raises:
            StartError: It ended, or did not answer in time.
        """
        deadline = time.monotonic() + timeout_s
        while not self._is_live():
            if not still_running():
                raise StartError("tritonserver ended while starting")
            if time.monotonic() > deadline:
                raise StartError(f"tritonserver did not answer within {timeout_s:.0f} s")
            time.sleep(0.05)

    def load(self, model: str, timeout_s: float, config: Any = None) -> None:
        """Load a model and, for an alias, what it needs. A loaded one serves on until its successor is ready.

        Args:
            model: Its name.
            timeout_s: Seconds to wait.
            config: An `inference.ModelConfig` to use instead of the server's `config.pbtxt`. A later load without one
                changes nothing until a file of the model does: Triton compares their dates (seen with 2.51).

        Raises:
            ModelLoadError: It does not load; the message has Triton's reason.
        """
        self._load(model, timeout_s, config=None if config is None else json.dumps(_to_json(config)))

    def unload(self, model: str, timeout_s: float) -> None:
        """Unload a model, but not what it is made of; requests that it took are answered first.

        Raises:
            InferenceServerException: The server refuses.
        """
        self._client.unload_model(model, headers=self._headers, client_timeout=timeout_s)

    def reload(self, model: str, timeout_s: float) -> None:
        """Load a model again although nothing of it changed, as after its process died.

        Triton does nothing for an unchanged model, so a counter in its `parameters` is changed.

        Raises:
            ModelLoadError: It does not load.
        """
        config = _to_json(self.config(model))
        parameters = config.setdefault("parameters", {})
        count = int(parameters.get(_RELOADS, {}).get("string_value", 0))
        parameters[_RELOADS] = {"string_value": str(count + 1)}
        self._load(model, timeout_s, config=json.dumps(config))

    def config(self, model: str) -> Any:
        """The `inference.ModelConfig` of a loaded model."""
        return self._client.get_model_config(model, headers=self._headers, client_timeout=_CALL_TIMEOUT_S).config

    def known_models(self) -> list[str]:
        """Names of the models in the server's repository, loaded or not."""
        index = self._client.get_model_repository_index(headers=self._headers, client_timeout=_CALL_TIMEOUT_S)
        return sorted({model.name for model in index.models})

    def loaded_models(self) -> list[str]:
        """Names of the models that are ready."""
        index = self._client.get_model_repository_index(headers=self._headers, client_timeout=_CALL_TIMEOUT_S)
        return sorted({model.name for model in index.models if model.state == "READY"})

    def statistics(self, model: str) -> EngineStatistics:
        """The counters of a loaded model."""
        response = self._client.get_inference_statistics(model, headers=self._headers, client_timeout=_CALL_TIMEOUT_S)
        versions = response.model_stats
        return EngineStatistics(
            inferences=sum(v.inference_count for v in versions),
            executions=sum(v.execution_count for v in versions),
            successes=sum(v.inference_stats.success.count for v in versions),
            failures=sum(v.inference_stats.fail.count for v in versions),
            queue_s=sum(v.inference_stats.queue.ns for v in versions) / 1e9,
            infer_s=sum(v.inference_stats.compute_infer.ns for v in versions) / 1e9,
        )

    def probe(self, config: Any, timeout_s: float) -> Health:
        """Run a model once on its own warm-up data.

        Args:
            config: The model's configuration; without `model_warmup` zeros of its input shape are sent.
            timeout_s: Seconds to wait.
        """
        try:
            self._client.infer(config.name, _probe_inputs(config), headers=self._headers, client_timeout=timeout_s)
        except InferenceServerException as exc:
            return _health_of(exc)
        return Health.WELL

    def _load(self, model: str, timeout_s: float, config: str | None = None) -> None:
        try:
            self._client.load_model(model, config=config, headers=self._headers, client_timeout=timeout_s)
        except InferenceServerException as exc:
            raise ModelLoadError(f"model {model!r} does not load: {exc.message()}") from exc

    def _is_live(self) -> bool:
        try:
            return bool(self._client.is_server_live(headers=self._headers, client_timeout=1.0))
        except InferenceServerException:
            return False


def _to_json(config: Any) -> dict[str, Any]:
    """A model configuration as Triton reads it from a load request."""
    fields: dict[str, Any] = json.loads(json_format.MessageToJson(config, preserving_proto_field_name=True))
    return fields


def _probe_inputs(config: Any) -> list[Any]:
    """Inputs of one row, from the first warm-up sample where there is one."""
    shapes = {tensor.name: (tensor.data_type, list(tensor.dims)) for tensor in config.input}
    random = False
    for sample in config.model_warmup[:1]:
        for name, tensor in sample.inputs.items():
            shapes[name] = (tensor.data_type, list(tensor.dims))
            random = tensor.random_data
    batch = [1] if config.max_batch_size else []
    generator = np.random.default_rng(0)
    inputs = []
    for name, (data_type, dims) in shapes.items():
        datatype = triton.model_config_pb2.DataType.Name(data_type).removeprefix("TYPE_")
        shape = [*batch, *(max(1, dim) for dim in dims)]
        dtype = triton_to_np_dtype(datatype)
        data = generator.integers(0, 100, shape).astype(dtype) if random else np.zeros(shape, dtype)
        tensor = triton.InferInput(name, shape, datatype)
        tensor.set_data_from_numpy(data)
        inputs.append(tensor)
    return inputs


def _health_of(exc: InferenceServerException) -> Health:
    status, message = str(exc.status()), exc.message() or ""
    # The one text that tells a dead process from a model that failed on its input.
    if "StatusCode.INTERNAL" in status and "is not healthy" in message:
        return Health.DEAD
    if "StatusCode.NOT_FOUND" in status or "is not ready" in message or "no available versions" in message:
        return Health.ABSENT
    if "StatusCode.UNAVAILABLE" in status or "StatusCode.DEADLINE_EXCEEDED" in status:
        return Health.BUSY
    return Health.WELL  # it answered, if only with a failure of its own
