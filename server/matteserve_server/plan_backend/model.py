"""The class that Triton's stub calls."""

from __future__ import annotations

import json
import os
from typing import Any

import triton_python_backend_utils as pb_utils

from .config import PlanConfig, PlanError
from .cuda import CudaError
from .plan import Plan
from .tensors import to_numpy, to_tensor


class TritonPythonModel:
    """One instance of a plan; Triton's name for the class is fixed."""

    def initialize(self, arguments: dict[str, str]) -> None:
        """Load the plan on the GPU of this instance, or fail with the reason."""
        self._name = arguments["model_name"]
        try:
            self._config = PlanConfig.from_triton(json.loads(arguments["model_config"]), arguments)
            self._plan = Plan(self._config)
        except PlanError as exc:
            raise pb_utils.TritonModelException(str(exc)) from exc

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer every request, all of them in one run of the plan."""
        # A client that gave up must not cost a share of the batch.
        cancelled = {index for index, request in enumerate(requests) if request.is_cancelled()}
        alive = [request for index, request in enumerate(requests) if index not in cancelled]
        outcomes = iter(self._infer(alive) if alive else [])
        return [
            _error("the client cancelled the request", pb_utils.TritonError.CANCELLED)
            if index in cancelled
            else next(outcomes)
            for index in range(len(requests))
        ]

    def finalize(self) -> None:
        """Give the GPU's memory back before the process ends."""
        self._plan.close()

    def _infer(self, requests: list[Any]) -> list[Any]:
        names = [tensor.name for tensor in self._config.inputs]
        try:
            answers = self._plan.infer(
                [
                    {name: to_numpy(pb_utils.get_input_tensor_by_name(request, name)) for name in names}
                    for request in requests
                ]
            )
        except PlanError as exc:
            pb_utils.Logger.log_error(f"{self._name}: {exc}")
            if isinstance(exc, CudaError) and exc.fatal:
                # This process cannot use the GPU any more, and Triton would go on calling it ready. A dead process is
                # noticed and replaced by the supervisor.
                os._exit(1)
            return [_error(f"the plan failed: {exc}", pb_utils.TritonError.INTERNAL) for _ in requests]
        return [
            pb_utils.InferenceResponse(
                output_tensors=[
                    to_tensor(pb_utils, tensor.name, array)
                    for tensor, array in zip(self._config.outputs, arrays, strict=True)
                ]
            )
            for arrays in answers
        ]


def _error(message: str, code: int) -> Any:
    return pb_utils.InferenceResponse(output_tensors=[], error=pb_utils.TritonError(message, code))
