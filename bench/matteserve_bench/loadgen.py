"""MLPerf's scenarios, by MLCommons' own LoadGen: it decides when queries are issued and whether the result is valid.

* SingleStream: one query of one image at a time; the figure is the 90th percentile of latency.
* MultiStream: one query of several images at a time; the figure is the 99th percentile of a query's latency.
* Server: queries of one image arrive as a Poisson process; the figure is their rate, if p99 keeps to a bound.
* Offline: all images are there at the beginning; the figure is images per second.

Images of one query are sent as requests of their own, as clients do; the server's batcher joins them.
"""

from __future__ import annotations

import re
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from matteserve_bench._errors import ToolError
from matteserve_bench.generator import LoadGenerator
from matteserve_bench.records import RecordWriter, Run
from matteserve_bench.session import Session, Tape
from matteserve_bench.targets import Outcome, Target

Scenario = Literal["SingleStream", "MultiStream", "Server", "Offline"]
SCENARIOS: tuple[Scenario, ...] = ("SingleStream", "MultiStream", "Server", "Offline")
_TICK_S = 0.25


@dataclass(frozen=True)
class LoadGenSettings:
    """What LoadGen is told; names as in its TestSettings.

    Attributes:
        scenario: One of the four.
        min_duration_ms: Least duration. A submission to MLPerf needs 600,000.
        min_query_count: Least number of queries; 0 leaves it to LoadGen's early stopping.
        server_target_qps: Rate of the Server scenario, in queries per second.
        server_target_latency_ms: Bound of p99 in the Server scenario.
        multi_stream_samples_per_query: Images in a query of MultiStream.
        offline_expected_qps: Guess of the throughput in Offline, from which LoadGen takes the number of images.
        offline_in_flight: Requests on their way in Offline; below the model's `max_queue_size`.
    """

    scenario: Scenario
    min_duration_ms: int = 10_000
    min_query_count: int = 0
    server_target_qps: float = 1.0
    server_target_latency_ms: float = 1000.0
    multi_stream_samples_per_query: int = 8
    offline_expected_qps: float = 1.0
    offline_in_flight: int = 32

    def __post_init__(self) -> None:
        if self.scenario not in SCENARIOS:
            raise ValueError(f"scenario is {self.scenario!r}, must be one of {', '.join(SCENARIOS)}")
        for name in ("min_duration_ms", "server_target_qps", "server_target_latency_ms", "offline_expected_qps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}, must be above 0")
        for name in ("multi_stream_samples_per_query", "offline_in_flight"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, must be at least 1")


def run_loadgen(session: Session, settings: LoadGenSettings, writer: RecordWriter | None = None) -> Run:
    """Run one scenario.

    LoadGen cannot be interrupted: if the session's `stop` is set the records are kept and this returns, while LoadGen's
    thread stays behind, so the process should then end (`os._exit`).

    Args:
        session: Where to.
        settings: What LoadGen is told.
        writer: Where records go.

    Returns:
        The run; `extra["loadgen"]` is LoadGen's summary, `extra["invalid_reasons"]` what it found wanting.

    Raises:
        ToolError: LoadGen is not installed, or it failed.
    """
    loadgen = _import_loadgen()
    load = replace(
        session.setup.load(mode="loadgen", scenario=settings.scenario), duration_s=settings.min_duration_ms / 1000
    )
    session.progress(f"{load.model}: {settings.scenario}, {load.duration_s:g} s or more ...")
    issuer = _Issuer(session.target(settings.offline_in_flight), loadgen, settings)
    tape = Tape(writer, load)
    failures: list[BaseException] = []
    with tempfile.TemporaryDirectory(prefix="matteserve-loadgen-", ignore_cleanup_errors=True) as directory:

        def run() -> None:
            try:
                _start_test(loadgen, issuer, settings, len(session.pictures), directory)
            except BaseException as exc:
                failures.append(exc)

        thread = threading.Thread(target=run, name="loadgen", daemon=True)
        session.observer.begin(0.0)
        issuer.start()
        thread.start()
        while thread.is_alive() and not session.stop.wait(_TICK_S):
            session.observer.tick()
            tape.requests(issuer.take())
        interrupted = session.stop.is_set()
        issuer.stop()
        if not interrupted:
            thread.join()
            issuer.drain(load.timeout_s)
        tape.requests(issuer.take())
        tape.window(session.observer.next_window(issuer.now()))
        summary = {} if interrupted else read_summary(Path(directory) / "mlperf_log_summary.txt")
    if failures:
        tape.end("interrupted")
        raise ToolError(f"LoadGen failed in {settings.scenario}: {failures[0]}") from failures[0]
    tape.end("interrupted" if interrupted else "finished", {"loadgen": summary, "invalid_reasons": invalid_of(summary)})
    return tape.run({} if writer is None else writer.header)


class _Issuer(LoadGenerator):
    """Turns LoadGen's queries into requests and tells it of the answers."""

    def __init__(self, target: Target, loadgen: Any, settings: LoadGenSettings) -> None:
        super().__init__(target)
        self._loadgen = loadgen
        # Offline hands over all images at once; a server's queue is not made for that.
        self._limit = settings.offline_in_flight if settings.scenario == "Offline" else None
        self._free = threading.Semaphore(self._limit or 1)

    def issue(self, samples: list[Any]) -> None:
        """Called by LoadGen with the samples of one query, from a thread of its own."""
        due_s = self.now()
        if self._stopped.is_set():
            return
        if self._limit is None:
            for sample in samples:
                self._send(sample.id, sample.index, due_s)
            return
        for sample in samples:
            self._free.acquire()
            if self._stopped.is_set():
                return
            self._send(sample.id, sample.index, self.now())

    def flush(self) -> None:
        """Called by LoadGen after the last query: nothing is held back here."""

    def _send(self, sample_id: int, index: int, due_s: float) -> None:
        sent_s = self.now()
        with self._lock:
            self._outstanding += 1

        def done(outcome: Outcome) -> None:
            self._done(due_s, sent_s, outcome)
            if self._limit is not None:
                self._free.release()
            if not self._stopped.is_set():
                response = self._loadgen.QuerySampleResponse(sample_id, 0, 0)
                self._loadgen.QuerySamplesComplete([response])

        self._target.send(index, done)


def _start_test(loadgen: Any, issuer: _Issuer, settings: LoadGenSettings, pool: int, directory: str) -> None:
    """Configure LoadGen and run it to its end."""
    test = loadgen.TestSettings()
    test.scenario = getattr(loadgen.TestScenario, settings.scenario)
    test.mode = loadgen.TestMode.PerformanceOnly
    test.min_duration_ms = settings.min_duration_ms
    test.min_query_count = settings.min_query_count
    test.server_target_qps = settings.server_target_qps
    test.server_target_latency_ns = int(settings.server_target_latency_ms * 1e6)
    test.multi_stream_samples_per_query = settings.multi_stream_samples_per_query
    test.offline_expected_qps = settings.offline_expected_qps
    log = loadgen.LogSettings()
    log.log_output.outdir = directory
    log.enable_trace = False
    sut = loadgen.ConstructSUT(issuer.issue, issuer.flush)
    qsl = loadgen.ConstructQSL(pool, pool, _nothing, _nothing)  # the pool is in memory already
    try:
        loadgen.StartTestWithLogSettings(sut, qsl, test, log)
    finally:
        loadgen.DestroyQSL(qsl)
        loadgen.DestroySUT(sut)


def _nothing(indices: list[int]) -> None:
    """Samples are loaded before the clock starts and stay."""


_SETTINGS = "Test Parameters Used"  # what follows is what it was told
_LINE = re.compile(r"^\s*(?P<name>[^:=]+?)\s*[:=]\s*(?P<value>\S.*?)\s*$")


def read_summary(path: Path) -> dict[str, str]:
    """LoadGen's summary as values by name, in its own words.

    Raises:
        ToolError: There is none, or it has no result.
    """
    try:
        text = path.read_text()
    except OSError as exc:
        raise ToolError(f"LoadGen left no summary ({exc.strerror})") from exc
    found: dict[str, str] = {}
    recommendations = []
    for line in text.partition(_SETTINGS)[0].splitlines():
        if line.strip().startswith("*"):
            recommendations.append(line.strip(" *"))
        elif match := _LINE.match(line):
            found.setdefault(match["name"], match["value"])
    if "Result is" not in found:
        raise ToolError(f"LoadGen's summary has no result: {text[:200]!r}")
    if recommendations:
        found["Recommendations"] = "; ".join(line.rstrip(",. ") for line in recommendations)
    return found


def invalid_of(summary: Mapping[str, str]) -> list[str]:
    """Why LoadGen calls a result INVALID, in its words; empty if it is VALID."""
    if not summary or summary["Result is"] == "VALID":
        return []
    wanting = [f"{name}: no" for name, value in summary.items() if value.upper() == "NO"]
    detail = "; ".join([*wanting, *([summary["Recommendations"]] if "Recommendations" in summary else [])])
    return [f"LoadGen calls it {summary['Result is']}" + (f": {detail}" if detail else "")]


def _import_loadgen() -> Any:
    try:
        import mlperf_loadgen
    except ImportError as exc:
        raise ToolError(
            "MLPerf's scenarios need its LoadGen, which is not installed: pip install 'matteserve[bench]'. It has "
            "wheels for Linux x86_64, macOS arm64 and Windows up to Python 3.13; elsewhere "
            "`pip install mlcommons-loadgen` builds it and needs a C++ compiler"
        ) from exc
    return mlperf_loadgen
