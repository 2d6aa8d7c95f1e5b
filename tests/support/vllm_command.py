"""The command `vllm` that tests start: $LORAOVER_VLLM, or the one that `make vllm` installs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

DEFAULT = Path(__file__).resolve().parents[2] / ".venv-vllm" / "bin" / "vllm"


def vllm_command() -> Path:
    """Path of the command; skips the test if there is none."""
    path = Path(os.environ.get("LORAOVER_VLLM") or DEFAULT)
    if not path.is_file():
        pytest.skip(f"{path}: no such command; `make vllm` installs it, or name one in LORAOVER_VLLM")
    return path
