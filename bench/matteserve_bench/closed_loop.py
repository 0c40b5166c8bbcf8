"""Closed load: a fixed number of requests is always on its way, each replaced when it is answered.

Says what a server can do, not how it behaves at a given rate: a slow answer delays the next request.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from matteserve_bench.metrics import Record
from matteserve_client import MatteserveError, ModelContract, Transport


@dataclass(frozen=True)
class ClosedLoop:
    """One load.

    Attributes:
        concurrency: Requests on their way at any time.
        duration_s: Seconds during which requests are sent and counted.
        warmup_s: Seconds before, not counted.
        timeout_s: Limit of each request.
    """

    concurrency: int = 1
    duration_s: float = 10.0
    warmup_s: float = 2.0
    timeout_s: float = 60.0

    def __post_init__(self) -> None:
        if self.concurrency < 1:
            raise ValueError(f"concurrency is {self.concurrency}, must be at least 1")
        if self.duration_s <= 0:
            raise ValueError(f"duration_s is {self.duration_s}, must be positive")


def run_closed_loop(transport: Transport, model: str, contract: ModelContract, load: ClosedLoop) -> list[Record]:
    """Send tensors of noise, prepared beforehand, and record every request that was sent after the warm-up.

    Args:
        transport: Connection to the server; shared by all requests.
        model: Model to call.
        contract: Its contract, for the input's shape.
        load: How much, for how long.
    """
    tensors = np.random.default_rng(0).integers(0, 256, (load.concurrency, 1, *contract.input_shape), np.uint8)
    began = time.perf_counter()
    counted_from, end = began + load.warmup_s, began + load.warmup_s + load.duration_s

    def worker(index: int) -> list[Record]:
        records = []
        while (sent := time.perf_counter()) < end:
            error = ""
            try:
                transport.infer(model, tensors[index], timeout_s=load.timeout_s).result()
            except MatteserveError as exc:
                error = type(exc).__name__
            if sent >= counted_from:
                records.append(Record(sent, time.perf_counter(), error))
        return records

    with ThreadPoolExecutor(load.concurrency, thread_name_prefix="load") as pool:
        return [record for records in pool.map(worker, range(load.concurrency)) for record in records]
