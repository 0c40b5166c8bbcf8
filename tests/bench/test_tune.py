"""`matteserve tune` on the real server: what it finds, what it leaves as it was, and what it refuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

from matteserve_bench import Session, Setup, TuningError, read_records
from matteserve_bench.tuned_engine import TunedEngine, read_config
from matteserve_bench.tuning import Interrupted, TrialError
from matteserve_client import GrpcTransport
from matteserve_server import EmbeddedServer, ServerOptions, find_tritonserver
from matteserve_server.backend_directory import compose_backend_directory
from matteserve_server.process import TritonProcess
from support.commands import command
from support.tiny_model import SIZE, write_config, write_repository

pytestmark = pytest.mark.triton

ENGINE = "tiny_onnx_fp32"
DELAY_US = 20_000
QUICK = ("--concurrency", 4, "--duration-s", 0.3, "--warmup-s", 0, "--turns", 2, "--max-trials", 1, "--cores", 1)


def make_repository(path: Path) -> Path:
    """`tiny` waits for 20 ms for a batch that never fills; `plain` has no batcher, `many` has two instance groups."""
    for name in ("tiny", "plain", "many"):
        write_repository(path, name=name)
        config = read_config(path / f"{name}_onnx_fp32" / "config.pbtxt")
        if name == "plain":
            config.ClearField("dynamic_batching")
        else:
            config.dynamic_batching.ClearField("default_queue_policy")
            config.dynamic_batching.max_queue_delay_microseconds = DELAY_US
        if name == "many":
            config.instance_group.add(count=1, kind=pb.ModelInstanceGroup.KIND_CPU)
        write_config(path, config)
    return path


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    return make_repository(tmp_path / "repository")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    options = ServerOptions(
        make_repository(tmp_path_factory.mktemp("tune") / "repository"), grpc_port=0, metrics_port=None,
        probe_interval_s=0,
    )  # fmt: skip
    with EmbeddedServer(options) as running:
        yield running


@pytest.fixture(autouse=True)
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Records go to out/bench, here."""
    monkeypatch.chdir(tmp_path)


def tune(*arguments: object) -> dict[str, Any]:
    result = command("tune", *arguments, "--json")
    assert result.exit_code == 0, result.output
    report: dict[str, Any] = json.loads(result.stdout)
    return report


def fails(*arguments: object) -> str:
    result = command("tune", *arguments, *QUICK)
    assert isinstance(result.exception, SystemExit), result.exception  # a message, no traceback
    assert result.exit_code == 1, result.output
    return str(result.stderr)


def files(repository: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(repository.rglob("*")) if path.is_file()}


def test_it_finds_a_better_setting_on_a_server_of_its_own(repository: Path) -> None:
    before = files(repository)
    result = command("tune", "tiny", "--model-repository", repository, *QUICK, "-o", "found/t.json")
    assert result.exit_code == 0, result.output
    assert "Proposal: 1 x 1 threads, batch <= 1 (preferred), 0 us, for +" in result.stdout
    assert "-  max_queue_delay_microseconds: 20000\n+  preferred_batch_size: 1\n" in result.stdout
    assert "Nothing was written; --write does that" in result.stdout
    assert files(repository) == before
    assert f"{ENGINE}: 1 x 1 threads, batch <= 8, 20000 us (present) at concurrency 4 ..." in result.stderr
    assert "up to 1 settings in 8 measurements" in result.stderr
    assert "[8/8] " in result.stderr
    assert "note:" not in result.stderr

    report = json.loads(Path("found/t.json").read_text())
    assert report["environment"]["server"]["triton"]
    assert report["environment"]["model"]["engine_name"] == ENGINE
    assert report["changes"][0]["ratio"] > 2
    assert report["stages"][0]["trials"][0]["turns"][0]["p99_ms"] > 20
    assert report["stages"][0]["trials"][1]["turns"][0]["mean_batch"] == 1.0
    assert report["not_tried"][0]["preferred"] == [1, 2, 4]
    (records,) = Path("out/bench").iterdir()
    assert len(read_records(records)) == 9  # one before, to see how fast it is


def test_it_writes_what_it_found_and_serves_it(server: EmbeddedServer) -> None:
    path = server.options.model_repository / ENGINE / "config.pbtxt"
    before, config = path.read_text(), server.control.config(ENGINE)
    try:
        report = tune("tiny", "--address", server.address, *QUICK, "--write")
        assert report["written"]
        assert path.read_text() != before
        written = read_config(path)
        assert list(written.dynamic_batching.preferred_batch_size) == [1]
        assert written.dynamic_batching.max_queue_delay_microseconds == 0
        assert path.read_text() == text_format.MessageToString(written)
        assert list(server.control.config(ENGINE).dynamic_batching.preferred_batch_size) == [1]
        assert [p.name for p in path.parent.iterdir() if p.name.startswith(".")] == []
    finally:
        path.write_text(before)
        server.control.load(ENGINE, 60)
    assert server.control.config(ENGINE) == config


def test_a_file_that_does_not_load_is_taken_back(server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server's word is fine, the file's is not: here its backend is one that nobody has."""
    path = server.options.model_repository / ENGINE / "config.pbtxt"
    before = path.read_text()
    broken = before.replace('backend: "onnxruntime"', 'backend: "nobody"  # mine')
    path.write_text(broken)
    try:
        result = command("tune", "tiny", "--address", server.address, *QUICK, "--write")
        assert result.exit_code == 1
        assert "does not load" in result.stderr
        assert path.read_text() == broken
        assert answers(server)
    finally:
        path.write_text(before)
        server.control.load(ENGINE, 60)


def answers(server: EmbeddedServer) -> bool:
    import numpy as np

    transport = GrpcTransport(server.address)
    try:
        return bool(transport.infer("tiny", np.zeros((1, SIZE, SIZE, 3), np.uint8), timeout_s=20).result() is not None)
    finally:
        transport.close()


def test_open_load(server: EmbeddedServer) -> None:
    """At 200 a second no batch fills: without the wait the latency is less and the throughput the same."""
    options = ("--duration-s", 0.3, "--warmup-s", 0, "--turns", 2, "--max-trials", 1, "--cores", 1)
    report = tune("tiny", "--address", server.address, "--rate", 200, *options)
    assert report["load"]["mode"] == "open"
    present, without = (trial["turns"] for trial in report["stages"][0]["trials"])
    assert min(turn["p50_ms"] for turn in present) > min(turn["p50_ms"] for turn in without)
    assert not report["written"]


@pytest.mark.parametrize("failure", [None, ValueError, KeyboardInterrupt, Interrupted])
def test_the_engine_is_put_back(server: EmbeddedServer, failure: type[BaseException] | None) -> None:
    before = server.control.config(ENGINE)
    with (
        pytest.raises(failure) if failure else ExitStack(),
        Session(Setup(server.address, "tiny")) as session,
        TunedEngine(session, cores=1) as engine,
    ):
        load = session.setup.load(mode="closed", concurrency=2, duration_s=0.2, warmup_s=0.0, max_windows=3)
        other = engine.present.__class__(2, 1, 16, (), 0)
        engine.measure(other, load)
        assert engine._processes() == 2  # the old instance's is gone
        found = server.control.config(ENGINE)
        assert (found.max_batch_size, found.instance_group[0].count) == (16, 2)
        assert found.dynamic_batching.max_queue_delay_microseconds == 0
        if failure is Interrupted:
            session.stop.set()
            engine.measure(engine.present, load)
        if failure is not None:
            raise failure("in the middle")
    assert server.control.config(ENGINE) == before
    assert answers(server)


def test_what_was_put_back_does_not_hide_a_change_of_the_file(server: EmbeddedServer) -> None:
    with Session(Setup(server.address, "tiny")) as session, TunedEngine(session, cores=1) as engine:
        load = session.setup.load(mode="closed", concurrency=2, duration_s=0.2, warmup_s=0.0, max_windows=3)
        engine.measure(engine.present.__class__(1, 1, 8, (), 0), load)
    path = server.options.model_repository / ENGINE / "config.pbtxt"
    before = path.read_text()
    try:
        path.write_text(before.replace(str(DELAY_US), "123"))
        server.control.load(ENGINE, 60)
        assert server.control.config(ENGINE).dynamic_batching.max_queue_delay_microseconds == 123
    finally:
        path.write_text(before)
        server.control.load(ENGINE, 60)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_search_puts_the_engine_back(server: EmbeddedServer, number: signal.Signals) -> None:
    before, on_disk = server.control.config(ENGINE), files(server.options.model_repository)
    arguments = ["tune", "tiny", "--address", server.address, "--duration-s", "0.5", "--warmup-s", "0", "--write"]
    with subprocess.Popen(
        [sys.executable, "-m", "matteserve_client._cli", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        deadline = time.monotonic() + 60
        while server.control.config(ENGINE) == before:  # until it has another setting
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(number)
        output, progress = process.communicate(timeout=30)
    assert process.returncode == 130, progress
    assert "Interrupted: no proposal" in output
    assert server.control.config(ENGINE) == before
    assert files(server.options.model_repository) == on_disk


def test_a_setting_that_does_not_load_leaves_the_old_one(server: EmbeddedServer) -> None:
    with Session(Setup(server.address, "tiny")) as session, TunedEngine(session, cores=1) as engine:
        load = session.setup.load(mode="closed", concurrency=2, duration_s=0.2, warmup_s=0.0, max_windows=3)
        engine.measure(engine.present, load)
        with pytest.raises(TrialError, match=f"model '{ENGINE}' does not load"):
            engine.measure(engine.present.__class__(1, 1, 8, (64,), 0), load)  # larger than the largest batch
        engine.measure(engine.present, load)
        with pytest.raises(TrialError, match=r"needs about \d+ MiB besides what is loaded, \d+ MiB are available"):
            engine.measure(engine.present.__class__(10**6, 1, 8, (), 0), load)
    assert answers(server)


def test_a_setting_whose_requests_fail_is_a_failed_trial(server: EmbeddedServer) -> None:
    with Session(Setup(server.address, "tiny", timeout_s=0.01)) as session, TunedEngine(session, cores=1) as engine:
        load = session.setup.load(mode="closed", concurrency=2, duration_s=0.3, warmup_s=0.0, max_windows=3)
        with pytest.raises(TrialError, match="no answer"):
            engine.measure(engine.present, load)  # which waits for 20 ms


def test_a_fixed_number_of_threads_is_seen(repository: Path) -> None:
    options = ServerOptions(repository, ("tiny",), grpc_port=0, metrics_port=None, threads=2)
    with (
        EmbeddedServer(options) as fixed,
        Session(Setup(fixed.address, "tiny")) as session,
        TunedEngine(session) as engine,
    ):
        assert "the server was started with 2 threads for every engine" in engine.notes[0]
        assert engine.present.threads is None
        assert engine.space(most_waiting=8).layouts(engine.present) == []


def test_what_cannot_be_tuned(server: EmbeddedServer, repository: Path, tmp_path: Path) -> None:
    address = ("--address", server.address)
    assert "no model 'nothing' in" in fails("nothing", "--model-repository", repository)
    assert "model 'nothing': not loaded" in fails("nothing", *address)
    assert "engine 'plain_onnx_fp32' has no dynamic batching" in fails("plain", *address)
    assert "engine 'many_onnx_fp32' has 2 instance groups" in fails("many", *address)
    (tmp_path / "empty").mkdir()
    assert f"has no {ENGINE}/config.pbtxt" in fails("tiny", *address, "--model-repository", tmp_path / "empty")
    (repository / ENGINE).rename(tmp_path / "gone")
    assert f"alias 'tiny' in {repository} points at {ENGINE}, which is not there" in fails(
        "tiny", "--model-repository", repository
    )
    (repository / ENGINE).mkdir()
    (repository / ENGINE / "config.pbtxt").write_text("nonsense {")
    assert "is --model-repository the one that the server reads?" in fails(
        "tiny", *address, "--model-repository", repository
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rate", "5", "--concurrency", "8"], "--rate is open load, --concurrency closed load"),
        (["--rate", "0"], "rate is 0.0"),
        (["--duration-s", "0"], "duration_s is 0.0"),
        (["--control-key", "secret"], "--control-key must be NAME=VALUE"),
        (["--turns", "1"], "1 is not in the range x>=2"),
    ],
)
def test_usage_errors(arguments: list[str], message: str) -> None:
    result = command("tune", "tiny", *arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr


def test_a_repository_that_cannot_be_written_is_said_before(
    server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = ("--address", server.address, "--write")
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda *_: False)
        assert f"{ENGINE} cannot be written to" in fails("tiny", *address)
    # As for a server in a container: it listens here, and its command line is not to be seen.
    monkeypatch.setattr(psutil.Process, "cmdline", lambda _: [])
    assert "the repository of 127.0.0.1" in fails("tiny", *address)
    report = tune("tiny", "--address", server.address, *QUICK)
    assert report["diff"].startswith(f"--- {ENGINE}/config.pbtxt\n")


def test_a_restricted_server_wants_its_key(repository: Path) -> None:
    restriction = "--grpc-restricted-protocol=model-repository:admin-key=secret"
    options = ServerOptions(
        repository, ("tiny",), grpc_port=0, metrics_port=None, probe_interval_s=0, extra_arguments=(restriction,)
    )
    with EmbeddedServer(options) as restricted:
        assert "give --control-key admin-key=VALUE" in fails("tiny", "--address", restricted.address)
        report = tune("tiny", "--address", restricted.address, *QUICK, "--control-key", "admin-key=secret")
        assert report["proposal"] is not None


def test_a_server_without_model_control(repository: Path) -> None:
    for name in ("plain", "many"):
        (repository / f"{name}_onnx_fp32" / "config.pbtxt").unlink()
    binary = find_tritonserver()
    with ExitStack() as stack:
        backends = Path(stack.enter_context(TemporaryDirectory()))
        compose_backend_directory(binary, backends)
        with EmbeddedServer(ServerOptions(repository, ("tiny",), grpc_port=0, metrics_port=None)) as free:
            port = free.options.grpc_port
        options = ServerOptions(repository, grpc_port=port, metrics_port=None)
        arguments = options.command(binary, backend_directory=backends, shm_prefix="matteserve-test-")
        arguments = [a.replace("=explicit", "=none") for a in arguments] + ["--exit-on-error=false"]
        process = TritonProcess(arguments, binary.environment(), "matteserve-test-")
        stack.callback(process.stop, 10.0)
        deadline = time.monotonic() + 60
        while (
            "not loaded" in (message := fails("tiny", "--address", f"127.0.0.1:{port}")) or "is `matteserve" in message
        ):
            assert time.monotonic() < deadline
            assert process.poll() is None
        assert "does not let engines be loaded with another configuration" in message
        assert "start it with --model-control-mode=explicit" in message


def test_a_failed_restoration_says_what_serves(server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    before = server.control.config(ENGINE)
    with Session(Setup(server.address, "tiny")) as session:
        engine = TunedEngine(session, cores=1)
        load = session.setup.load(mode="closed", concurrency=2, duration_s=0.2, warmup_s=0.0, max_windows=3)
        engine.measure(engine.present.__class__(1, 1, 8, (1,), 0), load)
        with monkeypatch.context() as patch:
            patch.setattr(engine._control, "config", lambda _: None)
            with pytest.raises(TuningError, match="says another configuration than before"):
                engine.restore()
        kept, engine._timeout_s = engine._timeout_s, -1.0
        with pytest.raises(TuningError, match=r"could not be put back .* serves with 1 x 1 threads, batch <= 1 \(pref"):
            engine.restore()
        engine._timeout_s = kept
        with engine:
            pass
    assert server.control.config(ENGINE) == before
