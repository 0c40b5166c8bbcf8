"""What a search for an engine's best setting found: table, intervals and diff for people, JSON for programs."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from google.protobuf import text_format

from matteserve_bench.environment import format_environment
from matteserve_bench.records import Load
from matteserve_bench.report import finite
from matteserve_bench.tuning import Outcome, Stage


@dataclass(frozen=True)
class TuningReport:
    """What a search found, and how.

    Attributes:
        outcome: What was found.
        load: Under which load.
        header: What it was measured on.
        slo_ms: Bound of p99 in milliseconds; None if there was none.
        notes: What a reader should know.
        diff: The proposed change; empty if there is none.
    """

    outcome: Outcome
    load: Load
    header: Mapping[str, Any]
    slo_ms: float | None = None
    notes: Sequence[str] = ()
    diff: str = ""

    def text(self) -> str:
        """For people."""
        bound = "" if self.slo_ms is None else f", p99 <= {self.slo_ms:g} ms"
        engine = self.header["model"]["engine_name"]
        lines = [f"{self.load.model} -> {engine} at {self.load.pace}, tensors over {self.load.transport}{bound}"]
        for stage in self.outcome.stages:
            lines += ["", *_table(stage)]
        if self.outcome.changes:
            lines += ["", f"{'':<9} {'present':>9} {'best':>9} {'change':>8}  95 % interval"]
        for change in self.outcome.changes:
            verdict = ("better" if change.better else "worse") if change.outside_noise else "within the noise"
            lines.append(
                f"{change.metric:<9} {change.a:9.2f} {change.b:9.2f} {change.ratio - 1:+8.1%}"
                f"  {change.low - 1:+.1%} to {change.high - 1:+.1%}  {verdict}"
            )
        lines.append("")
        turns = [figures for stage in self.outcome.stages for trial in stage.trials for figures in trial.turns]
        invalid = [figures.invalid for figures in turns if figures.invalid]
        if invalid:
            lines.append(f"Note: {len(invalid)} of {len(turns)} measurements are INVALID, the first: {invalid[0]}")
        lines += [f"Note: {note}" for note in self.notes]
        if self.outcome.not_tried:
            settings = "; ".join(map(str, self.outcome.not_tried))
            lines.append(f"Note: no room was left (--max-trials) for {len(self.outcome.not_tried)} more: {settings}")
        if self.outcome.interrupted:
            lines.append("Interrupted: no proposal")
        elif self.outcome.proposal is None:
            lines.append(f"Keep what you have ({self.outcome.present}): {self.outcome.reason}")
        else:
            lines += [f"Proposal: {self.outcome.proposal}, for {self.outcome.reason}", "", self.diff.rstrip("\n"), ""]
        lines.append(f"Environment: {format_environment(self.header)}")
        return "\n".join(lines)

    def to_dict(self, *, written: bool) -> dict[str, Any]:
        """The same for JSON, with every measurement.

        Args:
            written: Whether the proposal was written into `config.pbtxt`.
        """
        found: dict[str, Any] = finite(asdict(self.outcome))
        return {
            "environment": dict(self.header),
            "load": finite(asdict(self.load)),
            "slo_ms": self.slo_ms,
            **found,
            "notes": list(self.notes),
            "diff": self.diff,
            "written": written,
        }


def unified_diff(before: str, after: str, path: Path | None, engine: str) -> str:
    """The proposed change of `config.pbtxt`, as `patch` reads it; empty if there is none.

    Args:
        before: The file as it is.
        after: As it is proposed.
        path: Where it is; None says that the server's word stands in for it.
        engine: Name of the engine.
    """
    name = f"{engine}/config.pbtxt" if path is None else path.as_posix()
    old, new = (text.splitlines(keepends=True) for text in (before, after))
    lines = list(difflib.unified_diff(old, new, name, name))
    if any(line.startswith("-") and "#" in line for line in lines[2:]):
        lines.insert(0, "# comments of the file would be lost: protobuf's text format does not keep them\n")
    return "".join(lines)


def to_pbtxt(config: Any) -> str:
    """A configuration in the form in which the exporter writes it."""
    return str(text_format.MessageToString(config))


def _table(stage: Stage) -> list[str]:
    width = max(len(stage.name), *(len(str(trial.setting)) for trial in stage.trials))
    lines = [f"{stage.name:<{width}} {'images/s':>9} {'p50 ms':>8} {'p99 ms':>8} {'batch':>6} {'MiB':>6}"]
    for trial in stage.trials:
        if (figures := trial.figures) is None:
            lines.append(f"{trial.setting!s:<{width}} {'-':>9} {'-':>8} {'-':>8} {'-':>6} {'-':>6}  {trial.verdict}")
            continue
        batch = "-" if figures.mean_batch is None else f"{figures.mean_batch:.2f}"
        memory = "-" if figures.server_mib is None else f"{figures.server_mib:.0f}"
        lines.append(
            f"{trial.setting!s:<{width}} {figures.images_per_s:9.2f} {figures.p50_ms:8.1f} {figures.p99_ms:8.1f}"
            f" {batch:>6} {memory:>6}  {trial.verdict}"
        )
    return lines
