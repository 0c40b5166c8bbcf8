"""Small networks and public-style ONNX files that export in a moment and still have structure worth comparing."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from matteserve_export.compare import make_scenes
from matteserve_export.models import MODEL_BUILDERS, build_model
from matteserve_export.serving import ServingConfig
from support.conformance import fill

SIZE = 64
IMAGENET = ServingConfig((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Networks this small gain nothing from threads, and lose much where other processes keep the cores busy."""
    torch.set_num_threads(1)


class PublicStyle(nn.Module):
    """Two maps, sizes read from the tensors as public code does it; the second map is one to drop."""

    def __init__(self, baked_batch: bool = False) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Conv2d(8, 1, 3, padding=1)
        self.side = nn.Conv2d(8, 1, 1)
        self.baked_batch = baked_batch

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.relu(self.down(x))
        if self.baked_batch:
            h = h.reshape(1, 8, -1).reshape(1, 8, x.shape[2] // 2, x.shape[3] // 2)
        full = nn.functional.interpolate(self.up(h), size=x.shape[2:], mode="bilinear")
        return torch.sigmoid(3 * full), self.side(h)


@pytest.fixture(scope="session")
def lively_u2netp() -> nn.Module:
    """U²-Net-P with weights whose maps reach over most of 0..1; nearly flat maps would prove little."""
    model = build_model("u2netp")
    fill(model, seed=3)
    return model


class Tiny(nn.Module):
    """As small as an architecture can be; for what does not depend on the network."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.conv(x))


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Registers the architecture "tiny"; returns a checkpoint for it."""
    monkeypatch.setitem(MODEL_BUILDERS, "tiny", Tiny)
    torch.manual_seed(3)
    path = tmp_path / "tiny.pth"
    torch.save(Tiny().state_dict(), path)
    return path


@pytest.fixture(scope="session")
def checkpoint(lively_u2netp: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The lively network as a plain .pth."""
    path = tmp_path_factory.mktemp("weights") / "u2netp.pth"
    torch.save(lively_u2netp.state_dict(), path)
    return path


@pytest.fixture(scope="session")
def public_onnx(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes an ONNX as public projects publish them: old operator set, batch 1, two outputs, weights as inputs."""
    folder = tmp_path_factory.mktemp("public")

    def write(baked_batch: bool = False, opset: int = 11, batch: bool = False) -> Path:
        path = folder / f"public_{baked_batch}_{opset}_{batch}.onnx"
        if path.exists():
            return path
        torch.manual_seed(5)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's exporter is not what is tested here
            torch.onnx.export(
                PublicStyle(baked_batch).eval(),
                (torch.zeros(1, 3, SIZE, SIZE),),
                str(path),
                dynamo=False,
                opset_version=opset,
                keep_initializers_as_inputs=True,
                do_constant_folding=False,
                input_names=["image"],  # the same name as ours, on purpose
                output_names=["alpha", "side"],
                dynamic_axes={"image": {0: "n", 2: "h", 3: "w"}} if batch else None,
            )
        return path

    return write


@pytest.fixture
def scenes() -> NDArray[np.uint8]:
    return make_scenes(8, SIZE, SIZE, seed=2)


@pytest.fixture(scope="session")
def imagenet() -> ServingConfig:
    return IMAGENET


@pytest.fixture
def op_model() -> Callable[..., onnx.ModelProto]:
    """A model of a single operator with inputs and outputs of any dtype and shape."""

    def build(
        operator: str = "Sigmoid",
        inputs: tuple[tuple[int, tuple[object, ...]], ...] = ((onnx.TensorProto.FLOAT, (1, 3, SIZE, SIZE)),),
        output: tuple[int, tuple[object, ...]] = (onnx.TensorProto.FLOAT, (1, 3, SIZE, SIZE)),
        opset: int = 17,
        **attributes: object,
    ) -> onnx.ModelProto:
        values = [onnx.helper.make_tensor_value_info(f"in{i}", *spec) for i, spec in enumerate(inputs)]
        node = onnx.helper.make_node(operator, [value.name for value in values], ["out"], **attributes)
        graph = onnx.helper.make_graph([node], "one", values, [onnx.helper.make_tensor_value_info("out", *output)])
        return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=8)

    return build
