"""Triton backend `onnxruntime`, as a Python-based backend.

The `tritonserver` of the PyPI wheel has no native ONNX Runtime backend. This file, in a backend directory as
`onnxruntime/model.py`, makes `backend: "onnxruntime"` load there, so that one `config.pbtxt` serves in NVIDIA's
container (native backend) and on a laptop. It reads the same keys of `parameters` as the native backend does:
`intra_op_thread_count`, `inter_op_thread_count`, `execution_mode` (0 sequential, 1 parallel), `enable_mem_arena`,
`enable_mem_pattern`, and `session.intra_op.allow_spinning` (0 unless it is set to 1). The environment variable
MATTESERVE_ORT_THREADS overrides the intra-op count.

On a CPU one picture keeps every core busy, and a batch would take as long as its pictures one by one, many times the
memory, and make the first wait for the last. So there the pictures of a batch are run one by one, and every request is
answered as soon as its own are done. `split_batches`, a key of this backend only, decides otherwise: 0 never, 1 always.

It runs inside Triton's stub process, so it imports nothing of matteserve.
"""

from __future__ import annotations

import ctypes
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

# The stub marks a DLPack capsule that it took over with a name of its own where DLPack and numpy expect this one; numpy
# then reports an error for every tensor. PyCapsule_SetName keeps only the pointer: the text must outlive the capsule.
_CONSUMED = ctypes.create_string_buffer(b"used_dltensor")
_set_capsule_name = ctypes.pythonapi.PyCapsule_SetName
_set_capsule_name.argtypes = [ctypes.py_object, ctypes.c_void_p]
_set_capsule_name.restype = ctypes.c_int

_PROVIDERS = {"CPU": "CPUExecutionProvider", "GPU": "CUDAExecutionProvider"}


class TritonPythonModel:
    """One instance of an ONNX model; Triton's name for the class is fixed."""

    def initialize(self, args: dict[str, str]) -> None:
        """Create the session on the device of this instance, or fail with the reason."""
        config = json.loads(args["model_config"])
        self._log_name = args["model_name"]
        for tensor in (*config["input"], *config["output"]):
            if tensor["data_type"] == "TYPE_STRING":
                raise pb_utils.TritonModelException(f"tensor {tensor['name']!r}: TYPE_STRING is not supported")
        self._session = _create_session(config, args)
        _check_names("input", config["input"], self._session.get_inputs())
        _check_names("output", config["output"], self._session.get_outputs())
        self._input_names = [tensor["name"] for tensor in config["input"]]
        self._output_names = [tensor["name"] for tensor in config["output"]]
        self._batching = config.get("max_batch_size", 0) > 0
        split = _parameters(config).get("split_batches", "1" if args["model_instance_kind"] == "CPU" else "0")
        self._split = not self._batching or split != "0"

    def execute(self, requests: list[Any]) -> None:
        """Answer every request: all of them by one run of the session, or each as soon as its own rows are done."""
        for group in [[request] for request in requests] if self._split else [requests]:
            alive = []
            for request in group:
                if request.is_cancelled():  # a client that gave up must not cost a share of the batch
                    _answer(request, _error("the client cancelled the request", pb_utils.TritonError.CANCELLED))
                else:
                    alive.append(request)
            if alive:
                for request, response in zip(alive, self._infer(alive), strict=True):
                    _answer(request, response)

    def _infer(self, requests: list[Any]) -> list[Any]:
        try:
            feeds, rows = {}, [1] * len(requests)
            for name in self._input_names:
                parts = [_to_numpy(pb_utils.get_input_tensor_by_name(request, name)) for request in requests]
                rows = [len(part) for part in parts] if self._batching else rows
                feeds[name] = parts[0] if len(parts) == 1 else np.concatenate(parts)
            results = self._run(feeds, sum(rows))
        except Exception as exc:
            pb_utils.Logger.log_error(f"{self._log_name}: {exc}")
            return [_error(f"ONNX Runtime failed: {exc}", pb_utils.TritonError.INTERNAL) for _ in requests]
        if len(requests) == 1:
            split = [results]
        else:
            ends = np.cumsum(rows)[:-1]
            split = list(zip(*(np.split(result, ends) for result in results), strict=True))
        return [
            pb_utils.InferenceResponse(
                output_tensors=[_to_tensor(name, array) for name, array in zip(self._output_names, arrays, strict=True)]
            )
            for arrays in split
        ]

    def _run(self, feeds: dict[str, np.ndarray[Any, Any]], rows: int) -> list[np.ndarray[Any, Any]]:
        if not (self._split and self._batching) or rows == 1:
            return self._session.run(self._output_names, feeds)  # type: ignore[no-any-return]
        runs = [
            self._session.run(self._output_names, {name: array[row : row + 1] for name, array in feeds.items()})
            for row in range(rows)
        ]
        return [np.concatenate(parts) for parts in zip(*runs, strict=True)]

    def finalize(self) -> None:
        """Release the session's memory before the process ends."""
        self._session = None


def _parameters(config: dict[str, Any]) -> dict[str, str]:
    return {key: value["string_value"] for key, value in config.get("parameters", {}).items()}


def _create_session(config: dict[str, Any], args: dict[str, str]) -> Any:
    try:
        import onnxruntime as ort
    except ImportError as exc:
        raise pb_utils.TritonModelException(
            "the Python environment of the server has no onnxruntime; install matteserve[server] into it"
        ) from exc
    parameters = _parameters(config)
    options = ort.SessionOptions()
    options.log_severity_level = 3  # errors; warnings about folded constants would fill the server's log
    options.intra_op_num_threads = int(
        os.environ.get("MATTESERVE_ORT_THREADS") or parameters.get("intra_op_thread_count") or _usable_cpus()
    )
    options.inter_op_num_threads = int(parameters.get("inter_op_thread_count", 0))
    if parameters.get("execution_mode") == "1":
        options.execution_mode = ort.ExecutionMode.ORT_PARALLEL
    options.enable_cpu_mem_arena = parameters.get("enable_mem_arena", "1") != "0"
    options.enable_mem_pattern = parameters.get("enable_mem_pattern", "1") != "0"
    # A thread that waits for the others would spin, and burn the core that a client beside it decodes and encodes with.
    spinning = "session.intra_op.allow_spinning"
    options.add_session_config_entry(spinning, parameters.get(spinning, "0"))

    kind = args["model_instance_kind"]
    provider = _PROVIDERS[kind]
    if provider not in ort.get_available_providers():
        raise pb_utils.TritonModelException(
            f"instance_group asks for KIND_{kind}, which needs {provider}; this onnxruntime {ort.__version__} has "
            f"{', '.join(ort.get_available_providers())}. Install onnxruntime-gpu (and no onnxruntime beside it), or "
            "serve with KIND_CPU"
        )
    provider_options = {"device_id": args["model_instance_device_id"]} if kind == "GPU" else {}
    version_directory = Path(args["model_repository"]) / args["model_version"]
    path = version_directory / (config.get("default_model_filename") or "model.onnx")
    if not path.is_file():
        raise pb_utils.TritonModelException(f"no model file at {path}")
    try:
        session = ort.InferenceSession(str(path), options, providers=[(provider, provider_options)])
    except Exception as exc:
        raise pb_utils.TritonModelException(f"ONNX Runtime cannot load {path}: {exc}") from exc
    # ONNX Runtime falls back to the CPU with a mere warning when CUDA cannot start; a server must not.
    if session.get_providers()[0] != provider:
        raise pb_utils.TritonModelException(
            f"{provider} did not start (running on {session.get_providers()[0]} instead); look above for its reason: "
            "driver, CUDA and cuDNN must fit this onnxruntime"
        )
    return session


def _check_names(kind: str, configured: list[dict[str, Any]], actual: list[Any]) -> None:
    have = [tensor.name for tensor in actual]
    unknown = [tensor["name"] for tensor in configured if tensor["name"] not in have]
    if unknown:
        raise pb_utils.TritonModelException(f"config.pbtxt names the {kind} {unknown}; the ONNX file has {have}")


def _usable_cpus() -> int:
    return len(os.sched_getaffinity(0))


def _to_numpy(tensor: Any) -> np.ndarray[Any, Any]:
    # Not tensor.as_numpy(): the stub's bindings are older than numpy 2 and hand it wrong data, silently.
    return np.from_dlpack(tensor)


def _to_tensor(name: str, array: np.ndarray[Any, Any]) -> Any:
    # Not pb_utils.Tensor(name, array), for the same reason.
    capsule = np.ascontiguousarray(array).__dlpack__()
    tensor = pb_utils.Tensor.from_dlpack(name, capsule)
    _set_capsule_name(capsule, ctypes.addressof(_CONSUMED))
    return tensor


def _answer(request: Any, response: Any) -> None:
    request.get_response_sender().send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)


def _error(message: str, code: int) -> Any:
    return pb_utils.InferenceResponse(output_tensors=[], error=pb_utils.TritonError(message, code))
