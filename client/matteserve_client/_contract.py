"""The contract: what a client must know about a model, read from (and written to) its Triton configuration.

The wire part is what `config.pbtxt` says anyway: input `image`, UINT8 `[B, H, W, 3]`, RGB; output `alpha`, UINT8
`[B, H, W]`. What the wire does not say (how a picture becomes the input, what is being served) stands in the
configuration's `parameters`. The exporter writes it, the client reads it, and nothing else is shared between them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from matteserve_client._errors import ContractError

INPUT_NAME = "image"
OUTPUT_NAME = "alpha"
CONTRACT_VERSION = "1"
_PREFIX = "matteserve."

ResampleFilter = Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"]
Fit = Literal["stretch"]
Numerics = Literal["reference", "rembg"]


@dataclass(frozen=True)
class ModelContract:
    """What a client must know about one served model.

    Attributes:
        height: Input height in pixels.
        width: Input width in pixels.
        max_batch_size: Largest batch that one request may carry; at least 1.
        resample: Filter that brings a picture to `(height, width)`; names as in Pillow.
        alpha_resample: Filter that brings the alpha back to the picture's size.
        fit: How a picture of another aspect ratio is fitted; "stretch" does not keep the ratio.
        architecture: Name of the network, e.g. "u2netp".
        weights: Name of the weights, e.g. "u2netp".
        weights_sha256: Hex digest of the weights' file; empty if unknown.
        weights_licence: SPDX expression, or "unknown".
        engine: What runs the graph: "onnx", "trt" or "rtx".
        precision: Arithmetic of the graph: "fp32", "fp16", "bf16" or "int8".
        numerics: Whose pre- and post-processing the graph has: "reference", of the weights' authors, or "rembg".
    """

    height: int
    width: int
    max_batch_size: int
    resample: ResampleFilter
    alpha_resample: ResampleFilter
    architecture: str
    weights: str
    fit: Fit = "stretch"
    weights_sha256: str = ""
    weights_licence: str = "unknown"
    engine: str = "onnx"
    precision: str = "fp32"
    numerics: Numerics = "reference"

    def __post_init__(self) -> None:
        for name in ("height", "width", "max_batch_size"):
            if getattr(self, name) < 1:
                raise ContractError(f"contract: {name} is {getattr(self, name)}, must be at least 1")
        for name, allowed in (
            ("resample", get_args(ResampleFilter)),
            ("alpha_resample", get_args(ResampleFilter)),
            ("fit", get_args(Fit)),
            ("numerics", get_args(Numerics)),
        ):
            if getattr(self, name) not in allowed:
                raise ContractError(
                    f"contract: {name} is {getattr(self, name)!r}, must be one of {', '.join(allowed)}; "
                    "a newer client may know it"
                )

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Shape of one input without the batch: (height, width, 3), uint8, RGB."""
        return self.height, self.width, 3

    def to_parameters(self) -> dict[str, str]:
        """The part that the wire does not say, as `parameters` of a model configuration."""
        wire = {"height", "width", "max_batch_size"}
        named = {f.name: str(getattr(self, f.name)) for f in fields(self) if f.name not in wire}
        return {f"{_PREFIX}{key}": value for key, value in {"contract": CONTRACT_VERSION, **named}.items()}

    @classmethod
    def from_config(cls, config: Any) -> ModelContract:
        """Read the contract of a model.

        Args:
            config: An `inference.ModelConfig` message, as the server's ModelConfig call returns it or as parsed
                from a `config.pbtxt`.

        Raises:
            ContractError: The configuration has another wire format, or lacks a parameter.
        """
        where = f"model {config.name!r}"
        height, width = _wire_size(config, where)
        parameters: Mapping[str, str] = {
            key.removeprefix(_PREFIX): value.string_value
            for key, value in config.parameters.items()
            if key.startswith(_PREFIX)
        }
        version = parameters.get("contract")
        if version != CONTRACT_VERSION:
            raise ContractError(
                f"{where}: its config.pbtxt has contract version {version or 'none'}, this client knows "
                f"{CONTRACT_VERSION}; was it written by `matteserve export`, and is the client as new as that?"
            )
        named = {f.name for f in fields(cls)} - {"height", "width", "max_batch_size"}
        missing = {"resample", "alpha_resample", "architecture", "weights"} - parameters.keys()
        if missing:
            raise ContractError(
                f"{where}: config.pbtxt lacks the parameters {', '.join(_PREFIX + key for key in sorted(missing))}"
            )
        known: dict[str, Any] = {key: value for key, value in parameters.items() if key in named}
        return cls(height=height, width=width, max_batch_size=max(1, config.max_batch_size), **known)


def _wire_size(config: Any, where: str) -> tuple[int, int]:
    """Check names, dtypes and ranks of the tensors; return (height, width)."""
    expected = f"input {INPUT_NAME!r} UINT8 [H, W, 3] and output {OUTPUT_NAME!r} UINT8 [H, W]"
    inputs = [(t.name, t.data_type, tuple(t.dims)) for t in config.input]
    outputs = [(t.name, t.data_type, tuple(t.dims)) for t in config.output]
    uint8 = 2  # inference.DataType.TYPE_UINT8
    if len(inputs) == 1 and len(inputs[0][2]) == 3:
        height, width, channels = inputs[0][2]
        wanted_in, wanted_out = (INPUT_NAME, uint8, (height, width, 3)), (OUTPUT_NAME, uint8, (height, width))
        if channels == 3 and height > 0 and width > 0 and inputs == [wanted_in] and outputs == [wanted_out]:
            return int(height), int(width)
    raise ContractError(f"{where}: the wire format is {expected}; found inputs {inputs}, outputs {outputs}")
