"""Whether bubblewrap can hold a program here, found out without our own code."""

from __future__ import annotations

import shutil
import subprocess

import pytest


def _why_not() -> str:
    """Return why bubblewrap cannot hold a program here; an empty string if it can."""
    if shutil.which("bwrap") is None:
        return "bubblewrap is not installed (make sandbox)"
    words = "bwrap --unshare-ipc --unshare-pid --unshare-net --ro-bind / / true"
    return subprocess.run(words.split(), capture_output=True, text=True).stderr.strip()


needs_bubblewrap = pytest.mark.skipif(bool(reason := _why_not()), reason=reason)
