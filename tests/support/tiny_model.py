"""A model repository whose model starts in a moment and whose answers are known: alpha is the red channel.

With `delay` set, rows are multiplied through large matrices first, so that a request takes a while without sleeping.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from google.protobuf import text_format
from onnx import TensorProto, helper, numpy_helper
from tritonclient.grpc import model_config_pb2 as pb

from matteserve_client import ModelContract

SIZE = 32


def write_repository(
    path: Path, *, name: str = "tiny", delay: int = 0, max_queue_size: int = 64, batch: int = 8
) -> Path:
    """Write alias `name` and engine `<name>_onnx_fp32`; `delay` is the number of 1024x1024 matrix products a row."""
    engine = f"{name}_onnx_fp32"
    contract = ModelContract(SIZE, SIZE, batch, "bilinear", "bilinear", architecture="red", weights=name)
    (path / engine / "1").mkdir(parents=True)
    (path / name / "1").mkdir(parents=True)
    onnx.save(red_channel(delay), path / engine / "1" / "model.onnx")
    common = {
        "max_batch_size": batch,
        "input": [pb.ModelInput(name="image", data_type=pb.TYPE_UINT8, dims=[SIZE, SIZE, 3])],
        "output": [pb.ModelOutput(name="alpha", data_type=pb.TYPE_UINT8, dims=[SIZE, SIZE])],
        "parameters": {k: pb.ModelParameter(string_value=v) for k, v in contract.to_parameters().items()},
    }
    batcher = pb.ModelDynamicBatching(max_queue_delay_microseconds=1000)
    batcher.default_queue_policy.max_queue_size = max_queue_size
    write_config(
        path,
        pb.ModelConfig(
            name=engine,
            backend="onnxruntime",
            default_model_filename="model.onnx",
            dynamic_batching=batcher,
            instance_group=[pb.ModelInstanceGroup(count=1, kind=pb.ModelInstanceGroup.KIND_AUTO)],
            **common,
        ),
    )
    step = pb.ModelEnsembling.Step(
        model_name=engine, model_version=-1, input_map={"image": "image"}, output_map={"alpha": "alpha"}
    )
    write_config(
        path,
        pb.ModelConfig(name=name, platform="ensemble", ensemble_scheduling=pb.ModelEnsembling(step=[step]), **common),
    )
    return path


def write_config(repository: Path, config: pb.ModelConfig) -> None:
    """Write a model's config.pbtxt."""
    (repository / config.name / "config.pbtxt").write_text(text_format.MessageToString(config))


def red_channel(delay: int) -> onnx.ModelProto:
    """uint8 [B, S, S, 3] -> uint8 [B, S, S], the red channel; `delay` matrix products that change nothing."""
    nodes = [helper.make_node("Gather", ["image", "zero"], ["red"], axis=3)]
    constants = [numpy_helper.from_array(np.array(0, np.int64), "zero")]
    if delay:
        constants += [
            numpy_helper.from_array(np.eye(SIZE * SIZE, dtype=np.float32), "identity"),
            numpy_helper.from_array(np.array([-1, SIZE * SIZE], np.int64), "flat"),
            numpy_helper.from_array(np.array([-1, SIZE, SIZE], np.int64), "square"),
        ]
        nodes += [
            helper.make_node("Cast", ["red"], ["red_float"], to=TensorProto.FLOAT),
            helper.make_node("Reshape", ["red_float", "flat"], ["row0"]),
            *(helper.make_node("MatMul", [f"row{i}", "identity"], [f"row{i + 1}"]) for i in range(delay)),
            helper.make_node("Reshape", [f"row{delay}", "square"], ["alpha_float"]),
            helper.make_node("Cast", ["alpha_float"], ["alpha"], to=TensorProto.UINT8),
        ]
    else:
        nodes.append(helper.make_node("Identity", ["red"], ["alpha"]))
    graph = helper.make_graph(
        nodes,
        "red",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["batch", SIZE, SIZE, 3])],
        [helper.make_tensor_value_info("alpha", TensorProto.UINT8, ["batch", SIZE, SIZE])],
        constants,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
