"""Load tests of a running server: records first, reports from records."""

from matteserve_bench._errors import BenchError, EvaluationError, RecordsError, TargetError, ToolError, TuningError
from matteserve_bench.metrics import Summary, summarise
from matteserve_bench.records import Load, Record, RecordWriter, Run, ServerStatistics, Window, read_records
from matteserve_bench.session import Session, Setup
from matteserve_bench.validity import Verdict

__all__ = [
    "BenchError",
    "EvaluationError",
    "Load",
    "Record",
    "RecordWriter",
    "RecordsError",
    "Run",
    "ServerStatistics",
    "Session",
    "Setup",
    "Summary",
    "TargetError",
    "ToolError",
    "TuningError",
    "Verdict",
    "Window",
    "read_records",
    "summarise",
]
