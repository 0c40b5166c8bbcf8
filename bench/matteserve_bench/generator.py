"""The load generator: keeps to a pace, whatever the server does, and records every request.

In closed load a request is due when its place becomes free. In open load the schedule is made before and never moves:
when sending is late, for whatever reason, the request still counts from the moment it was due (wrk2's correction
of "coordinated omission", here by construction).
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator

from matteserve_bench.pacing import Clock, MonotonicClock
from matteserve_bench.records import Record
from matteserve_bench.targets import Outcome, Target

NOT_SENT = "NotSent"
"""Error of a request that was due when `max_outstanding` were on their way already."""


class LoadGenerator:
    """Sends requests to a target and collects records; `start`, `take`, `stop` belong to one thread.

    Args:
        target: Takes the requests.
        clock: Tells the time.
    """

    def __init__(self, target: Target, clock: Clock | None = None) -> None:
        self._target = target
        self._clock: Clock = clock or MonotonicClock()
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._records: list[Record] = []
        self._outstanding = 0
        self._idle = threading.Condition(self._lock)
        self._stopped = threading.Event()
        self._began = self._clock.now()

    def start(self) -> None:
        """Begin to send; time 0 of every record is now."""
        self._began = self._clock.now()

    def stop(self) -> None:
        """Send no more; requests on their way go on."""
        self._stopped.set()

    def drain(self, timeout_s: float) -> bool:
        """Wait until nothing is on its way; False if the time was not enough."""
        with self._idle:
            return self._idle.wait_for(lambda: self._outstanding == 0, timeout_s)

    def take(self) -> list[Record]:
        """The records since the last call."""
        with self._lock:
            records, self._records = self._records, []
        return records

    def now(self) -> float:
        """Seconds since the start."""
        return self._clock.now() - self._began

    @property
    def outstanding(self) -> int:
        """Requests on their way."""
        return self._outstanding

    def _fire(self, due_s: float | None = None) -> None:
        """Send the next request; without `due_s` it is due now."""
        number = next(self._numbers)
        with self._lock:
            self._outstanding += 1
        sent_s = self.now()
        due = sent_s if due_s is None else due_s
        self._target.send(number, lambda outcome: self._done(due, sent_s, outcome))

    def _done(self, due_s: float, sent_s: float, outcome: Outcome) -> None:
        done_s = self.now()
        if outcome.sent_s is not None:
            sent_s = outcome.sent_s - self._began
        # Microseconds, as in the file: a report is the same before and after.
        record = Record(
            round(due_s, 6), round(sent_s, 6), round(done_s, 6), outcome.error, self._target.rows, outcome.bytes_out,
            outcome.bytes_in, outcome.stages,
        )  # fmt: skip
        with self._lock:
            self._records.append(record)
            self._outstanding -= 1
            if self._outstanding == 0:
                self._idle.notify_all()
        self._answered()

    def _answered(self) -> None:
        """What an answer brings about."""


class ClosedLoop(LoadGenerator):
    """Keeps a number of requests on their way, each replaced when it is answered.

    Says what a server can do, not how it behaves at a given rate: a slow answer delays the next request.

    Args:
        target: Takes the requests.
        concurrency: Requests on their way.
        clock: Tells the time.
    """

    def __init__(self, target: Target, concurrency: int, clock: Clock | None = None) -> None:
        super().__init__(target, clock)
        self._concurrency = concurrency
        self._local = threading.local()

    def start(self) -> None:
        """See `LoadGenerator.start`."""
        super().start()
        for _ in range(self._concurrency):
            self._answered()

    def _answered(self) -> None:
        # An answer can be there before `send` returns; then the loop below sends the next, not a deeper call.
        local = self._local
        if getattr(local, "sending", False):
            local.waiting += 1
            return
        local.sending, local.waiting = True, 1
        try:
            while local.waiting and not self._stopped.is_set():
                local.waiting -= 1
                self._fire()
        finally:
            local.sending = False


class OpenLoop(LoadGenerator):
    """Sends each request when it is due.

    Args:
        target: Takes the requests.
        schedule: When requests are due, in seconds since the start, ascending.
        clock: Tells the time.
        max_outstanding: Requests on their way above which a due one is not sent but recorded as failed.
    """

    def __init__(
        self, target: Target, schedule: Iterator[float], clock: Clock | None = None, *, max_outstanding: int = 4096
    ) -> None:
        super().__init__(target, clock)
        self._schedule = schedule
        self._max_outstanding = max_outstanding
        self._thread = threading.Thread(target=self.pace, name="pacer", daemon=True)

    def start(self) -> None:
        """See `LoadGenerator.start`."""
        super().start()
        self._thread.start()

    def stop(self) -> None:
        """See `LoadGenerator.stop`."""
        super().stop()
        self._thread.join()

    def pace(self) -> None:
        """Send until stopped, or until the schedule ends."""
        for due_s in self._schedule:
            while (wait_s := due_s - self.now()) > 0 and not self._stopped.is_set():
                self._clock.sleep(min(wait_s, 0.1))
            if self._stopped.is_set():
                return
            if self._outstanding >= self._max_outstanding:
                now = round(self.now(), 6)
                with self._lock:
                    self._records.append(Record(round(due_s, 6), now, now, NOT_SENT, self._target.rows))
            else:
                self._fire(due_s)
