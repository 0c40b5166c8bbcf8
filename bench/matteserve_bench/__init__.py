"""Load tests of a running server: records first, reports from records."""

from matteserve_bench.closed_loop import ClosedLoop, run_closed_loop
from matteserve_bench.metrics import Record, Summary, summarise

__all__ = ["ClosedLoop", "Record", "Summary", "run_closed_loop", "summarise"]
