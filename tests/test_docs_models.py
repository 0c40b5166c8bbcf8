"""docs/models.md says what the registry says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from matteserve_export.cli import weights
from matteserve_export.sizing import default_batch_size, gate_plan, giga_macs

PAGE = (Path(__file__).parents[1] / "docs" / "models.md").read_text(encoding="utf-8")


def test_the_table_of_weights_is_the_registry() -> None:
    """After a change: paste the output of `matteserve weights --markdown` between the two comments."""
    found = re.search(r"<!-- begin: matteserve weights --markdown -->\n(.*?)<!-- end -->", PAGE, re.DOTALL)
    assert found
    assert found.group(1) == CliRunner().invoke(weights, ["--markdown"]).stdout


@pytest.mark.parametrize(
    ("column", "architecture", "side"),
    [(1, "u2net", 320), (2, "isnet", 1024), (3, "birefnet_lite", 1024), (4, "birefnet", 1024)],
)
def test_the_table_of_defaults_is_what_an_export_chooses(column: int, architecture: str, side: int) -> None:
    rows = [line.strip("| ").split(" | ") for line in PAGE.splitlines() if line.startswith("|")]
    shown = {row[0]: row[column] for row in rows if len(row) == 5}
    cost = giga_macs(architecture, side, side)
    batch = default_batch_size(cost)
    plan = gate_plan(cost, batch)
    assert shown["giga-MACs a picture"] == f"{cost:.0f}"
    assert shown["largest batch"] == str(batch)
    assert shown["compared before publishing"].startswith(str(plan.scenes))
