"""The studies that the Makefile plans, without running them."""

from __future__ import annotations

import shlex
import subprocess
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest

from loraover.cli import cli
from loraover.common.command_line import run
from loraover.study.grid import Run, grid_of
from loraover.study.request import StudyRequest

ROOT = Path(__file__).parents[2]


@cache
def planned(target: str) -> tuple[list[Run], int, list[Path]]:
    """All runs that a target of the Makefile asks for, its tuning seeds (0 for all), and the studies that it reuses."""
    dry = ["make", "--dry-run", "--no-print-directory", target]
    printed = subprocess.run(dry, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    (line,) = [line for line in printed.replace("\\\n", " ").splitlines() if "loraover study" in line]
    asked: list[StudyRequest] = []

    def keep(request: StudyRequest) -> SimpleNamespace:
        asked.append(request)
        return SimpleNamespace(exit_code=0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("loraover.study.runner.run_study", SimpleNamespace(__wrapped__=keep))
        patch.setattr("loraover.study.show.show_study", Mock())
        patch.chdir(ROOT)
        assert run(cli, shlex.split(line)[1:]) == 0
        request = asked[0].whole()
        runs = grid_of(request)
    return runs, request.tuning_seeds or 0, [ROOT / study for study in request.reuse]
