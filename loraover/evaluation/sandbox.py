"""Run generated code where it can do no harm: no network, no files but its own, no end of its limits."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from loraover.errors import ConfigError

JAIL = Path(__file__).with_name("jail.py")


@dataclass(frozen=True)
class Limits:
    """What one program may use.

    Args:
        seconds: from the start of its interpreter to its end.
        processes: at the same time, threads included.
        memory_bytes: address space of each process.
        folder_bytes: of all files in its folder, and of each.
        open_files: of each process.
    """

    seconds: float = 10.0
    processes: int = 8
    memory_bytes: int = 512 * 2**20
    folder_bytes: int = 16 * 2**20
    open_files: int = 64


@dataclass(frozen=True)
class Outcome:
    """How a program ended.

    Args:
        passed: it ran to its last line.
        reason: "passed", "timed out", its exception, or how it died.
    """

    passed: bool
    reason: str


def run_program(program: str, limits: Limits = Limits()) -> Outcome:
    """Run a Python program in a process of its own, as nobody, in namespaces of its own.

    It sees the interpreter, its standard library and the system's folders, read-only, and an empty /tmp that ends
    with it. It passes if it reaches its end: leaving early, whatever the exit code, is no success.

    Raises:
        ConfigError: this system cannot do that.
    """
    if sys.platform != "linux":
        raise ConfigError(f"running generated code needs Linux, whose namespaces hold it; this is {sys.platform}.")
    token = secrets.token_hex(16)
    request = json.dumps({"program": program, "token": token}).encode()
    with (
        tempfile.TemporaryDirectory(prefix="loraover-jail-") as folder,
        tempfile.TemporaryFile() as answer,
        tempfile.TemporaryFile() as complaint,
    ):
        said = json.dumps({**asdict(limits), "folder": folder, "others": _threads_of_nobody()})
        command = [sys.executable, "-I", "-S", "-B", str(JAIL), said]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=answer, stderr=complaint, env={}, cwd="/", start_new_session=True
        )
        try:
            process.communicate(request)
        finally:
            if process.poll() is None:
                process.terminate()  # which kills what is in the jail; killing it outright might not
                process.wait()
        answer.seek(0)
        complaint.seek(0)
        text = answer.read(1000).decode(errors="replace")
        failure = complaint.read(1000).decode(errors="replace").strip()
    if failure:
        raise ConfigError(
            f"generated code cannot be held on this system: {failure}. It takes Linux 5.12 and either root or user "
            "namespaces for everyone; in a container, a seccomp profile that allows unshare and mount."
        )
    return _outcome(text, token, process.returncode)


def check_sandbox() -> None:
    """Raise ConfigError unless programs can be run here."""
    found = run_program("")
    if not found.passed:
        raise ConfigError(f"generated code cannot be run on this system: an empty program {found.reason}.")


def _outcome(text: str, token: str, code: int) -> Outcome:
    from loraover.evaluation.jail import TIMED_OUT

    if text == token:
        return Outcome(True, "passed")
    if code == TIMED_OUT:
        return Outcome(False, "timed out")
    if text:
        return Outcome(False, text)
    return Outcome(False, f"died of signal {code - 128}" if code > 128 else f"left early with exit code {code}")


def _threads_of_nobody() -> int:
    """What counts against nobody's limit of processes besides the program; a user's own namespace counts anew."""
    from loraover.evaluation.jail import NOBODY

    if os.geteuid() != 0:
        return 0
    found = 0
    for folder in Path("/proc").glob("[0-9]*/task"):
        try:
            found += len(list(folder.iterdir())) if folder.stat().st_uid == NOBODY else 0
        except OSError:  # it has ended
            continue
    return found
