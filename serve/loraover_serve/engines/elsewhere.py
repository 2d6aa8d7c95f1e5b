"""Engines in separate environments, whose python this package starts: their libraries do not fit beside ours."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as LateError
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from loraover.common.errors import EngineError
from loraover_serve.engines import EngineRequest, runner
from loraover_serve.engines.base import Engine
from loraover_serve.engines.installed import installed_version, version_beside

TAIL = 1500  # characters of a log in a message
ENDING_S = 10.0


class Runner:
    """A running engine, which answers one request after the other.

    Args:
        name: Name of the engine.
        process: Its process.
        log: File with what it printed.
        timeout_s: Seconds that an answer may take.
    """

    def __init__(self, name: str, process: subprocess.Popen[str], log: Path, timeout_s: float) -> None:
        self._name, self._process, self._log, self._timeout_s = name, process, log, timeout_s

    def ask(self, method: str, **arguments: Any) -> Any:
        """Call a method of the engine, and return its result.

        Raises:
            EngineError: An error of the engine, or a process that ended or gives no answer.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        reader = ThreadPoolExecutor(1)
        try:
            self._process.stdin.write(json.dumps({"method": method, **arguments}) + "\n")
            self._process.stdin.flush()
            line = reader.submit(self._process.stdout.readline).result(self._timeout_s)
        except LateError:
            self._process.kill()
            raise EngineError(
                f"{self._name}: no answer within {self._timeout_s:g} s; raise the start timeout."
            ) from None
        except OSError:
            line = ""
        finally:
            reader.shutdown(wait=False)
        if not line:
            raise EngineError(f"{self._name}: the process has ended: {tail(self._log)}")
        answer = json.loads(line)
        if "error" in answer:
            raise EngineError(f"{self._name}: {answer['error']}")
        return answer["result"]


class ElsewhereEngine(Engine):
    """An engine in a separate environment, which the Makefile's target of the engine's name makes.

    Args:
        runner: The running engine.
        scratch: Folder for what it writes.
    """

    name: str
    """Name of its program in `runner.RUNNERS`."""

    variable: ClassVar[str]
    """Environment variable that names the environment's python."""

    def __init__(self, runner: Runner, scratch: Path) -> None:
        self._runner, self._scratch = runner, scratch

    @classmethod
    def python(cls) -> str | None:
        """The python that runs the engine: the one that the variable names, or this one; None if it has no engine."""
        given = os.environ.get(cls.variable)
        if given:
            return given if shutil.which(given) is not None else None
        return sys.executable if installed_version(cls.distributions) is not None else None

    @classmethod
    def installed(cls) -> str | None:
        python = cls.python()
        return None if python is None else version_beside(python, cls.distributions)

    @classmethod
    def lacking(cls, request: EngineRequest) -> str | None:
        if cls.installed() is not None:
            return None
        given = os.environ.get(cls.variable)
        found = f"found no {cls.distributions[0]} in {given}" if given else f"{cls.variable} is not set"
        return f"{cls.hint}, and name its python with {cls.variable} ({found})"

    @classmethod
    @contextmanager
    def run(cls, arguments: Mapping[str, Any], log: Path, timeout_s: float) -> Iterator[Runner]:
        """Start the engine's program, and stop it after the block.

        Args:
            arguments: Arguments of its class in `runner.RUNNERS`.
            log: File for what the engine prints.
            timeout_s: Seconds that an answer may take.

        Raises:
            EngineError: A process that does not start.
        """
        words = [str(cls.python()), "-I", runner.__file__, cls.name, json.dumps(arguments)]
        with log.open("wb") as errors:
            process = start_process(cls.name, words, errors)
        try:
            yield Runner(cls.name, process, log, timeout_s)
        finally:
            end_process(process, ENDING_S)

    def generate(self, arm: str, prompts: Sequence[Sequence[int]], tokens: int) -> list[tuple[int, ...]]:
        return [tuple(self._runner.ask("greedy", arm=arm, prompt=list(prompt), tokens=tokens)) for prompt in prompts]


def start_process(name: str, words: Sequence[str], errors: Any) -> subprocess.Popen[str]:
    """Start a command with pipes. Given to a python, -I keeps this environment's packages from it."""
    pipe = subprocess.PIPE
    try:
        return subprocess.Popen(list(words), stdin=pipe, stdout=pipe, stderr=errors, text=True, encoding="utf-8")
    except OSError as error:
        raise EngineError(f"{name}: {words[0]} cannot be started: {error.strerror or error}.") from error


def end_process(process: subprocess.Popen[str], patience_s: float) -> None:
    """Close a process's input, which ends a runner, and kill the process if it runs on for too long."""
    try:
        process.communicate(timeout=patience_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()


def tail(log: Path) -> str:
    """The end of a log, in one line."""
    return " ".join(log.read_text(encoding="utf-8", errors="replace")[-TAIL:].split()) or "it printed nothing"
