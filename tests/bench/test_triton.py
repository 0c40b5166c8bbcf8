"""What the server says about itself, and what this machine says about the server."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import psutil
import pytest

from matteserve_bench import ServerStatistics
from matteserve_bench.environment import describe_environment, format_environment
from matteserve_bench.observer import Observer
from matteserve_bench.processes import busy_seconds, find_listener, tree_of, usage_of
from matteserve_bench.records import GpuUse
from matteserve_bench.triton import GpuSample, TritonServer, gpu_use, parse_gpu_metrics, read_gpu_metrics
from matteserve_client import ModelNotFoundError, ServerUnavailableError
from matteserve_server import EmbeddedServer

# Lines as a Triton with two GPUs writes them.
METRICS = """\
# HELP nv_gpu_utilization GPU utilization rate [0.0 - 1.0)
# TYPE nv_gpu_utilization gauge
nv_gpu_utilization{gpu_uuid="GPU-a"} 0.9
nv_gpu_utilization{gpu_uuid="GPU-b"} 0.5
nv_gpu_memory_used_bytes{gpu_uuid="GPU-a"} 2000000000
nv_gpu_memory_used_bytes{gpu_uuid="GPU-b"} 1e9
nv_gpu_power_usage{gpu_uuid="GPU-a"} 310.5
nv_gpu_power_usage{gpu_uuid="GPU-b"} 200
nv_energy_consumption{gpu_uuid="GPU-a"} 1000
nv_energy_consumption{gpu_uuid="GPU-b"} 50.5
nv_inference_count{model="u2netp",version="1"} 12
"""


def test_gpu_metrics_are_read() -> None:
    assert parse_gpu_metrics(METRICS) == GpuSample(
        {"GPU-a": 0.9, "GPU-b": 0.5},
        {"GPU-a": 2e9, "GPU-b": 1e9},
        {"GPU-a": 310.5, "GPU-b": 200.0},
        {"GPU-a": 1000.0, "GPU-b": 50.5},
    )


def test_a_page_without_gpus() -> None:
    assert parse_gpu_metrics('nv_cpu_utilization 0.9\nnv_inference_count{model="a"} 1\n') is None


def test_use_of_gpus_during_a_window() -> None:
    first = GpuSample({"a": 0.8, "b": 0.4}, {"a": 10.0, "b": 20.0}, {"a": 100.0, "b": 50.0}, {"a": 5.0, "b": 7.0})
    last = GpuSample({"a": 1.0, "b": 0.6}, {"a": 11.0, "b": 20.0}, {"a": 120.0, "b": 70.0}, {"a": 9.0, "b": 8.0})
    assert gpu_use([first, last]) == GpuUse(2, pytest.approx(0.7), 31.0, 170.0, 5.0)
    assert gpu_use([first]) == GpuUse(2, pytest.approx(0.6), 30.0, 150.0, None)
    assert gpu_use([]) is None


@pytest.fixture
def metrics_url() -> Iterator[str]:
    """A page like that of a Triton with GPUs."""

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(METRICS.encode())

        def log_message(self, *arguments: object) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Page) as page:
        thread = threading.Thread(target=page.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{page.server_port}/metrics"
        page.shutdown()
        thread.join()


@pytest.mark.triton
def test_a_window_has_what_the_server_and_its_gpus_did(bench_server: EmbeddedServer, metrics_url: str) -> None:
    server = TritonServer(bench_server.address)
    observer = Observer(server, "tiny_onnx_fp32", metrics_url=metrics_url)
    observer.begin(0.0)
    observer.tick()
    window = observer.next_window(2.0)
    server.close()
    assert (window.start_s, window.end_s, window.server) == (0.0, 2.0, ServerStatistics())
    assert window.gpu == GpuUse(2, pytest.approx(0.7), 3e9, 510.5, 0.0)
    assert window.server_rss_bytes is not None
    assert window.server_rss_bytes > 20 * 2**20
    assert window.machine_cores == psutil.cpu_count()


def test_metrics_that_cannot_be_had() -> None:
    with pytest.raises(OSError, match="is not an http address"):
        read_gpu_metrics("file:///etc/passwd")
    with pytest.raises(OSError, match="refused"):
        read_gpu_metrics("http://127.0.0.1:1/metrics")


@pytest.mark.triton
def test_statistics_and_environment_of_the_real_server(bench_server: EmbeddedServer) -> None:
    server = TritonServer(bench_server.address)
    assert server.engine_of("tiny") == server.engine_of("tiny_onnx_fp32") == "tiny_onnx_fp32"
    before = server.statistics("tiny_onnx_fp32")
    bench_server.control.probe(bench_server.control.config("tiny"), 10.0)
    counted = server.statistics("tiny_onnx_fp32") - before
    assert (counted.inferences, counted.executions, counted.succeeded, counted.batches) == (1, 1, 1, {1: 1})
    assert counted.compute_infer_s > 0
    header = describe_environment(server, "tiny", server.contract("tiny"))
    assert header["server"]["triton"] == "2.51.0" == server.version()
    assert header["server"]["local"] is True
    assert header["model"]["engine_name"] == "tiny_onnx_fp32"
    assert header["model"]["dynamic_batching"]["max_queue_size"] == 10_000
    assert header["model"]["instance_group"] == [{"kind": "KIND_CPU", "count": 2}]
    import onnxruntime

    assert header["server"]["software"] == {"ONNX Runtime": onnxruntime.__version__}
    text = format_environment(header)
    assert "client and server on one machine; Triton 2.51.0; ONNX Runtime" in text
    assert "tiny -> tiny_onnx_fp32; red onnx fp32, 32x32; batch <= 8, batcher delay 1000 us; instances 2 CPU" in text
    with pytest.raises(ModelNotFoundError, match="not loaded"):
        server.config("nothing")
    server.close()


@pytest.mark.triton
def test_the_manifest_of_a_local_server(demo_server: EmbeddedServer) -> None:
    server = TritonServer(demo_server.address)
    model = describe_environment(server, "demo", server.contract("demo"))["model"]
    server.close()
    assert model["manifest"]["producer"]["torch"].startswith("2.")
    assert len(model["manifest"]["onnx"]["sha256"]) == 64


def test_a_server_that_is_not_there() -> None:
    server = TritonServer("127.0.0.1:1")
    with pytest.raises(ServerUnavailableError, match="cannot reach the server"):
        server.version()
    server.close()
    assert find_listener("127.0.0.1:1") is None
    assert find_listener("example.invalid:8001") is None
    assert find_listener("unix:/tmp/socket") is None


@pytest.mark.triton
def test_the_process_that_listens(bench_server: EmbeddedServer) -> None:
    found = find_listener(bench_server.address)
    assert found is not None
    assert found.pid == bench_server.process.pid
    tree = tree_of(found)
    assert {process.pid for process in tree} >= bench_server.process.stubs().keys()
    assert usage_of(tree).rss_bytes > usage_of([found]).rss_bytes


def test_use_of_cpu() -> None:
    me = psutil.Process()
    before, (busy_before, all_before) = usage_of([me]), busy_seconds()
    until = os.times().user + 0.05
    while os.times().user < until:
        pass
    after, (busy_after, all_after) = usage_of([me]), busy_seconds()
    assert 0.04 <= after.cpu_s - before.cpu_s < 1.0
    assert busy_before <= busy_after <= all_after
    assert all_before <= all_after


def test_a_process_that_has_ended_counts_as_nothing() -> None:
    child = psutil.Popen([sys.executable, "-c", ""])
    child.wait()
    assert tree_of(child) == []
    assert usage_of([child]).rss_bytes == 0
