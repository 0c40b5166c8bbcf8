"""The real server: loading, failing clearly, recovering, ending cleanly. Models here start in a moment."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tritonclient.grpc as triton
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb
from tritonclient.utils import InferenceServerException

from matteserve_server import (
    EmbeddedServer,
    ModelLoadError,
    ResourceError,
    ServerOptions,
    StartError,
    UnknownModelError,
)
from matteserve_server.control import Health
from support.tiny_model import SIZE, red_channel, write_config, write_repository

pytestmark = pytest.mark.triton

ENGINE = "tiny_onnx_fp32"


def options(repository: Path, **changes: object) -> ServerOptions:
    return ServerOptions(repository, **{"grpc_port": 0, "metrics_port": None, "exit_timeout_s": 10.0, **changes})  # type: ignore[arg-type]


def infer(server: EmbeddedServer, image: np.ndarray, model: str = "tiny", timeout_s: float = 10.0) -> np.ndarray:
    with triton.InferenceServerClient(server.address) as client:
        tensor = triton.InferInput("image", image.shape, "UINT8")
        tensor.set_data_from_numpy(image)
        return client.infer(model, [tensor], client_timeout=timeout_s).as_numpy("alpha")


def random_images(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (rows, SIZE, SIZE, 3), np.uint8)


def wait_for(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.05)


def regions() -> set[str]:
    return {name for name in os.listdir("/dev/shm") if name.startswith(f"matteserve_{os.getpid()}_")}


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_repository(tmp_path_factory.mktemp("repository"))


@pytest.fixture(scope="module")
def server(repository: Path) -> Iterator[EmbeddedServer]:
    with EmbeddedServer(options(repository)) as running:
        yield running


@pytest.mark.parametrize("rows", [1, 2, 8])
def test_rows_come_back_right_and_in_order(server: EmbeddedServer, rows: int) -> None:
    image = random_images(rows, seed=rows)
    np.testing.assert_array_equal(infer(server, image), image[..., 0])


def batch_size_as_alpha() -> onnx.ModelProto:
    nodes = [
        onnx.helper.make_node("Shape", ["image"], ["batch"], start=0, end=1),
        onnx.helper.make_node("Cast", ["batch"], ["alpha_of_all"], to=onnx.TensorProto.UINT8),
        onnx.helper.make_node("Shape", ["image"], ["shape"], start=0, end=3),
        onnx.helper.make_node("Expand", ["alpha_of_all", "shape"], ["alpha"]),
    ]
    graph = red_channel(0).graph
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize(
    ("parameter", "rows_per_run"), [({}, 1), ({"split_batches": "1"}, 1), ({"split_batches": "0"}, 3)]
)
def test_on_a_cpu_rows_of_a_batch_are_run_one_by_one_unless_told_otherwise(
    tmp_path: Path, parameter: dict[str, str], rows_per_run: int
) -> None:
    repository = write_repository(tmp_path)
    onnx.save(batch_size_as_alpha(), repository / ENGINE / "1" / "model.onnx")

    def set_parameter(config: pb.ModelConfig) -> None:
        for key, value in parameter.items():
            config.parameters[key].string_value = value

    change_config(repository, set_parameter)
    with EmbeddedServer(options(repository)) as server:
        np.testing.assert_array_equal(infer(server, random_images(3)), np.full((3, SIZE, SIZE), rows_per_run))


def test_requests_that_are_cancelled_inside_a_batch_are_not_computed(tmp_path: Path) -> None:
    repository = write_repository(tmp_path, delay=2500, max_queue_size=0)
    with (
        EmbeddedServer(options(repository, probe_interval_s=0)) as server,
        triton.InferenceServerClient(server.address) as client,
    ):
        tensor = triton.InferInput("image", (1, SIZE, SIZE, 3), "UINT8")
        tensor.set_data_from_numpy(random_images(1))
        answered: list[bool] = []

        def send() -> Any:
            return client.async_infer(ENGINE, [tensor], lambda result, error: answered.append(error is None))

        send()
        time.sleep(0.05)
        calls = [send() for _ in range(8)]  # one batch, which starts when the first answer is out
        wait_for(lambda: answered == [True])
        for call in calls[1:]:
            call.cancel()

        def seconds_of_batch(size: int) -> list[float]:
            batches = client.get_inference_statistics(ENGINE).model_stats[0].batch_stats
            return [batch.compute_infer.ns / batch.compute_infer.count for batch in batches if batch.batch_size == size]

        wait_for(lambda: seconds_of_batch(8) != [])
        assert sorted(answered) == [False] * 7 + [True] * 2
        # Triton counts all eight, so their time is asked: that of the first, and of what began before the cancelling.
        assert seconds_of_batch(8)[0] < 4 * seconds_of_batch(1)[0]


def test_concurrent_requests_of_different_batch_sizes_are_split_right(server: EmbeddedServer) -> None:
    images = [random_images(1 + i % 3, seed=i) for i in range(64)]
    results: list[np.ndarray | None] = [None] * len(images)

    def work(start: int) -> None:
        for i in range(start, len(images), 8):
            results[i] = infer(server, images[i])

    threads = [threading.Thread(target=work, args=(start,)) for start in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for image, result in zip(images, results, strict=True):
        np.testing.assert_array_equal(result, image[..., 0])


def test_killed_stub_is_brought_back_within_seconds(repository: Path) -> None:
    before = regions()
    with EmbeddedServer(options(repository)) as server:
        assert infer(server, random_images(1)).shape == (1, SIZE, SIZE)
        (pid,) = server.process.stubs()
        os.kill(pid, signal.SIGKILL)
        assert server.supervisor is not None
        recoveries = server.supervisor.recoveries
        wait_for(lambda: len(recoveries) == 1)
        assert recoveries[0].model == ENGINE
        image = random_images(1, seed=1)
        np.testing.assert_array_equal(infer(server, image), image[..., 0])
        began = time.monotonic()
    assert time.monotonic() - began < 8, "a recovered model must not hang the exit"
    assert regions() == before


def test_probe_alone_finds_a_dead_model(repository: Path) -> None:
    # As on a server whose processes cannot be seen: only a real inference tells.
    with EmbeddedServer(options(repository, probe_interval_s=0)) as server:
        config = server.control.config(ENGINE)
        assert server.control.probe(config, 5.0) is Health.WELL
        (pid,) = server.process.stubs()
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: server.control.probe(config, 5.0) is Health.DEAD)
        assert ENGINE in server.control.loaded_models(), "Triton still calls it ready"
        server.control.reload(ENGINE, 30.0)
        assert server.control.probe(config, 5.0) is Health.WELL
        began = time.monotonic()
        # The request to the dead stub leaked the old instance: the exit is cut short, not waited for.
        assert server.stop() == 0
        assert time.monotonic() - began < 9


def test_model_that_was_unloaded_on_purpose_stays_unloaded(repository: Path) -> None:
    with EmbeddedServer(options(repository, probe_interval_s=0.3)) as server:
        with triton.InferenceServerClient(server.address) as client:
            client.unload_model("tiny")
            client.unload_model(ENGINE)
        wait_for(lambda: server.process.stubs() == {})
        time.sleep(1.0)
        assert server.supervisor is not None
        assert server.supervisor.recoveries == []
        assert server.control.loaded_models() == []
        config = pb.ModelConfig(name=ENGINE, max_batch_size=8)
        config.input.add(name="image", data_type=pb.TYPE_UINT8, dims=[SIZE, SIZE, 3])
        assert server.control.probe(config, 5.0) is Health.ABSENT


def test_full_queue_refuses_at_once_and_probe_calls_it_busy(tmp_path: Path) -> None:
    repository = write_repository(tmp_path, delay=400, max_queue_size=1, batch=1)
    with EmbeddedServer(options(repository)) as server:
        with triton.InferenceServerClient(server.address) as client:
            statuses: list[str] = []
            done = threading.Semaphore(0)

            def finished(result: object, error: InferenceServerException | None) -> None:
                statuses.append(f"{error.status()}: {error.message()}" if error else "ok")
                done.release()

            tensor = triton.InferInput("image", (1, SIZE, SIZE, 3), "UINT8")
            tensor.set_data_from_numpy(random_images(1))
            for _ in range(12):
                client.async_infer("tiny", [tensor], finished)
            for _ in range(12):
                assert done.acquire(timeout=30)
        refused = [status for status in statuses if status != "ok"]
        assert refused, statuses
        assert all("UNAVAILABLE" in status and "Exceeds maximum queue size" in status for status in refused)
        assert "ok" in statuses


def test_requests_in_flight_finish_when_the_server_stops(tmp_path: Path) -> None:
    repository = write_repository(tmp_path, delay=800, batch=1)
    image = random_images(1, seed=3)
    with EmbeddedServer(options(repository)) as server:
        answers: list[np.ndarray] = []
        thread = threading.Thread(target=lambda: answers.append(infer(server, image, timeout_s=30.0)))
        thread.start()
        wait_for(lambda: server.control.statistics(ENGINE).executions >= 0 and thread.is_alive())
        time.sleep(0.05)
        assert server.stop() == 0
        thread.join(timeout=30)
    np.testing.assert_array_equal(answers[0], image[..., 0])


def test_request_that_is_cut_off_by_the_exit_is_said_and_counts(
    repository: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = regions()
    with EmbeddedServer(options(repository, exit_timeout_s=1.0, probe_interval_s=0)) as server:
        (pid,) = server.process.stubs()
        os.kill(pid, signal.SIGSTOP)
        errors: list[InferenceServerException] = []

        def ask() -> None:
            try:
                infer(server, random_images(1), timeout_s=30.0)
            except InferenceServerException as exc:
                errors.append(exc)

        thread = threading.Thread(target=ask)
        thread.start()
        time.sleep(0.3)
        assert server.stop() != 0
        thread.join(timeout=30)
    assert len(errors) == 1
    # Triton gives up on the stuck process after about a second itself; which of the two comes first is open.
    said = ("requests were still in flight after 1 s", f"{ENGINE}_0_0 still at work when the time was over: requests")
    assert any(text in caplog.text for text in said)
    status = Path(f"/proc/{pid}/status")
    assert not status.exists() or "\nState:\tZ" in status.read_text(), "the stuck process was left behind"
    assert regions() == before


def test_port_that_is_taken(repository: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(
            ResourceError, match=rf"cannot listen on 127\.0\.0\.1:{port}: Address already in use.*--grpc"
        ):
            EmbeddedServer(options(repository, grpc_port=port)).start()


def test_host_that_is_not_ours(repository: Path) -> None:
    with pytest.raises(ResourceError, match=r"cannot listen on 192\.0\.2\.1"):
        EmbeddedServer(options(repository, host="192.0.2.1")).start()
    with pytest.raises(ResourceError, match=r"--host no such host is not an address"):
        EmbeddedServer(options(repository, host="no such host")).start()


def test_unknown_model_is_refused_before_anything_starts(repository: Path) -> None:
    with pytest.raises(UnknownModelError, match="no model 'nothing'"):
        EmbeddedServer(options(repository, models=("nothing",))).start()


def test_unknown_flag_shows_what_triton_said(repository: Path) -> None:
    with pytest.raises(StartError, match=r"(?s)tritonserver ended while starting; its last words:.*no-such-flag"):
        EmbeddedServer(options(repository, extra_arguments=("--no-such-flag=1",))).start()


def truncate(repository: Path) -> None:
    file = repository / ENGINE / "1" / "model.onnx"
    file.write_bytes(file.read_bytes()[:40])


def change_config(repository: Path, change: Callable[[pb.ModelConfig], object]) -> None:
    path = repository / ENGINE / "config.pbtxt"
    config = text_format.Parse(path.read_text(), pb.ModelConfig())
    change(config)
    write_config(repository, config)


def ask_for_a_gpu(repository: Path) -> None:
    change_config(repository, lambda c: setattr(c.instance_group[0], "kind", pb.ModelInstanceGroup.KIND_GPU))


def rename_input(repository: Path) -> None:
    change_config(repository, lambda c: setattr(c.input[0], "name", "picture"))


def take_strings(repository: Path) -> None:
    change_config(repository, lambda c: setattr(c.input[0], "data_type", pb.TYPE_STRING))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, r"ONNX Runtime cannot load .*model\.onnx"),
        (ask_for_a_gpu, r"GPU"),
        (rename_input, r"config\.pbtxt names the input \['picture'\]; the ONNX file has \['image'\]"),
        (take_strings, r"TYPE_STRING is not supported"),
    ],
)
def test_model_that_does_not_load_says_why_and_leaves_nothing_running(
    tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    repository = write_repository(tmp_path)
    damage(repository)
    before = regions()
    with pytest.raises(ModelLoadError, match=rf"(?s)model '{ENGINE}' does not load: .*{message}"):
        EmbeddedServer(options(repository, models=(ENGINE,))).start()
    assert regions() == before


def test_wrong_output_shape_fails_the_request_and_not_the_server(tmp_path: Path) -> None:
    repository = write_repository(tmp_path)
    file = repository / ENGINE / "1" / "model.onnx"
    model = onnx.load(file)
    # The graph wants other rows than the configuration promises, so every run fails inside ONNX Runtime.
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = SIZE + 1
    onnx.save(model, file)
    with EmbeddedServer(options(repository)) as server:
        with pytest.raises(InferenceServerException, match="ONNX Runtime failed"):
            infer(server, random_images(1))
        assert server.control.loaded_models() == ["tiny", ENGINE]


def test_restricted_model_control_is_for_the_supervisor_only(repository: Path) -> None:
    restriction = "--grpc-restricted-protocol=model-repository:admin-key=secret"
    with EmbeddedServer(options(repository, extra_arguments=(restriction,))) as server:
        image = random_images(1)
        np.testing.assert_array_equal(infer(server, image), image[..., 0])
        with (
            triton.InferenceServerClient(server.address) as client,
            pytest.raises(InferenceServerException, match="This protocol is restricted"),
        ):
            client.unload_model("tiny")
        (pid,) = server.process.stubs()
        os.kill(pid, signal.SIGKILL)
        assert server.supervisor is not None
        recoveries = server.supervisor.recoveries
        wait_for(lambda: len(recoveries) == 1)


def test_methods_before_start_say_so(repository: Path) -> None:
    server = EmbeddedServer(options(repository))
    for use in (lambda: server.control, lambda: server.process):
        with pytest.raises(StartError, match="the server is not running"):
            use()
    assert server.stop() == 0
