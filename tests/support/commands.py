"""`matteserve` commands, run inside the test."""

from __future__ import annotations

import inspect

from click.testing import CliRunner, Result

from matteserve_client._cli import cli

# click before 8.2 mixes stdout and stderr unless told not to.
_SEPARATE = {"mix_stderr": False} if "mix_stderr" in inspect.signature(CliRunner).parameters else {}


def command(*arguments: object) -> Result:
    """Run `matteserve` with these arguments."""
    return CliRunner(**_SEPARATE).invoke(cli, [str(argument) for argument in arguments])
