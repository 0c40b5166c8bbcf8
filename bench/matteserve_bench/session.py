"""Running loads: warm-up, windows until three agree, drain; records written as they come, also when interrupted."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from types import FrameType
from typing import Any
from urllib.parse import urlsplit

from matteserve_bench._errors import TargetError
from matteserve_bench.environment import describe_environment
from matteserve_bench.generator import ClosedLoop, LoadGenerator, OpenLoop
from matteserve_bench.observer import Observer
from matteserve_bench.pacing import arrival_times
from matteserve_bench.payloads import PICTURE_SIZE, POOL_SIZE, load_pictures, tensors_of
from matteserve_bench.records import WINDOWS, Load, Record, RecordWriter, Run, TransportName, What, Window
from matteserve_bench.targets import ImageTarget, SharedMemoryTarget, Target, TensorTarget
from matteserve_bench.triton import TritonServer
from matteserve_bench.validity import is_stable
from matteserve_client import ModelContract

_TICK_S = 0.25
_DRAIN_AFTER_INTERRUPT_S = 2.0
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Setup:
    """What load is sent to, and how.

    Attributes:
        address: `host:port` of the server's gRPC endpoint.
        model: Model to call, an alias or an engine.
        what: See `Load`.
        transport: See `Load`.
        rows: Images in a request.
        channels: gRPC connections.
        images: Folder with pictures to send; None generates some.
        pool: Distinct pictures.
        metrics_url: Page with the server's metrics; None takes port 8002 of its host.
        timeout_s: Limit of each request.
    """

    address: str = "127.0.0.1:8001"
    model: str = ""
    what: What = "tensors"
    transport: TransportName = "grpc"
    rows: int = 1
    channels: int = 2
    images: Path | None = None
    pool: int = POOL_SIZE
    metrics_url: str | None = None
    timeout_s: float = 60.0

    def __post_init__(self) -> None:
        if self.what == "images" and (self.transport != "grpc" or self.rows != 1):
            raise ValueError("whole pictures go one by one through the client, over gRPC; leave out transport and rows")

    def load(self, **values: Any) -> Load:
        """A load on this setup."""
        return Load(
            model=self.model, what=self.what, transport=self.transport, rows=self.rows, timeout_s=self.timeout_s,
            **values,
        )  # fmt: skip


class Session:
    """A connection to a server under load; one thread uses it. Close it, or use it in a `with` block.

    Args:
        setup: What load is sent to.
        stop: When set, the load in progress ends at once and is recorded as interrupted.
        progress: Called with lines for people.

    Raises:
        ServerUnavailableError: No connection.
        ModelNotFoundError: The model is not loaded.
        ContractError: The model was not written by matteserve.
        TargetError: The server does not take the load in this way.
    """

    def __init__(self, setup: Setup, *, stop: threading.Event | None = None, progress: Progress | None = None) -> None:
        self.setup = setup
        self.stop = stop or threading.Event()
        self.progress: Progress = progress or (lambda line: None)
        self.server = TritonServer(setup.address)
        self._targets: dict[int, Target] = {}
        try:
            self.contract: ModelContract = self.server.contract(setup.model)
            if setup.rows > self.contract.max_batch_size:
                raise TargetError(
                    f"model {setup.model!r} takes at most {self.contract.max_batch_size} images in a request, "
                    f"{setup.rows} were asked for"
                )
            self.engine = self.server.engine_of(setup.model)
            # Pictures that only become tensors need not be larger than those.
            size = PICTURE_SIZE if setup.what == "images" else (self.contract.height, self.contract.width)
            self.pictures = load_pictures(setup.images, count=setup.pool, size=size)
            self.observer = Observer(self.server, self.engine, metrics_url=setup.metrics_url or _default_metrics(setup))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Release everything; may be called twice."""
        self.release()
        self.server.close()

    def release(self) -> None:
        """Close what requests go through; the next load makes it anew."""
        for target in self._targets.values():
            target.close()
        self._targets = {}

    def header(self) -> dict[str, Any]:
        """The header for records of this session."""
        header = describe_environment(self.server, self.setup.model, self.contract)
        source = "generated" if self.setup.images is None else str(self.setup.images)
        header["input"] = {"pictures": source, "distinct": len(self.pictures)}
        if self.setup.what == "tensors":
            header["input"]["channels"] = self.setup.channels
        return header

    def target(self, workers: int = 8) -> Target:
        """Where requests go; made and tried out on first use, then kept.

        Args:
            workers: Threads for whole pictures; for tensors there are none.
        """
        setup = self.setup
        key = workers if setup.what == "images" else 0
        if key not in self._targets:
            target: Target
            if setup.what == "images":
                target = ImageTarget(
                    setup.address, setup.model, self.pictures, workers=workers, timeout_s=setup.timeout_s
                )
            else:
                make = SharedMemoryTarget if setup.transport == "shm" else TensorTarget
                tensors = tensors_of(self.pictures, self.contract, setup.rows)
                target = make(
                    setup.address, setup.model, tensors, self.contract, channels=setup.channels,
                    timeout_s=setup.timeout_s,
                )  # fmt: skip
            self._targets[key] = target
            target.check()
        return self._targets[key]

    def generator(self, load: Load, workers: int = 32) -> LoadGenerator:
        """The load generator for a closed or open load."""
        if load.mode == "closed":
            assert load.concurrency is not None
            return ClosedLoop(self.target(load.concurrency), load.concurrency)
        assert load.rate is not None
        return OpenLoop(self.target(workers), arrival_times(load.rate, load.arrivals))

    def measure(self, load: Load, writer: RecordWriter | None = None, *, workers: int = 32) -> Run:
        """Run one closed or open load.

        Args:
            load: What to send.
            writer: Where its records go; None keeps them in memory only.
            workers: Threads for whole pictures in open load.

        Returns:
            The run; its `end` is "interrupted" if `stop` was set.
        """
        generator = self.generator(load, workers)
        tape = Tape(writer, load)
        self.progress(f"{load.model}: {load.pace}, {load.warmup_s:g} s warm-up and {load.duration_s:g} s or more ...")
        interrupted = True
        try:
            generator.start()
            self._watch(generator, load, tape)
            interrupted = self.stop.is_set()
        finally:
            generator.stop()
            if not generator.drain(_DRAIN_AFTER_INTERRUPT_S if interrupted else load.timeout_s + 1):
                self.progress(f"{generator.outstanding} requests are given up")
            tape.requests(generator.take())
            tape.end("interrupted" if interrupted else "finished")
        return tape.run({} if writer is None else writer.header)

    def _watch(self, generator: LoadGenerator, load: Load, tape: Tape) -> None:
        """Cut windows until three agree, or there are enough of them, or the stop was asked for."""
        length_s = load.duration_s / WINDOWS
        if not self._wait_until(generator, load.warmup_s, tape):
            return
        self.observer.begin(generator.now())
        first_s = generator.now()
        for number in range(1, load.max_windows + 1):
            if not self._wait_until(generator, first_s + number * length_s, tape):
                return
            tape.requests(generator.take())
            tape.window(self.observer.next_window(generator.now()))
            if is_stable(tape.records, tape.windows, load.stability):
                return
            if number == WINDOWS < load.max_windows:
                self.progress(f"  not settled after {number} windows, up to {load.max_windows} of {length_s:.1f} s ...")

    def _wait_until(self, generator: LoadGenerator, until_s: float, tape: Tape) -> bool:
        """Wait, and write records meanwhile; False if the stop was asked for."""
        while (left_s := until_s - generator.now()) > 0:
            if self.stop.wait(min(left_s, _TICK_S)):
                return False
            self.observer.tick()
            if left_s > 2 * _TICK_S:
                tape.requests(generator.take())
        return not self.stop.is_set()


class Tape:
    """Keeps a run in memory while it is written to a file."""

    def __init__(self, writer: RecordWriter | None, load: Load) -> None:
        self._writer, self._load = writer, load
        self.records: list[Record] = []
        self.windows: list[Window] = []
        self._end, self._extra = "interrupted", dict[str, Any]()
        if writer is not None:
            writer.load(load, datetime.now(timezone.utc).isoformat(timespec="milliseconds"))

    def requests(self, records: list[Record]) -> None:
        """Add requests."""
        self.records += records
        if self._writer is not None:
            self._writer.requests(records)

    def window(self, window: Window) -> None:
        """Add a window."""
        self.windows.append(window)
        if self._writer is not None:
            self._writer.window(window)

    def end(self, reason: str, extra: Mapping[str, Any] | None = None) -> None:
        """Say how the run ended."""
        self._end, self._extra = reason, dict(extra or {})
        if self._writer is not None:
            self._writer.end(reason, self._extra)

    def run(self, header: Mapping[str, Any]) -> Run:
        """The run so far."""
        return Run(header, self._load, tuple(self.records), tuple(self.windows), self._end, self._extra)


@contextlib.contextmanager
def stop_on_signals() -> Iterator[threading.Event]:
    """SIGINT and SIGTERM set an event, so that records are kept; a second one does what it does without this."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def on_signal(number: int, frame: FrameType | None) -> None:
        event.set()
        for known, handler in before.items():
            signal.signal(known, handler)

    for number in before:
        signal.signal(number, on_signal)
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def default_records_path(name: str) -> Path:
    """Where records go if no file was named: a new one in `out/bench`."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    return Path("out") / "bench" / f"{name.replace('/', '_')}-{stamp}.jsonl"


def _default_metrics(setup: Setup) -> str | None:
    host = urlsplit(f"//{setup.address}").hostname
    return None if host is None else f"http://{host}:8002/metrics"
