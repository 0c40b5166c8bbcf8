"""One real server with a fast, a slow and an overloaded model."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from matteserve_server import EmbeddedServer, ServerOptions
from support.tiny_model import write_repository


@pytest.fixture(scope="session")
def bench_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    """`tiny` answers at once, `slow` takes a while and has a long queue, `full` is as slow with a queue of one."""
    repository = tmp_path_factory.mktemp("bench")
    write_repository(repository, max_queue_size=10_000)
    write_repository(repository, name="slow", delay=60, max_queue_size=10_000, batch=1)
    write_repository(repository, name="full", delay=60, max_queue_size=1, batch=1)
    # With one instance Triton's batcher now and then misses that it is free and waits for half a second.
    for config in repository.glob("*_onnx_fp32/config.pbtxt"):
        config.write_text(config.read_text().replace("count: 1", "count: 2"))
    options = ServerOptions(repository, grpc_port=0, metrics_port=0, probe_interval_s=0, threads=1)
    with EmbeddedServer(options) as server:
        yield server
