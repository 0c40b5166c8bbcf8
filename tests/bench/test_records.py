"""Records survive whatever happens to their writer."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from matteserve_bench import Load, Record, RecordsError, RecordWriter, ServerStatistics, Window, read_records
from matteserve_bench.records import GpuUse

LOAD = Load(model="demo", concurrency=2, duration_s=3.0, label="first")
RECORDS = [
    Record(0.0, 0.000125, 0.25, bytes_out=3000, bytes_in=1000),
    Record(0.25, 0.25, 0.5, 'Odd"Error', rows=4),
    Record(0.5, 0.5, 0.75, stages={"decode": 0.01, "encode": 0.2}),
]
WINDOW = Window(
    0.0, 1.0, 0.25, 0.5, 2, 1.5, 1000, ServerStatistics(6, 3, 2, 1, 0.1, 0.2, 0.3, 0.4, {2: 3}), GpuUse(1, 0.9, 1e9)
)  # fmt: skip


def write(path: Path, *, end: bool = True) -> Path:
    with RecordWriter(path, {"date": "today"}) as writer:
        writer.load(LOAD, "2026-11-24T05:00:00+00:00")
        writer.requests(RECORDS)
        writer.window(WINDOW)
        if end:
            writer.end("finished", {"loadgen": {"Result is": "VALID"}})
    return path


def test_what_is_written_is_read(tmp_path: Path) -> None:
    (run,) = read_records(write(tmp_path / "new folder" / "records.jsonl"))
    assert run.header == {"schema": 1, "date": "today"}
    assert run.load == LOAD
    assert run.records == tuple(RECORDS)
    assert run.windows == (WINDOW,)
    assert (run.end, run.extra) == ("finished", {"loadgen": {"Result is": "VALID"}})


def test_one_line_per_request(tmp_path: Path) -> None:
    lines = write(tmp_path / "records.jsonl").read_text().splitlines()
    assert [line.partition(",")[0] for line in lines] == [
        '{"type":"header"', '{"type":"load"', *['{"type":"request"'] * 3, '{"type":"window"', '{"type":"end"',
    ]  # fmt: skip


@pytest.mark.parametrize("cut", [1, 30, 400])
def test_a_killed_writer_leaves_a_readable_file(tmp_path: Path, cut: int) -> None:
    path = write(tmp_path / "records.jsonl", end=False)
    path.write_bytes(path.read_bytes()[:-cut])
    (run,) = read_records(path)
    assert run.end == "interrupted"
    assert run.records == tuple(RECORDS)[: len(run.records)]
    assert len(run.records) >= 1


def test_appending_after_a_killed_writer(tmp_path: Path) -> None:
    path = write(tmp_path / "records.jsonl", end=False)
    path.write_bytes(path.read_bytes()[:-20])
    write(path)
    first, second = read_records(path)
    assert (first.end, len(first.records)) == ("interrupted", 3)
    assert (second.end, len(second.records)) == ("finished", 3)


def test_a_file_without_a_run(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    RecordWriter(path, {}).close()
    with pytest.raises(RecordsError, match="holds no run"):
        read_records(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"type":"load"}\n', "line 1 is no header"),
        ('{"type":"header","schema":9}\n', "have schema 9, this version of matteserve reads 1"),
        ('{"type":"header","schema":1}\n{"type":\n{"type":"end"}\n', "line 2 is damaged"),
        ('{"type":"header","schema":1}\n[1]\n{"type":"end"}\n', "line 2 is not a JSON object"),
        ('{"type":"header","schema":1}\n{"type":"load","concurrency":0}\n', "line 2 is damaged .concurrency is 0"),
        (
            '{"type":"header","schema":1}\n{"type":"load","concurrency":1}\n{"type":"request"}\n',
            "line 3 is damaged .'due'",
        ),
    ],
)
def test_damage_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text(text)
    with pytest.raises(RecordsError, match=message):
        read_records(path)


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(RecordsError, match="cannot read records from"):
        read_records(tmp_path / "none.jsonl")
    (tmp_path / "file").write_text("")
    with pytest.raises(RecordsError, match="cannot write records to"):
        RecordWriter(tmp_path / "file" / "records.jsonl", {})
    writer = RecordWriter(tmp_path / "records.jsonl", {})
    writer.close()
    writer.close()
    with pytest.raises(RecordsError, match="Bad file descriptor"):
        writer.end("finished")


def test_impossible_loads() -> None:
    for values, message in (
        ({"concurrency": 0}, "concurrency is 0, must be at least 1"),
        ({"mode": "open"}, "rate is None, must be above 0"),
        ({"concurrency": 1, "duration_s": 0}, "duration_s is 0, must be above 0"),
        ({"concurrency": 1, "warmup_s": -1}, "warmup_s is -1"),
        ({"concurrency": 1, "max_windows": 2}, "max_windows is 2, must be at least 3"),
    ):
        with pytest.raises(ValueError, match=message):
            Load(**values)


def test_pace_in_words() -> None:
    assert LOAD.pace == "concurrency 2"
    assert dataclasses.replace(LOAD, mode="open", rate=12.5).pace == "12.5/s poisson"
    assert dataclasses.replace(LOAD, mode="loadgen", scenario="Offline").pace == "Offline"


def test_statistics_add_and_subtract() -> None:
    after, before = ServerStatistics(10, 4, 9, 1, 1.0, batches={1: 2, 4: 2}), ServerStatistics(2, 2, 2, batches={1: 2})
    assert after - before == ServerStatistics(8, 2, 7, 1, 1.0, batches={4: 2})
    assert before + before == ServerStatistics(4, 4, 4, batches={1: 4})
