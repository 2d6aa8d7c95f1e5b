"""What tests of the lab share: a base model, and a small recipe, whose trainings in studies are forks."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import IO
from unittest.mock import patch

import pytest

from loraover.cli import cli
from loraover.common.command_line import run

from support.no_network import no_network as no_network
from support.no_network import reached as reached
from support.tiny_hub import save_llama, write_recipe


class ForkedTraining:
    """Takes the place of `subprocess.Popen` of `python -m loraover.cli ARGUMENTS`; descriptors are passed on anyway."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        stdin: int,
        stdout: IO[str],
        stderr: IO[str],
        env: Mapping[str, str],
        pass_fds: Sequence[int],
    ) -> None:
        interpreter, option, module, *arguments = command
        assert (interpreter, option, module) == (sys.executable, "-m", "loraover.cli")
        self.returncode: int | None = None
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid:
            return
        code = 99
        try:
            os.environ.update(env)
            os.dup2(stdout.fileno(), 1)
            os.dup2(stderr.fileno(), 2)
            sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
            code = run(cli, arguments)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            code = 1
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def wait(self) -> int:
        """Wait for its end; returns the exit code, negative for a signal."""
        self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode


@pytest.fixture(scope="module", autouse=True)
def forked() -> Iterator[None]:
    """Trainings are forks, but for those of the tests that ask for `as_users_have_it`."""
    forking = SimpleNamespace(Popen=ForkedTraining, DEVNULL=subprocess.DEVNULL)
    with patch("loraover_lab.study.outcome.subprocess", forking):
        yield


@pytest.fixture
def as_users_have_it() -> Iterator[None]:
    with patch("loraover_lab.study.outcome.subprocess", subprocess):
        yield


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    evaluation = {"examples": 12, "exact_match": False}
    return write_recipe(folder / "words.yaml", save_llama(folder / "llama"), evaluation=evaluation)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, which tests only read."""
    return save_llama(tmp_path_factory.mktemp("base") / "llama")
