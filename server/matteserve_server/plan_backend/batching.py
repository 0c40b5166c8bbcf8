"""Several requests in one batch: their rows into one buffer, the answers out of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .config import PlanError, Tensor

Array = NDArray[Any]


def view(buffer: NDArray[np.uint8], tensor: Tensor, rows: int) -> Array:
    """The first rows of a buffer as the tensor's array, shape (rows, *dims); nothing is copied."""
    return buffer[: rows * tensor.row_bytes].view(tensor.dtype).reshape(rows, *tensor.dims)


def gather(parts: Sequence[Array], buffer: NDArray[np.uint8], tensor: Tensor) -> list[int]:
    """Copy the rows of several requests behind each other.

    Args:
        parts: One array for each request, shape (its rows, *dims).
        buffer: Where to, uint8, large enough for the largest batch.
        tensor: What the configuration says about it.

    Returns:
        How many rows each request has.

    Raises:
        PlanError: A request has another shape or dtype, or together they are more than the buffer holds.
    """
    rows = []
    for part in parts:
        if part.dtype != tensor.dtype or part.shape[1:] != tensor.dims:
            raise PlanError(
                f"input {tensor.name!r} is {part.dtype} {part.shape}; expected is {tensor.dtype} with rows of "
                f"{tensor.dims}"
            )
        rows.append(len(part))
    if sum(rows) * tensor.row_bytes > buffer.size:
        raise PlanError(f"{sum(rows)} rows are more than a batch holds, {buffer.size // tensor.row_bytes}")
    destination = view(buffer, tensor, sum(rows))
    begin = 0
    for part in parts:
        destination[begin : begin + len(part)] = part
        begin += len(part)
    return rows


def split(batch: Array, rows: Sequence[int]) -> list[Array]:
    """Cut a batch into the rows of each request; views, valid until the next batch is gathered."""
    ends = np.cumsum(rows)
    return [batch[end - count : end] for end, count in zip(ends, rows, strict=True)]
