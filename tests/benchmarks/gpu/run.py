"""Measurements in processes of their own: each has a time limit, and one that fails does not stop the others."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from loraover.common.atomic_output import publish_text

from benchmarks.gpu.parts import Part

TESTS = Path(__file__).parents[2]
LAST_LINES = 12
"""Lines of a failed measurement's output that the page quotes."""
GRACE_S = 20
"""Seconds that a measurement gets to stop what it has started, such as a server."""


class Outcome(NamedTuple):
    """What became of one measurement.

    Args:
        seconds: Seconds that it took.
        found: Its record: tables in Markdown, and numbers; after a failure, those that it had found before.
        reason: Why it is not complete, in words and with the last lines of its output; empty if it is.
    """

    seconds: float
    found: dict[str, Any]
    reason: str = ""


def run_part(name: str, plan: str, part: Part, folder: Path, place: Mapping[str, str], left_s: float) -> Outcome:
    """Run a measurement, unless its record is there and from the same place.

    Args:
        name: Name of the measurement.
        plan: Name of the plan that has it.
        part: The measurement.
        folder: Folder of the records `<name>.json` and of the outputs `<name>.log`.
        place: Commit, device and plan of what is measured.
        left_s: Seconds left for all measurements.
    """
    record, log = folder / f"{name}.json", folder / f"{name}.log"
    kept = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    if kept.get("place") == dict(place):
        return Outcome(kept["seconds"], kept)
    limit_s = min(part.limit_s, left_s)
    if limit_s <= 0:
        return Outcome(0.0, {}, "It was not begun, since the time for all measurements was over.")
    draft, started = folder / f"{name}.draft.json", time.monotonic()
    draft.unlink(missing_ok=True)
    code = _run([sys.executable, "-m", "benchmarks.gpu", "--plan", plan, "--part", name, str(draft)], log, limit_s)
    seconds = time.monotonic() - started
    found = json.loads(draft.read_text(encoding="utf-8")) if draft.is_file() else {}
    draft.unlink(missing_ok=True)
    if code != 0:
        why = f"ended with exit code {code}" if code is not None else f"was ended after {limit_s:.0f} s"
        tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:]
        return Outcome(seconds, found, "\n".join([f"Its process {why}. The last lines of its output:", "", *tail]))
    found |= {"seconds": seconds, "place": dict(place)}
    publish_text(record, json.dumps(found, indent=1))
    return Outcome(seconds, found)


def _run(command: list[str], log: Path, limit_s: float) -> int | None:
    """Run a command with its output in a file, and return its exit code; None: it was ended with all its children."""
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(command, cwd=TESTS, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            return process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return None
        finally:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Interrupt a process and its children; kill those that go on."""
    with suppress(ProcessLookupError, subprocess.TimeoutExpired):
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
            process.wait(GRACE_S)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
