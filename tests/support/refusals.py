"""Folds by the command, and its one line of error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from loraover.common.command_line import run
from loraover_export.cli import cli

Refused = Callable[..., str]
"""Runs a command that must refuse, and returns its message."""


def fold(source: Path, output: Path, *options: str) -> int:
    return run(cli, ["fold", str(source), "-o", str(output), *options])


def only_error(err: str) -> str:
    """The first line of our one error; transformers' own words may stand around it."""
    assert "Traceback" not in err
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, err
    return lines[0]
