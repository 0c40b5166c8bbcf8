"""Fixtures for the whole suite: one real Triton a session, and small models that start in a moment."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from matteserve_server import EmbeddedServer, ServerOptions, TritonNotFoundError, find_tritonserver

REPOSITORY = Path(__file__).parents[1] / "model_repository"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run, with the reason."""
    try:
        find_tritonserver()
    except TritonNotFoundError as exc:
        skip_triton = pytest.mark.skip(reason=str(exc))
        for item in items:
            if item.get_closest_marker("triton"):
                item.add_marker(skip_triton)
    if shutil.which("nvidia-smi") is None:
        skip_gpu = pytest.mark.skip(reason="no NVIDIA GPU on this machine")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(skip_gpu)


@pytest.fixture(scope="session")
def demo_server() -> Iterator[EmbeddedServer]:
    """The bundled demonstration model on a real Triton; shared, so tests must not break it."""
    with EmbeddedServer(ServerOptions(REPOSITORY, ("demo",), grpc_port=0, metrics_port=0)) as server:
        yield server
