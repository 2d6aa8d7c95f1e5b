"""Regular expressions of PEFT's configurations, matched with paths of modules as PEFT does, in bounded time.

A pattern of twenty characters can keep Python's `re` busy for years, which no thread can interrupt, since `re` holds
the interpreter's lock. Other engines read some patterns otherwise than `re`, which PEFT uses. So `re` matches whatever
can backtrack in a process beside this one, which a timer of its processor time ends.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from functools import lru_cache
from threading import Lock

from loraover.checkpoint.files import CONFIG_FILE
from loraover.common.errors import CheckpointError, ProcessError

ENDING = r"(.*\.)?({})$"
"""Pattern around an entry of `rank_pattern` and the like: the end of a path."""
PART = r"(^|.*\.){}($|\..*)"
"""Pattern around an entry of `modules_to_save`: some parts of a path."""
LAYER = r"(?:^|.*?\.){}\.(?P<idx>\d+)\."
"""Pattern around an entry of `layers_pattern`: what stands before a number."""
ALL = "{}"
"""Pattern of `target_modules` or `exclude_modules`: a path from end to end."""

LIMIT_S = 1.0
"""Processor time that a pattern may take with all paths together; those that take less than a millisecond are free."""

CACHED = 2**16

_ESCAPED = re.compile(r"\\\W")
_REPEATS = re.compile(r"\.\*|\\d\+")
MOST_REPEATS = 2
LONGEST_PATH = 200
"""Characters of a path up to which a pattern with `MOST_REPEATS` of ".*" takes milliseconds at most."""

_WORKER = """
import json, re, signal, sys, time
signal.signal(signal.SIGPROF, signal.SIG_DFL)
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGPROF])
spent = {}
for line in sys.stdin:
    pattern, is_all, path, limit = json.loads(line)
    before = spent.get(pattern, 0.0)
    signal.setitimer(signal.ITIMER_PROF, max(limit - before, 0.001))
    started = time.process_time()
    found = (re.fullmatch if is_all else re.match)(pattern, path)
    took = time.process_time() - started
    signal.setitimer(signal.ITIMER_PROF, 0)
    if took > 0.001:
        spent[pattern] = before + took
    print(json.dumps(found and found.groupdict()), flush=True)
"""


class SlowPatternError(CheckpointError):
    """A regular expression that takes too long to be matched, also in PEFT."""


def match_path(form: str, entry: str, path: str) -> Mapping[str, str | None] | None:
    """Return the named groups of the match of a path as PEFT finds it; None if it does not match.

    Raises:
        re.error, OverflowError, RecursionError: The entry is not a regular expression in that form.
        SlowPatternError: It takes more than `LIMIT_S` of processor time.
        ProcessError: Somebody has ended the process that matches.
    """
    pattern, is_all = form.replace("{}", entry), form == ALL
    compiled = _compiled(pattern)
    if len(path) <= LONGEST_PATH and _is_simple(entry):
        found = compiled.fullmatch(path) if is_all else compiled.match(path)
        return found and found.groupdict()
    answer = _ask(pattern, is_all, path)
    if answer is None:
        raise SlowPatternError(
            f"the pattern {entry!r:.200} of {CONFIG_FILE} takes more than {LIMIT_S:g} s to match module names "
            f"such as {path!r:.200}, in PEFT too; write it without nested repetitions."
        )
    found_groups: Mapping[str, str | None] | None = json.loads(answer)
    return found_groups


_compiled = lru_cache(CACHED)(re.compile)


@lru_cache(CACHED)
def _is_simple(entry: str) -> bool:
    """Whether a pattern is text with a few repetitions side by side, so that trying all its matches is quick."""
    rest, repeats = _REPEATS.subn("", _ESCAPED.sub("_", entry))
    return repeats <= MOST_REPEATS and not any(part in rest for part in r"\*+?{[|(")


@lru_cache(CACHED)
def _ask(pattern: str, is_all: bool, path: str) -> str | None:
    """Return the worker's answer; None if the pattern has used up its time."""
    return _worker.ask(json.dumps([pattern, is_all, path, LIMIT_S]))


class _Worker:
    """Process that matches, started when it is first asked, and again after a pattern has ended it."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._process: subprocess.Popen[str] | None = None

    def ask(self, question: str) -> str | None:
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._process = subprocess.Popen(
                    [sys.executable, "-I", "-S", "-c", _WORKER],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    text=True,
                    start_new_session=True,  # an interrupt from the keyboard is for this process alone
                )
            process = self._process
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(f"{question}\n")
            process.stdin.flush()
            if answer := process.stdout.readline():
                return answer
            code = process.wait()
            self._end()
            if code != -signal.SIGPROF:
                raise ProcessError(f"the process that matches patterns has ended with code {code}; start again.")
            return None

    def end(self) -> None:
        with self._lock:
            self._end()

    def _end(self) -> None:
        if self._process is not None:
            with self._process as process:  # which closes its pipes and waits for it
                process.kill()
            self._process = None


_worker = _Worker()


def _forget() -> None:
    """Forget the worker in a forked process, which would otherwise read answers to its parent's questions."""
    global _worker
    _worker = _Worker()


os.register_at_fork(after_in_child=_forget)
atexit.register(lambda: _worker.end())
