"""Forked processes for tests of permissions, full disks and signals; a fork has everything imported already."""

from __future__ import annotations

import faulthandler
import os
import resource
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass

STUCK = 240
"""Seconds after which a child shows where it is and ends: a lock that a thread held at the fork is never free."""


@dataclass(frozen=True)
class Ended:
    """How a child process ended: its exit code, or the negative number of the signal that killed it."""

    code: int
    output: str


class Child:
    """A command in a forked process; `prepare` runs in there first."""

    def __init__(self, command: Callable[[], int], *, prepare: Callable[[], object] = lambda: None) -> None:
        read, write = os.pipe()
        sys.stdout.flush()
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # until the child can say that it was interrupted
        self.pid = os.fork()
        if self.pid:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
            os.close(write)
            self._output = os.fdopen(read)
            return
        code = 99
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            sys.stdout = sys.stderr = os.fdopen(write, "w", buffering=1)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
            faulthandler.dump_traceback_later(STUCK, exit=True, file=sys.stderr)
            prepare()
            code = command()
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        except KeyboardInterrupt:  # in the few lines around the command
            print("Interrupted.")
            code = 130
        except BaseException as error:
            print(f"Traceback, in short:\n{type(error).__name__}: {error}")
        finally:
            os._exit(code)

    def read_until(self, words: str) -> str:
        """Output up to the line with these words, or all of it if there is none; `end` has the rest."""
        lines: list[str] = []
        for line in self._output:
            lines.append(line)
            if words in line:
                break
        return "".join(lines)

    def end(self) -> Ended:
        with self._output:
            output = self._output.read()
        _, status = os.waitpid(self.pid, 0)
        return Ended(os.waitstatus_to_exitcode(status), output)


def become_nobody() -> None:
    """Become an unprivileged user if this one is root, whom no permission stops."""
    if os.getuid() == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)


def limit_file_size(size: int) -> None:
    """Limit the size of files."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
