"""What a model costs, and the settings that follow from it.

One set of defaults cannot serve a network that answers in milliseconds and one that takes seconds: a batch of eight is
nothing for the first and minutes of work for the second. So batch, delay and gates are derived from the
multiply-accumulate operations (MACs) of one picture at the size at hand. Every default can be overridden.
"""

from __future__ import annotations

from dataclasses import dataclass

from matteserve_export.repository import DynamicBatching

__all__ = ["SESSION_OPTIONS", "GatePlan", "default_batch_size", "default_batching", "gate_plan", "giga_macs"]

SESSION_OPTIONS = {"enable_mem_pattern": "0"}
"""Options of ONNX Runtime's session, by the names that Triton's onnxruntime backend reads.

It would plan the memory of every batch size that it meets, as one block each: under dynamic batching twice the memory,
and a long run for each new size; and a third more memory for BiRefNet even where all runs are alike.
"""

# Giga-MACs of one picture, counted over convolutions, linear layers, attention and the main product of the deformable
# convolutions, and the side of the square picture they were counted at. They grow with the area.
_COUNTED = {
    "u2net": (58.6, 320),
    "u2netp": (19.76, 320),
    "silueta": (58.6, 320),  # a smaller U²-Net that nobody counted
    "isnet": (159.6, 1024),
    "isnet_anime": (159.6, 1024),
    "birefnet": (1265.8, 1024),
    "birefnet_lite": (319.4, 1024),
    "birefnet_swin_b": (671.7, 1024),
    "birefnet_swin_s": (438.0, 1024),
    "birefnet_pvt_v2_b2": (345.5, 1024),
}
# Nobody counted it: taken for as costly as the costliest, so that a surprise is a pleasant one.
_UNCOUNTED = _COUNTED["birefnet"]

# Two AVX2 cores do 40 to 70 giga-MACs a second on these networks; the slowest machine that the defaults have in mind.
_SLOW_GIGA_MACS_PER_S = 40.0
_LARGEST_BATCH = 8
_BATCH_GIGA_MACS = 650.0


def giga_macs(architecture: str, height: int, width: int) -> float:
    """Giga-MACs of one picture."""
    macs, side = _COUNTED.get(architecture, _UNCOUNTED)
    return macs * height * width / side**2


def default_batch_size(cost: float) -> int:
    """Largest batch that is worth having: a power of two up to 8 whose work stays bounded.

    Batches share the costs that come once per run; a picture of hundreds of giga-MACs fills any device by itself, and
    its batches would only take memory, and time from whoever waits behind them.

    Args:
        cost: Giga-MACs of one picture.
    """
    size = _LARGEST_BATCH
    while size > 1 and size * cost > _BATCH_GIGA_MACS:
        size //= 2
    return size


def default_batching(cost: float, max_batch_size: int, max_queue_size: int = 0) -> DynamicBatching:
    """Batcher and queue of a model.

    Args:
        cost: Giga-MACs of one picture.
        max_batch_size: Largest batch.
        max_queue_size: Requests that may wait; 0 sets no bound. With a bound a request that waits too long is refused
            too, rather than computed for nobody: after the time that a slow machine needs for the whole queue, and a
            minute at least.
    """
    timeout_s = min(max(60.0, max_queue_size * cost / _SLOW_GIGA_MACS_PER_S), 600.0) if max_queue_size else 0.0
    # Waiting for company is worth a tenth of a run at most, and a run is short where batches matter: on a GPU.
    delay_us = round(min(max(4 * cost, 500), 5_000)) if max_batch_size > 1 else 0
    return DynamicBatching(
        max_queue_delay_us=delay_us,
        max_queue_size=max_queue_size,
        default_queue_timeout_us=round(timeout_s * 1e6),
    )


@dataclass(frozen=True)
class GatePlan:
    """How much is compared before a model is published.

    Attributes:
        scenes: Pictures for the comparisons with the reference.
        batch_sizes: Batches whose rows are compared with single pictures; empty where the largest batch is 1.
    """

    scenes: int
    batch_sizes: tuple[int, ...]

    @property
    def pictures(self) -> int:
        """Pictures needed in all."""
        return max(self.scenes, *self.batch_sizes, 1)


def gate_plan(cost: float, max_batch_size: int) -> GatePlan:
    """Choose the comparisons: all batches of a cheap model, a batch of two of one that takes seconds.

    A graph with a batch baked in somewhere is wrong at two rows already.

    Args:
        cost: Giga-MACs of one picture.
        max_batch_size: Largest batch.
    """
    largest = max(2, default_batch_size(cost))
    step = 1 if largest == _LARGEST_BATCH else largest // 2  # all; 2 and 4; or 2
    sizes = range(2, largest + 1, step)
    batches = tuple(size for size in sizes if size <= max_batch_size)
    return GatePlan(scenes=4 if largest > 2 else 2, batch_sizes=batches)
