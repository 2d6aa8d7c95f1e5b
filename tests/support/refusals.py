"""Folds by the command, and its one line of error."""

from __future__ import annotations

from pathlib import Path

from loraover.common.command_line import run
from loraover_export.cli import cli


def fold(source: Path, output: Path, *options: str) -> int:
    return run(cli, ["fold", str(source), "-o", str(output), *options])


def one_message(err: str) -> str:
    """The only line of an error stream, without the "error: " in front."""
    assert "Traceback" not in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert len(err) < 2000
    return err.removeprefix("error: ").strip()


def only_error(err: str) -> str:
    """The first line of our one error; transformers' own words may stand around it."""
    assert "Traceback" not in err
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]
