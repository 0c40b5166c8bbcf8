"""What measuring can raise on purpose.

::

    MatteserveError
    └── BenchError
        ├── RecordsError          a file of records is missing, damaged or empty
        ├── TargetError           the server does not take the load in the way that was asked for
        ├── EvaluationError       pictures and masks do not fit together, or one of them cannot be read
        ├── ToolError             LoadGen or perf_analyzer is missing, or failed
        └── TuningError           an engine cannot be tuned, or not put back
"""

from matteserve_client import MatteserveError


class BenchError(MatteserveError):
    """Base of everything that measuring raises."""


class RecordsError(BenchError):
    """A file of records is missing, damaged or empty."""


class TargetError(BenchError):
    """The server does not take the load in the way that was asked for."""


class EvaluationError(BenchError):
    """Pictures and masks do not fit together, or one of them cannot be read."""


class ToolError(BenchError):
    """A program or library of others is missing, or failed."""


class TuningError(BenchError):
    """An engine cannot be tuned, or not put back as it was."""
