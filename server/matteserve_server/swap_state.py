"""What is known about a model's swaps between two commands: `swap.json` and a lock, beside the alias.

Triton ignores both files. The alias' `config.pbtxt` alone decides what is served; the journal only remembers what to
go back to, and which step was under way, so that a swap that was killed can be finished or undone.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

from matteserve_server._errors import RepositoryError, SwapBusyError
from matteserve_server.alias import replace_file

STATE_FILE = "swap.json"
LOCK_FILE = "swap.lock"
_SCHEMA_VERSION = 1
_DEPTH = 10
_HISTORY = 20

Kind = Literal["swap", "rollback"]


@dataclass(frozen=True)
class Pending:
    """A swap or rollback under way.

    Attributes:
        kind: Which of the two.
        source: Engine that the alias pointed at.
        target: Engine that it is to point at.
        step: The step that was begun last.
        started_utc: When it began, ISO 8601.
    """

    kind: Kind
    source: str
    target: str
    step: str
    started_utc: str


@dataclass
class Journal:
    """The contents of `swap.json`.

    Attributes:
        previous: Engines to go back to, the newest last.
        pending: What is under way, or was when its process was killed; None between two swaps.
        history: What was done, oldest first: `utc`, `kind`, `source`, `target`, `outcome`.
    """

    previous: list[str] = field(default_factory=list)
    pending: Pending | None = None
    history: list[dict[str, str]] = field(default_factory=list)

    def finish(self, pending: Pending, outcome: str, *, moved: bool) -> None:
        """Close what was under way.

        Args:
            pending: What it was.
            outcome: One word or sentence for the history.
            moved: Whether the alias now points at its target.
        """
        if moved and pending.kind == "swap":
            self.previous = [*self.previous, pending.source][-_DEPTH:]
        elif moved:
            self.forget(pending.target)
        entry = {"kind": pending.kind, "source": pending.source, "target": pending.target, "outcome": outcome}
        self.history = [*self.history, {"utc": now_utc(), **entry}][-_HISTORY:]
        self.pending = None

    def forget(self, engine: str) -> None:
        """Drop an engine from the end of `previous`: there is no going back to where one is."""
        while self.previous and self.previous[-1] == engine:
            self.previous.pop()


def read_journal(folder: Path) -> Journal:
    """Read the journal of an alias; an empty one if there is none.

    Raises:
        RepositoryError: The file is not a journal.
    """
    path = folder / STATE_FILE
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        pending = fields["pending"]
        return Journal(list(fields["previous"]), Pending(**pending) if pending else None, list(fields["history"]))
    except FileNotFoundError:
        return Journal()
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise RepositoryError(
            f"{path} is not a journal of swaps ({type(exc).__name__}: {exc}); remove it, which only forgets what "
            "to roll back to"
        ) from exc


def write_journal(folder: Path, journal: Journal) -> None:
    """Write the journal, whole or not at all.

    Raises:
        RepositoryError: It cannot be written.
    """
    fields: dict[str, Any] = {"schema_version": _SCHEMA_VERSION, **asdict(journal)}
    replace_file(folder / STATE_FILE, json.dumps(fields, indent=2) + "\n")


@contextlib.contextmanager
def lock(folder: Path, doing: str) -> Iterator[None]:
    """Keep every other swap of this model out; the kernel gives the lock back however the process ends.

    Args:
        folder: The alias' folder.
        doing: What this process does, for the message that the other one prints.

    Raises:
        SwapBusyError: Somebody else has it.
        RepositoryError: The folder cannot be written to.
    """
    path = folder / LOCK_FILE
    try:
        stream = path.open("a+", encoding="utf-8")
    except OSError as exc:
        raise RepositoryError(
            f"cannot write {path}: {exc.strerror or exc}; run as a user who may change the repository, or use "
            "--server-only, which does not survive a restart of the server"
        ) from exc
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            stream.seek(0)
            who = stream.read().strip() or "by a process that did not say who it is"
            raise SwapBusyError(f"another swap of {folder.name!r} is going on: {who}; wait for it to end") from exc
        stream.truncate(0)
        stream.write(f"{doing}, process {os.getpid()} on {socket.gethostname()}, since {now_utc()}\n")
        stream.flush()
        yield
        stream.truncate(0)


def now_utc() -> str:
    """The time, ISO 8601, in seconds."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
