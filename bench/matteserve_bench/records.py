"""Records of single requests and what belongs to them: written as they happen, read by every report.

A file has one JSON object a line, told apart by `type`, in this order::

    header     what was measured on: machine, software, model; once each time the program is started
    load       one load: how many requests, at what pace; begins a run
    request    one request of that run
    window     one measurement window of that run, with the server's own figures for it
    end        how the run ended: "finished" or "interrupted"

Lines are only ever appended, whole, so a file whose writer was killed can be read: its last run is "interrupted".
Times are seconds since the run's first request could be sent, on a clock that never jumps.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple

from matteserve_bench._errors import RecordsError

SCHEMA_VERSION = 1
Mode = Literal["closed", "open", "loadgen"]
What = Literal["tensors", "images"]
TransportName = Literal["grpc", "shm"]
Arrivals = Literal["poisson", "constant"]


class Record(NamedTuple):
    """One request.

    Attributes:
        due_s: When it should have been sent: by the schedule in open load, when its place became free in closed load.
        sent_s: When it was sent.
        done_s: When its answer, or its failure, was there.
        error: Class name of the failure; empty if it was answered.
        rows: Images in it.
        bytes_out: Bytes of the request, without gRPC's framing; with shared memory what still goes over gRPC.
        bytes_in: Bytes of the answer.
        stages: Seconds by stage ("decode", "preprocess", "request", "postprocess", "encode") where pictures are sent.
    """

    due_s: float
    sent_s: float
    done_s: float
    error: str = ""
    rows: int = 1
    bytes_out: int = 0
    bytes_in: int = 0
    stages: Mapping[str, float] | None = None

    @property
    def latency_ms(self) -> float:
        """Milliseconds from the moment it was due to its answer."""
        return 1000 * (self.done_s - self.due_s)


@dataclass(frozen=True)
class ServerStatistics:
    """What Triton counted for one engine; either since it was loaded, or the difference of two such.

    Attributes:
        inferences: Rows that were inferred.
        executions: Runs of the model; `inferences / executions` is the mean batch.
        succeeded: Requests answered.
        failed: Requests failed.
        queue_s: Seconds that requests waited in the queue, summed over requests, as are all the following.
        compute_input_s: Seconds for gathering inputs.
        compute_infer_s: Seconds in the model.
        compute_output_s: Seconds for scattering outputs.
        batches: Executions by batch size.
    """

    inferences: int = 0
    executions: int = 0
    succeeded: int = 0
    failed: int = 0
    queue_s: float = 0.0
    compute_input_s: float = 0.0
    compute_infer_s: float = 0.0
    compute_output_s: float = 0.0
    batches: Mapping[int, int] = field(default_factory=dict)

    def __sub__(self, earlier: ServerStatistics) -> ServerStatistics:
        return self._combine(earlier, -1)

    def __add__(self, other: ServerStatistics) -> ServerStatistics:
        return self._combine(other, 1)

    def _combine(self, other: ServerStatistics, sign: int) -> ServerStatistics:
        sizes = sorted(self.batches.keys() | other.batches.keys())
        batches = {size: self.batches.get(size, 0) + sign * other.batches.get(size, 0) for size in sizes}
        numbers = {
            f.name: getattr(self, f.name) + sign * getattr(other, f.name) for f in fields(self) if f.name != "batches"
        }
        return ServerStatistics(**numbers, batches={size: count for size, count in batches.items() if count})


@dataclass(frozen=True)
class GpuUse:
    """What the server's metrics say about its GPUs during one window, summed over GPUs where that makes sense.

    Attributes:
        count: GPUs that the server sees.
        utilisation: Mean share of time that a kernel ran, 0 to 1, mean over GPUs.
        memory_bytes: Largest memory in use.
        power_w: Mean power.
        energy_j: Energy used.
    """

    count: int
    utilisation: float | None = None
    memory_bytes: float | None = None
    power_w: float | None = None
    energy_j: float | None = None


@dataclass(frozen=True)
class Window:
    """One measurement window.

    Attributes:
        start_s: Its beginning.
        end_s: Its end.
        client_cpu: Cores that this process kept busy.
        machine_cpu: Share of all the cores of this machine that were busy, 0 to 1.
        machine_cores: Cores of this machine.
        server_cpu: Cores that the server's process tree kept busy; None if it runs elsewhere.
        server_rss_bytes: Memory of the server's process tree, shared pages counted for each process.
        server: Triton's statistics of the engine; None if they could not be read.
        gpu: None if the server reports none.
    """

    start_s: float
    end_s: float
    client_cpu: float = 0.0
    machine_cpu: float = 0.0
    machine_cores: int = 1
    server_cpu: float | None = None
    server_rss_bytes: int | None = None
    server: ServerStatistics | None = None
    gpu: GpuUse | None = None

    @property
    def seconds(self) -> float:
        """Its length."""
        return self.end_s - self.start_s


@dataclass(frozen=True)
class Load:
    """One load: what is sent, and at what pace.

    Attributes:
        mode: "closed" keeps `concurrency` requests on their way, each replaced when it is answered; "open" sends at
            `rate` whatever the answers do; "loadgen" leaves the pace to a `scenario` of MLPerf LoadGen.
        model: Model that is called, an alias or an engine.
        what: "tensors" sends prepared tensors (the server alone), "images" JPEG bytes in and PNG bytes out.
        transport: "grpc" sends tensors in the request, "shm" through system shared memory.
        concurrency: Requests on their way, in closed load.
        rate: Requests per second, in open load.
        arrivals: "poisson" or "constant" intervals, in open load.
        scenario: MLPerf scenario.
        rows: Images in a request.
        duration_s: Seconds measured, in three windows.
        warmup_s: Seconds before, not counted.
        max_windows: Windows after which it ends although the last three do not agree.
        stability: Largest deviation of one of the three windows from their mean, as a share.
        timeout_s: Limit of each request.
        label: Free text that reports show.
        round: Number of the turn in an interleaved comparison; None outside of one.
    """

    mode: Mode = "closed"
    model: str = ""
    what: What = "tensors"
    transport: TransportName = "grpc"
    concurrency: int | None = None
    rate: float | None = None
    arrivals: Arrivals = "poisson"
    scenario: str | None = None
    rows: int = 1
    duration_s: float = 10.0
    warmup_s: float = 2.0
    max_windows: int = 10
    stability: float = 0.10
    timeout_s: float = 60.0
    label: str = ""
    round: int | None = None

    def __post_init__(self) -> None:
        if self.mode == "closed" and (self.concurrency is None or self.concurrency < 1):
            raise ValueError(f"concurrency is {self.concurrency}, must be at least 1")
        if self.mode == "open" and (self.rate is None or not self.rate > 0):
            raise ValueError(f"rate is {self.rate}, must be above 0 requests per second")
        for name in ("duration_s", "timeout_s", "stability"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}, must be above 0")
        if self.warmup_s < 0:
            raise ValueError(f"warmup_s is {self.warmup_s}, must not be negative")
        for name, least in (("rows", 1), ("max_windows", WINDOWS)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}, must be at least {least}")

    @property
    def pace(self) -> str:
        """Its pace, for people."""
        if self.mode == "closed":
            return f"concurrency {self.concurrency}"
        return f"{self.rate:g}/s {self.arrivals}" if self.mode == "open" else str(self.scenario)


WINDOWS = 3
"""Consecutive windows that must agree, as in perf_analyzer."""


@dataclass(frozen=True)
class Run:
    """One load as it went.

    Attributes:
        header: What it was measured on.
        load: What was asked for.
        records: Its requests, in the order in which they were done; those of the warm-up too.
        windows: Its measurement windows.
        end: "finished" or "interrupted".
        extra: What another tool said about it, such as LoadGen's own result.
    """

    header: Mapping[str, Any]
    load: Load
    records: tuple[Record, ...]
    windows: tuple[Window, ...]
    end: str = "finished"
    extra: Mapping[str, Any] = field(default_factory=dict)


class RecordWriter:
    """Appends to a file of records; one thread uses it. Every call leaves only whole lines in the file.

    Args:
        path: File to append to; made with its folders if it does not exist.
        header: See the module.

    Raises:
        RecordsError: The file cannot be written.
    """

    def __init__(self, path: Path, header: Mapping[str, Any]) -> None:
        self.path = path
        self.header = header
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torn = path.exists() and path.stat().st_size > 0 and not _ends_with_newline(path)
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as exc:
            raise RecordsError(f"cannot write records to {path}: {exc.strerror}; choose another file") from exc
        if torn:  # whoever wrote before was killed in the middle of a line
            os.write(self._file, b"\n")
        self._append([{"type": "header", "schema": SCHEMA_VERSION, **header}])

    def load(self, load: Load, began: str) -> None:
        """Begin a run; `began` is the date and time in UTC."""
        self._append([{"type": "load", "began": began, **_without_none(asdict(load))}])

    def requests(self, records: list[Record]) -> None:
        """Append requests."""
        if records:
            self._write("".join(_request_line(record) for record in records))

    def window(self, window: Window) -> None:
        """Append a window; what was written until here also survives a loss of power."""
        self._append([{"type": "window", **_without_none(asdict(window))}])
        os.fsync(self._file)

    def end(self, reason: str, extra: Mapping[str, Any] | None = None) -> None:
        """End the run."""
        self._append([{"type": "end", "reason": reason, **({"extra": extra} if extra else {})}])
        os.fsync(self._file)

    def close(self) -> None:
        """Close the file; may be called twice."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> RecordWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _append(self, lines: list[dict[str, Any]]) -> None:
        self._write("".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines))

    def _write(self, text: str) -> None:
        data = text.encode()
        try:
            while data:
                data = data[os.write(self._file, data) :]
        except OSError as exc:
            raise RecordsError(f"cannot write records to {self.path}: {exc.strerror}") from exc


def read_records(path: Path) -> list[Run]:
    """Read every run of a file, also of one whose writer was killed.

    Raises:
        RecordsError: It cannot be read, is of another version, has a damaged line before its last, or holds no run.
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as exc:
        raise RecordsError(f"cannot read records from {path}: {exc}") from exc
    header: dict[str, Any] | None = None
    runs: list[Run] = []
    building: _Building | None = None
    for number, line in _lines(text, path):
        kind = line.pop("type", None)
        if kind == "header":
            if line.get("schema") != SCHEMA_VERSION:
                raise RecordsError(
                    f"{path}: its records have schema {line.get('schema')}, this version of matteserve reads "
                    f"{SCHEMA_VERSION}"
                )
            header = line
            continue
        if header is None:
            raise RecordsError(f"{path}: line {number} is no header; is this a file of `matteserve bench run`?")
        try:
            if kind == "load":
                if building is not None:
                    runs.append(building.finish("interrupted"))
                building = _Building(header, Load(**{k: v for k, v in line.items() if k != "began"}))
            elif building is not None and kind in ("request", "window", "end"):
                if kind == "end":
                    runs.append(building.finish(line["reason"], line.get("extra")))
                    building = None
                else:
                    building.add(kind, line)
        except (TypeError, KeyError, ValueError) as exc:
            raise RecordsError(f"{path}: line {number} is damaged ({exc})") from exc
    if building is not None:
        runs.append(building.finish("interrupted"))
    if not runs:
        raise RecordsError(f"{path}: holds no run")
    return runs


class _Building:
    def __init__(self, header: Mapping[str, Any], load: Load) -> None:
        self._header, self._load = header, load
        self._records: list[Record] = []
        self._windows: list[Window] = []

    def add(self, kind: str, line: dict[str, Any]) -> None:
        if kind == "request":
            self._records.append(
                Record(
                    line["due"], line["sent"], line["done"], line.get("error", ""), line.get("rows", 1),
                    line.get("out", 0), line.get("in", 0), line.get("stages"),
                )
            )  # fmt: skip
            return
        if "server" in line:
            batches = {int(size): count for size, count in line["server"].pop("batches", {}).items()}
            line["server"] = ServerStatistics(**line["server"], batches=batches)
        if "gpu" in line:
            line["gpu"] = GpuUse(**line["gpu"])
        self._windows.append(Window(**line))

    def finish(self, end: str, extra: Mapping[str, Any] | None = None) -> Run:
        return Run(self._header, self._load, tuple(self._records), tuple(self._windows), end, extra or {})


def _lines(text: str, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    lines = text.split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as exc:
            following = next((later for later in lines[number:] if later.strip()), None)
            # A torn line is where a writer was killed: at the end, or before the header of the next one.
            if following is None or following.startswith('{"type":"header"'):
                continue
            raise RecordsError(f"{path}: line {number} is damaged ({exc.msg})") from exc
        if not isinstance(value, dict):
            raise RecordsError(f"{path}: line {number} is not a JSON object")
        yield number, value


def _request_line(record: Record) -> str:
    """Written by hand: a run has many thousands of them, and this takes a fifth of the time of `json.dumps`."""
    error = f',"error":{json.dumps(record.error)}' if record.error else ""
    rows = f',"rows":{record.rows}' if record.rows != 1 else ""
    stages = ""
    if record.stages:
        stages = ',"stages":' + json.dumps({name: round(s, 6) for name, s in record.stages.items()})
    return (
        f'{{"type":"request","due":{record.due_s:.6f},"sent":{record.sent_s:.6f},"done":{record.done_s:.6f}'
        f'{error}{rows},"out":{record.bytes_out},"in":{record.bytes_in}{stages}}}\n'
    )


def _without_none(values: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_none(value) if isinstance(value, dict) else value
        for key, value in values.items()
        if value is not None
    }


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"
