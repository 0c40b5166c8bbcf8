"""What the README shows is what happens."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

from matteserve_client._cli import cli
from matteserve_server import EmbeddedServer

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


@pytest.mark.triton
def test_python_example_prints_what_is_shown(
    demo_server: EmbeddedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = re.search(r"```python\n(from matteserve_client import Client\n.*?)```\n\n```\n(.*?)```", README, re.DOTALL)
    assert found
    code, output = found.groups()
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    exec(compile(code.replace("127.0.0.1:8001", demo_server.address), "README.md", "exec"), {})
    assert capsys.readouterr().out == output
    assert (tmp_path / "cutout.png").is_file()


def shown_commands() -> list[str]:
    text = "\n".join(path.read_text() for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))])
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    lines = [line.partition("#")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line.startswith("matteserve ")]


@pytest.mark.parametrize("command", shown_commands())
def test_shown_commands_exist_with_their_options(command: str) -> None:
    arguments = shlex.split(command)[1:]
    arguments = arguments[: arguments.index("--")] if "--" in arguments else arguments
    group: click.Command = cli
    while isinstance(group, click.Group):
        found = group.get_command(click.Context(group), arguments.pop(0))
        assert found is not None, command
        group = found
    known = {name for parameter in group.params for name in parameter.opts}
    assert {argument for argument in arguments if argument.startswith("-")} <= known


def test_make_targets_shown_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z-]+)", README)) <= targets


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
