"""The server's own word: configuration, version and statistics over gRPC, metrics of its GPUs over HTTP."""

from __future__ import annotations

import re
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from matteserve_bench.records import GpuUse, ServerStatistics
from matteserve_client import ModelContract
from matteserve_client._transport import check_address, translate

_CALL_TIMEOUT_S = 10.0


class TritonServer:
    """Reads what a server says about itself; threads may share it.

    Args:
        address: `host:port` of its gRPC endpoint.
        channel: Use this one instead of connecting.
    """

    def __init__(self, address: str, channel: grpc.Channel | None = None) -> None:
        self.address = check_address(address)
        self._channel = grpc.insecure_channel(address) if channel is None else channel
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()

    def version(self) -> str:
        """Triton's version, e.g. "2.51.0"."""
        return str(self._call("ServerMetadata", service_pb2.ServerMetadataRequest()).version)

    def config(self, model: str) -> Any:
        """The `inference.ModelConfig` of a loaded model.

        Raises:
            ModelNotFoundError: It is not loaded.
        """
        return self._call("ModelConfig", service_pb2.ModelConfigRequest(name=model), model).config

    def engine_of(self, model: str) -> str:
        """The engine behind an alias (its first step, and an alias has one); an engine is its own."""
        steps = self.config(model).ensemble_scheduling.step
        return str(steps[0].model_name) if steps else model

    def contract(self, model: str) -> ModelContract:
        """The contract of a loaded model.

        Raises:
            ContractError: It was not written by matteserve.
        """
        return ModelContract.from_config(self.config(model))

    def statistics(self, engine: str) -> ServerStatistics:
        """Counters of an engine since it was loaded, over all its versions."""
        request = service_pb2.ModelStatisticsRequest(name=engine)
        total = ServerStatistics()
        for version in self._call("ModelStatistics", request, engine).model_stats:
            stats = version.inference_stats
            total = total + ServerStatistics(
                inferences=version.inference_count,
                executions=version.execution_count,
                succeeded=stats.success.count,
                failed=stats.fail.count,
                queue_s=stats.queue.ns / 1e9,
                compute_input_s=stats.compute_input.ns / 1e9,
                compute_infer_s=stats.compute_infer.ns / 1e9,
                compute_output_s=stats.compute_output.ns / 1e9,
                batches={int(batch.batch_size): batch.compute_infer.count for batch in version.batch_stats},
            )
        return total

    def _call(self, method: str, request: Any, model: str | None = None) -> Any:
        try:
            return getattr(self._stub, method)(request, timeout=_CALL_TIMEOUT_S)
        except grpc.RpcError as exc:
            code, details = exc.code(), exc.details() or ""  # type: ignore[attr-defined,unused-ignore]
            raise translate(code, details, address=self.address, model=model, timeout_s=_CALL_TIMEOUT_S) from exc


@dataclass(frozen=True)
class GpuSample:
    """One look at the metrics: value by GPU for each of four metrics; a metric that the server lacks is empty."""

    utilisation: Mapping[str, float]
    memory_bytes: Mapping[str, float]
    power_w: Mapping[str, float]
    energy_j: Mapping[str, float]


_SAMPLE = re.compile(r"^(?P<name>[a-zA-Z_:][\w:]*)(?:\{(?P<labels>.*)\})?\s+(?P<value>\S+)(?:\s+\d+)?$")
_GPU_LABEL = re.compile(r'gpu_uuid="(?P<uuid>[^"]*)"')
_GPU_METRICS = {
    "nv_gpu_utilization": "utilisation",
    "nv_gpu_memory_used_bytes": "memory_bytes",
    "nv_gpu_power_usage": "power_w",
    "nv_energy_consumption": "energy_j",
}


def parse_gpu_metrics(text: str) -> GpuSample | None:
    """Read the GPU metrics from a page in Prometheus' text format; None if there are none."""
    found: dict[str, dict[str, float]] = defaultdict(dict)
    for line in text.splitlines():
        sample = _SAMPLE.match(line)
        if sample is None or sample["name"] not in _GPU_METRICS:
            continue
        label = _GPU_LABEL.search(sample["labels"] or "")
        found[_GPU_METRICS[sample["name"]]][label["uuid"] if label else ""] = float(sample["value"])
    if not found:
        return None
    return GpuSample(**{field: found[field] for field in _GPU_METRICS.values()})


def read_gpu_metrics(url: str, timeout_s: float = 2.0) -> GpuSample | None:
    """Fetch the metrics' page; None if it has nothing about GPUs.

    Raises:
        OSError: It cannot be fetched.
    """
    if not url.startswith(("http://", "https://")):
        raise OSError(f"{url!r} is not an http address")
    with urllib.request.urlopen(url, timeout=timeout_s) as response:
        return parse_gpu_metrics(response.read().decode())


def gpu_use(samples: list[GpuSample]) -> GpuUse | None:
    """Sum up the samples of one window; the first and the last were taken at its edges."""
    if not samples:
        return None
    gpus = set().union(*(s.utilisation.keys() | s.memory_bytes.keys() | s.power_w.keys() for s in samples))
    loads = [value for sample in samples for value in sample.utilisation.values()]
    memory = [sum(sample.memory_bytes.values()) for sample in samples if sample.memory_bytes]
    power = [sum(sample.power_w.values()) for sample in samples if sample.power_w]
    first, last = samples[0].energy_j, samples[-1].energy_j
    shared = first.keys() & last.keys()
    return GpuUse(
        count=max(1, len(gpus)),
        utilisation=sum(loads) / len(loads) if loads else None,
        memory_bytes=max(memory, default=None),
        power_w=sum(power) / len(power) if power else None,
        energy_j=sum(last[gpu] - first[gpu] for gpu in shared) if shared and len(samples) > 1 else None,
    )
