"""The command `vllm` that tests start: $LORAOVER_VLLM, or the one that `make vllm` installs."""

from __future__ import annotations

import os
import subprocess
from functools import cache
from pathlib import Path

import pytest
from packaging.version import Version

DEFAULT = Path(__file__).resolve().parents[2] / ".venv-vllm" / "bin" / "vllm"


def vllm_command() -> Path:
    """Path of the command; skips the test if there is none."""
    path = Path(os.environ.get("LORAOVER_VLLM") or DEFAULT)
    if not path.is_file():
        pytest.skip(f"{path}: no such command; `make vllm` installs it, or name one in LORAOVER_VLLM")
    return path


@cache
def leaks_in_mixed_batches() -> bool:
    """Whether this vLLM computes base rows of a mixed batch with an adapter: on a CPU, before 0.33.

    What `vllm --version` prints, without the ten seconds of imports that it takes.
    """
    words = [
        str(vllm_command().with_name("python")),
        "-c",
        "from importlib.metadata import version; print(version('vllm'))",
    ]
    version = Version(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
    return version < Version("0.33") and "cpu" in (version.local or "")
