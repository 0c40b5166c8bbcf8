"""Swapping engines on the real server under load: nothing lost, nothing foreign answered, nothing left half done.

The engines are told apart by their answers: `onnx_fp32` gives the picture's red channel, `onnx_fp16` the green one.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import pytest
from google.protobuf import text_format
from PIL import Image
from tritonclient.grpc import model_config_pb2 as pb

from matteserve_client import AlphaTolerance, ContractError, GrpcTransport, MatteserveError
from matteserve_server import (
    ControlError,
    EmbeddedServer,
    EngineMismatchError,
    ModelLoadError,
    RepositoryError,
    RolledBackError,
    ServerOptions,
    SwapBusyError,
    SwapError,
    UnknownModelError,
    VerificationError,
)
from matteserve_server.alias import target_of
from matteserve_server.repository import read_model
from matteserve_server.swap_state import LOCK_FILE, STATE_FILE, lock, read_journal
from matteserve_server.swapping import STEPS, Swap, SwapOptions, rollback, swap
from support.commands import command
from support.engines import LOOSE, add_engine, write_manifest
from support.tiny_model import SIZE, write_config, write_repository

pytestmark = pytest.mark.triton

RED, GREEN = "tiny_onnx_fp32", "tiny_onnx_fp16"
CHANNELS = {RED: 0, GREEN: 1}
IMAGE = np.random.default_rng(0).integers(0, 256, (1, SIZE, SIZE, 3), np.uint8)


def make_repository(path: Path) -> Path:
    write_repository(path)
    add_engine(path, "onnx_fp16", channel=1)
    return path


def server_for(repository: Path, *extra: str) -> EmbeddedServer:
    return EmbeddedServer(
        ServerOptions(repository, grpc_port=0, metrics_port=None, exit_timeout_s=10.0, extra_arguments=extra)
    )


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    return make_repository(tmp_path / "repository")


@pytest.fixture(scope="module")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    with server_for(make_repository(tmp_path_factory.mktemp("shared") / "repository")) as running:
        yield running


@pytest.fixture
def server(shared_server: EmbeddedServer) -> Iterator[EmbeddedServer]:
    """A server whose alias points at the red engine before the test, and afterwards."""
    yield shared_server
    folder = shared_server.options.model_repository / "tiny"
    if on_disk(shared_server) != RED:
        rollback("tiny", options(shared_server))
    assert shared_server.control.loaded_models() == ["tiny", RED]
    (folder / STATE_FILE).unlink(missing_ok=True)


def options(server: EmbeddedServer, **changes: object) -> SwapOptions:
    defaults = {
        "address": server.address,
        "model_repository": server.options.model_repository,
        "watch_s": 0.0,
        "quiet_s": 0.1,
    }
    return SwapOptions(**{**defaults, **changes})  # type: ignore[arg-type]


def answering(server: EmbeddedServer, model: str = "tiny") -> str:
    """Which engine answers, by its answer."""
    transport = GrpcTransport(server.address)
    try:
        return which(transport.infer(model, IMAGE, timeout_s=20).result())
    finally:
        transport.close()


def which(alpha: np.ndarray) -> str:
    return next((name for name, c in CHANNELS.items() if np.array_equal(alpha, IMAGE[..., c])), "somebody else")


def on_disk(server: EmbeddedServer) -> str:
    return target_of(read_model(server.options.model_repository / "tiny").config)


class Clients:
    """Requests to the alias, many at once, until the block ends; every answer is counted by who gave it."""

    def __init__(self, server: EmbeddedServer, threads: int = 3, window: int = 8) -> None:
        self.answers: Counter[str] = Counter()
        self.failures: list[str] = []
        self._address, self._window = server.address, window
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._run) for _ in range(threads)]

    def __enter__(self) -> Clients:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join(timeout=60)

    @property
    def total(self) -> int:
        return sum(self.answers.values()) + len(self.failures)

    def _run(self) -> None:
        transport = GrpcTransport(self._address)
        pending: deque = deque()
        while not self._ended.is_set() or pending:
            while len(pending) < self._window and not self._ended.is_set():
                pending.append(transport.infer("tiny", IMAGE, timeout_s=60))
            if not pending:
                break
            try:
                who = which(pending.popleft().result())
            except MatteserveError as exc:
                with self._lock:
                    self.failures.append(str(exc))
            else:
                with self._lock:
                    self.answers[who] += 1
        transport.close()


def test_twenty_swaps_and_rollbacks_lose_no_request(server: EmbeddedServer) -> None:
    moved = []
    with Clients(server) as clients:
        for _ in range(10):
            moved.append(swap("tiny", "onnx_fp16", options(server)))
            assert answering(server) == GREEN
            moved.append(rollback("tiny", options(server)))
            assert answering(server) == RED
        deadline = time.monotonic() + 60
        while clients.total < 5000:
            assert time.monotonic() < deadline, clients.total
            time.sleep(0.1)
    assert clients.failures == []
    assert set(clients.answers) == {RED, GREEN}, "every answer belongs to one of the two"
    assert min(clients.answers.values()) > 100
    assert [result.unloaded for result in moved] == [[RED], [GREEN]] * 10
    assert server.supervisor is not None
    assert server.supervisor.recoveries == [], "the supervisor took a swap for an accident"


def test_swap_reports_what_it_did_and_survives_a_restart(repository: Path) -> None:
    with server_for(repository) as server:
        result = swap("tiny", "onnx_fp16", options(server))
        assert (result.source, result.target, result.changed, result.persistent) == (RED, GREEN, True, True)
        assert list(result.seconds) == list(STEPS)
        assert result.difference is not None
        assert result.difference.images == 4
        assert result.unloaded == [RED]
        assert json.loads(json.dumps(result.to_dict()))["target"] == GREEN
        parameters = server.control.config("tiny").parameters
        assert parameters["matteserve.precision"].string_value == "fp16"
        again = swap("tiny", "onnx_fp16", options(server))
        assert not again.changed
    with server_for(repository) as server:
        assert answering(server) == GREEN
        assert server.control.loaded_models() == ["tiny", GREEN]
        assert rollback("tiny", options(server)).target == RED
        assert answering(server) == RED
        with pytest.raises(SwapError, match=r"has no engine to roll back to.*matteserve swap tiny --to"):
            rollback("tiny", options(server))
    journal = read_journal(repository / "tiny")
    assert [(entry["kind"], entry["outcome"]) for entry in journal.history] == [("swap", "done"), ("rollback", "done")]


def test_old_engine_stays_when_asked_or_when_somebody_uses_it(repository: Path) -> None:
    other = text_format.Parse((repository / "tiny" / "config.pbtxt").read_text(), pb.ModelConfig())
    other.name = "other"
    (repository / "other" / "1").mkdir(parents=True)
    write_config(repository, other)
    with server_for(repository) as server:
        result = swap("tiny", "onnx_fp16", options(server))
        assert result.unloaded == []
        assert result.notes == [f"{RED} stays loaded: other points at it"]
        assert (answering(server), answering(server, "other")) == (GREEN, RED)
        rollback("tiny", options(server, keep_old=True))
        assert GREEN in server.control.loaded_models()
        with calls_to(server, GREEN):
            swap("tiny", "onnx_fp16", options(server))
            notes = rollback("tiny", options(server, quiet_s=1.0)).notes
            assert notes == [f"{GREEN} stays loaded: somebody calls it by its own name"]


@contextmanager
def calls_to(server: EmbeddedServer, engine: str) -> Iterator[None]:
    """Somebody who calls an engine by its own name."""
    ended = threading.Event()

    def run() -> None:
        transport = GrpcTransport(server.address)
        while not ended.is_set():
            transport.infer(engine, IMAGE, timeout_s=20).result()
        transport.close()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


BROKEN = {
    "does_not_load": (ModelLoadError, "does not load.*ONNX Runtime cannot load"),
    "wrong_answers": (VerificationError, r"does not answer what 'tiny_onnx_fp32' answers.*max_abs .*/255 is above"),
    "black": (VerificationError, "masks are flat where the reference's are not"),
    "fails": (MatteserveError, "ONNX Runtime failed"),
    "other_size": (SwapError, "cannot stand behind 'tiny': height 31 instead of 32"),
    "other_numerics": (SwapError, "cannot stand behind 'tiny': numerics rembg instead of reference"),
    "smaller_batch": (SwapError, "takes batches of 4, clients were promised 8"),
    "not_ours": (ContractError, "contract version none"),
    "cut_off": (EngineMismatchError, r"model\.onnx has 10 bytes, its manifest says [\d,]+: it was cut off"),
    "another_file": (EngineMismatchError, "is not the file that was built: its sha256 is"),
    "no_file": (RepositoryError, r"has no model\.onnx"),
}


def break_engine(repository: Path, how: str) -> None:
    """Write the engine `onnx_int8`, broken."""
    strict = {"max_abs": 0.1, "p999_abs": 0.1, "mean_abs": 0.1, "min_iou": 0.5}
    folder = add_engine(repository, "onnx_int8", channel=1, tolerance=strict if how == "wrong_answers" else LOOSE)
    file = folder / "1" / "model.onnx"
    described = {"name": file.name, "sha256": "0" * 64, "bytes": file.stat().st_size}
    config = read_model(folder).config
    if how == "does_not_load":
        file.write_bytes(file.read_bytes()[:40])
    elif how == "black":
        add_operator(file, "Sub")
    elif how == "fails":
        change_input(file)
    elif how == "other_size":
        config.input[0].dims[0] = config.output[0].dims[0] = SIZE - 1
    elif how == "other_numerics":
        config.parameters["matteserve.numerics"].string_value = "rembg"
    elif how == "smaller_batch":
        config.max_batch_size = 4
    elif how == "not_ours":
        config.parameters.clear()
    elif how == "no_file":
        file.unlink()
    elif how in ("cut_off", "another_file"):
        write_manifest(folder, tolerance=LOOSE, file=described)
        if how == "cut_off":
            file.write_bytes(b"0123456789")
    write_config(repository, config)


def add_operator(file: Path, kind: str) -> None:
    """Subtract the answer from itself."""
    model = onnx.load(file)
    model.graph.node[-1].output[0] = "level"
    model.graph.node.append(onnx.helper.make_node(kind, ["level", "level"], ["alpha"]))
    onnx.save(model, file)


def change_input(file: Path) -> None:
    """Ask for a height that nobody sends."""
    model = onnx.load(file)
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = SIZE + 1
    onnx.save(model, file)


def test_swap_to_a_broken_engine_leaves_the_old_one_serving(server: EmbeddedServer) -> None:
    repository = server.options.model_repository
    with Clients(server, threads=1) as clients:
        for how, (error, message) in BROKEN.items():
            break_engine(repository, how)
            with pytest.raises(error, match=f"(?s){message}"):
                swap("tiny", "onnx_int8", options(server))
            assert (answering(server), on_disk(server)) == (RED, RED), how
            assert server.control.loaded_models() == ["tiny", RED], how
            assert read_journal(repository / "tiny").pending is None
            shutil.rmtree(repository / "tiny_onnx_int8")
    assert clients.failures == []
    assert set(clients.answers) == {RED}


@pytest.mark.parametrize("trouble", ["failures", "drift"])
def test_watch_moves_the_alias_back(server: EmbeddedServer, request: pytest.FixtureRequest, trouble: str) -> None:
    repository = server.options.model_repository
    file = repository / GREEN / "1" / "model.onnx"
    sound = file.read_bytes()
    request.addfinalizer(lambda: file.write_bytes(sound))  # the server is shared

    def spoil(step: str) -> None:
        """While it is watched, the engine is replaced under the server by one that is not what was verified."""
        if step == "watch":
            if trouble == "failures":
                change_input(file)
            else:
                add_operator(file, "Sub")
            server.control.load(GREEN, 30.0)

    with (
        Clients(server, threads=1),  # somebody must notice
        Swap("tiny", options(server, watch_s=5.0), on_step=spoil) as operation,
        pytest.raises(RolledBackError, match=rf"(?s)(failed|drifted).*{RED!r} serves"),
    ):
        operation.to("onnx_fp16")
    assert (answering(server), on_disk(server)) == (RED, RED)
    assert GREEN not in server.control.loaded_models()
    assert read_journal(repository / "tiny").history[-1]["outcome"] == "moved back at watch"


def test_full_disk_leaves_the_old_engine(server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = server.options.model_repository / "tiny"

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fill(step: str) -> None:
        if step == "write":
            monkeypatch.setattr(os, "fsync", full)

    with (
        Swap("tiny", options(server), on_step=fill) as operation,
        pytest.raises(SwapError, match=r"cannot write .*config\.pbtxt: No space left on device.*_fp32' serves"),
    ):
        operation.to("onnx_fp16")
    monkeypatch.undo()
    assert (answering(server), on_disk(server)) == (RED, RED)
    assert [path.name for path in folder.iterdir() if path.name.endswith(".tmp")] == []
    with pytest.raises(SwapError, match="no engine to roll back to"):  # and tidies up what the journal could not say
        rollback("tiny", options(server))
    assert read_journal(folder).pending is None


def test_interrupt_while_watching_moves_the_alias_back(server: EmbeddedServer) -> None:
    def interrupt(step: str) -> None:
        if step == "watch":
            raise KeyboardInterrupt

    with Swap("tiny", options(server), on_step=interrupt) as operation, pytest.raises(KeyboardInterrupt):
        operation.to("onnx_fp16")
    assert (answering(server), on_disk(server)) == (RED, RED)


def test_server_that_dies_while_it_is_watched_restarts_with_the_old_engine(repository: Path) -> None:
    with server_for(repository) as server:

        def kill(step: str) -> None:
            if step == "watch":
                server.process.kill()

        with (
            Swap("tiny", options(server), on_step=kill) as operation,
            pytest.raises(RolledBackError, match=r"(?s)moving it back to 'tiny_onnx_fp32' failed too: loading the"),
        ):
            operation.to("onnx_fp16")
    assert target_of(read_model(repository / "tiny").config) == RED
    assert read_journal(repository / "tiny").pending is None


def test_state_that_cannot_be_used_is_explained(server: EmbeddedServer, repository: Path) -> None:
    folder = server.options.model_repository / "tiny"
    (folder / STATE_FILE).write_text("{")
    with pytest.raises(RepositoryError, match=r"swap\.json is not a journal of swaps .*remove it, which only forgets"):
        swap("tiny", "onnx_fp16", options(server))
    (folder / STATE_FILE).unlink()
    (repository / "tiny" / LOCK_FILE).mkdir()
    with pytest.raises(RepositoryError, match=r"cannot write .*swap\.lock: Is a directory; run as a user who may"):
        swap("tiny", "onnx_fp16", options(server, model_repository=repository))


KILLED = """
import os, signal, sys
from pathlib import Path
from matteserve_server.swapping import Swap, SwapOptions
address, repository, kind, at = sys.argv[1:]
def on_step(step):
    if step == at:
        os.kill(os.getpid(), signal.SIGKILL)
with Swap("tiny", SwapOptions(address, Path(repository), watch_s=0, quiet_s=0.1), on_step=on_step) as operation:
    operation.to("onnx_fp16") if kind == "swap" else operation.back()
"""


def kill_at(server: EmbeddedServer, kind: str, step: str) -> None:
    repository = server.options.model_repository
    command = [sys.executable, "-c", KILLED, server.address, str(repository), kind, step]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == -9, result.stderr


@pytest.mark.parametrize("step", STEPS)
def test_swap_that_is_killed_at_any_step_is_finished_or_undone(server: EmbeddedServer, step: str) -> None:
    written = step in ("switch", "watch", "unload")
    with Clients(server, threads=1) as clients:
        kill_at(server, "swap", step)
        # A server that starts now serves one of the two.
        with server_for(server.options.model_repository) as restarted:
            assert answering(restarted) == (GREEN if written else RED)
            restarted.process.kill()  # saves two seconds
        assert answering(server) == (GREEN if step in ("watch", "unload") else RED)
        # The next command settles it, whichever it is; then everything is as if nothing had happened.
        if written:
            result = rollback("tiny", options(server))
            assert (result.source, result.target) == (GREEN, RED)
        else:
            with pytest.raises(SwapError, match="no engine to roll back to"):
                rollback("tiny", options(server))
        assert (answering(server), on_disk(server)) == (RED, RED)
        assert server.control.loaded_models() == ["tiny", RED]
        journal = read_journal(server.options.model_repository / "tiny")
        assert (journal.pending, journal.previous) == (None, [])
    assert clients.failures == []
    assert set(clients.answers) <= {RED, GREEN}


@pytest.mark.parametrize("step", ["load", "switch"])
def test_rollback_that_is_killed_is_finished_or_undone(server: EmbeddedServer, step: str) -> None:
    swap("tiny", "onnx_fp16", options(server))
    kill_at(server, "rollback", step)
    if step == "load":  # undone: there still is something to roll back to
        assert rollback("tiny", options(server)).target == RED
    else:  # finished by whatever comes next
        assert not swap("tiny", "onnx_fp32", options(server)).changed
    assert (answering(server), on_disk(server)) == (RED, RED)
    assert server.control.loaded_models() == ["tiny", RED]
    assert read_journal(server.options.model_repository / "tiny").previous == []


def test_second_swap_at_once_is_told_who_is_first(server: EmbeddedServer) -> None:
    with (
        lock(server.options.model_repository / "tiny", "swap to onnx_int8 of tiny"),
        pytest.raises(SwapBusyError, match=r"another swap of 'tiny' is going on: swap to onnx_int8 .* process \d+ on"),
    ):
        swap("tiny", "onnx_fp16", options(server))
    assert swap("tiny", "onnx_fp16", options(server)).changed


def test_unknown_names_list_what_there_is(server: EmbeddedServer) -> None:
    with pytest.raises(UnknownModelError, match=r"'tiny' has no engine 'tiny_trt_fp16'; it has tiny_onnx_fp16, tiny_o"):
        swap("tiny", "trt_fp16", options(server))
    with pytest.raises(UnknownModelError, match=r"has no engine 'tiny_trt_fp16'"):
        swap("tiny", "trt_fp16", options(server, model_repository=None))
    with pytest.raises(UnknownModelError, match=r"no model 'u3net' in .*--server-only"):
        swap("u3net", "onnx_fp16", options(server))
    with pytest.raises(UnknownModelError, match=r"has not loaded 'u3net'; it has tiny, tiny_onnx_fp32"):
        swap("u3net", "onnx_fp16", options(server, model_repository=None))
    with pytest.raises(RepositoryError, match=r"'tiny_onnx_fp32' is an engine itself; only an alias"):
        swap(RED, "onnx_fp16", options(server))
    with pytest.raises(SwapError, match="has no pictures to verify with"):
        swap("tiny", "onnx_fp16", options(server, images=server.options.model_repository))
    assert server.control.loaded_models() == ["tiny", RED]


def test_repository_of_another_server_is_noticed_and_left_as_it_was(server: EmbeddedServer, tmp_path: Path) -> None:
    elsewhere = make_repository(tmp_path / "elsewhere")
    before = (elsewhere / "tiny" / "config.pbtxt").read_bytes()
    with pytest.raises(SwapError, match=r"it reads another repository than .*elsewhere.*'tiny_onnx_fp32' serves"):
        swap("tiny", "onnx_fp16", options(server, model_repository=elsewhere))
    assert target_of(read_model(elsewhere / "tiny").config) == RED
    assert text_format.Parse(before, pb.ModelConfig()) == read_model(elsewhere / "tiny").config
    assert answering(server) == RED


def test_server_alone_is_swapped_until_it_restarts(server: EmbeddedServer) -> None:
    alone = options(server, model_repository=None, tolerance=AlphaTolerance(**LOOSE))
    with Clients(server, threads=1) as clients:
        result = swap("tiny", "onnx_fp16", alone)
        assert (result.persistent, result.unloaded) == (False, [RED])
        assert (answering(server), on_disk(server)) == (GREEN, RED)
        # Nothing on disk has changed, so the server would not look at it again by itself.
        back = rollback("tiny", alone)
        assert (back.source, back.target, back.changed, back.unloaded) == (GREEN, RED, True, [GREEN])
        assert answering(server) == RED
    assert clients.failures == []


def test_swaps_of_the_server_alone_are_undone_one_by_one(server: EmbeddedServer) -> None:
    alone = options(server, model_repository=None, tolerance=AlphaTolerance(**LOOSE))
    swap("tiny", "onnx_fp16", alone)
    swap("tiny", "onnx_fp32", alone)
    assert [rollback("tiny", alone).target for _ in range(3)] == [GREEN, RED, RED]
    swap("tiny", "onnx_fp16", alone)
    with pytest.raises(SwapError, match=r"points at 'tiny_onnx_fp16' in the server and at 'tiny_onnx_fp32' in"):
        swap("tiny", "onnx_fp16", options(server))
    assert rollback("tiny", alone).target == RED


def test_restricted_control_needs_the_right_key(repository: Path) -> None:
    with server_for(repository, "--grpc-restricted-protocol=model-repository:admin-key=secret") as server:
        with pytest.raises(ControlError, match=r"the key is missing: give --control-key admin-key=VALUE"):
            swap("tiny", "onnx_fp16", options(server))
        with pytest.raises(ControlError, match=r"the key was refused: give --control-key admin-key=VALUE"):
            swap("tiny", "onnx_fp16", options(server, control_key="admin-key=guess"))
        assert (answering(server), on_disk(server)) == (RED, RED)
        assert swap("tiny", "onnx_fp16", options(server, control_key="admin-key=secret")).target == GREEN
        assert answering(server) == GREEN


def test_server_that_is_not_there(repository: Path) -> None:
    with pytest.raises(ControlError, match=r"127\.0\.0\.1:9 cannot be controlled"):
        swap("tiny", "onnx_fp16", SwapOptions("127.0.0.1:9", repository))


def test_engine_whose_process_was_replaced_is_swapped_all_the_same(server: EmbeddedServer) -> None:
    server.control.reload(RED, 30.0)  # as the supervisor does: the server holds a configuration that no file has
    with Clients(server, threads=1) as clients:
        assert swap("tiny", "onnx_fp16", options(server)).unloaded == [RED]
        server.control.reload(GREEN, 30.0)
        assert rollback("tiny", options(server)).unloaded == [GREEN]
    assert clients.failures == []


def test_commands_say_what_they_do(server: EmbeddedServer, tmp_path: Path) -> None:
    where = ("--address", server.address, "--model-repository", server.options.model_repository)
    Image.fromarray(IMAGE[0]).save(tmp_path / "picture.png")
    dry = command("swap", "tiny", "--to", "onnx_fp16", *where, "--dry-run")
    assert dry.exit_code == 0, dry.output
    assert dry.stdout.startswith(f"tiny points at {RED}; a swap to {GREEN} would go through\n")
    assert "  verify  comparing it with tiny_onnx_fp32\n  write   writing the alias\n" in dry.stdout
    assert (answering(server), (server.options.model_repository / "tiny" / STATE_FILE).exists()) == (RED, False)

    done = command("swap", "tiny", "--to", "onnx_fp16", *where, "--watch-s", "0.1", "--images", tmp_path)
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith(f"tiny now points at {GREEN} (before: {RED})\n  answers differ by max ")
    assert " on 1 images" in done.stdout
    assert done.stderr.split() == [word for step in STEPS for word in (step, "...")]
    again = command("swap", "tiny", "--to", "onnx_fp16", *where)
    assert again.stdout == f"tiny points at {GREEN} already\n"

    back = command("rollback", "tiny", *where, "--json")
    assert json.loads(back.stdout)["target"] == RED
    nothing = command("rollback", "tiny", *where)
    assert nothing.exit_code == 1
    assert "Error: 'tiny' has no engine to roll back to" in nothing.stderr


def test_command_without_a_repository_changes_the_server_and_says_so(
    server: EmbeddedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = command("swap", "tiny", "--to", "onnx_fp16", "--address", server.address, "--dry-run")
    assert result.exit_code == 0, result.output
    assert "only the running server is changed, and a restart undoes it" in result.stderr
    assert "write" not in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--control-key", "secret"], "control_key must be NAME=VALUE"),
        (["--watch-s", "-1"], "-1.0 is not in the range x>=0"),
        (["--images", "nowhere"], "Directory 'nowhere' does not exist"),
    ],
)
def test_commands_explain_wrong_options(arguments: list[str], message: str) -> None:
    result = command("swap", "tiny", "--to", "onnx_fp16", "--server-only", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr


def test_help_has_examples() -> None:
    for name in ("swap", "rollback", "doctor"):
        assert f"Examples:\n    matteserve {name}" in command(name, "--help").stdout
