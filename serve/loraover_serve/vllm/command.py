"""Which command starts vLLM."""

from __future__ import annotations

import os
from pathlib import Path

COMMAND_VARIABLE = "LORAOVER_VLLM"
"""The environment variable that names the command `vllm` of another environment."""


def vllm_command(given: str | Path | None = None) -> str:
    """The command that starts vLLM: the given one, else $LORAOVER_VLLM, else `vllm`."""
    return str(given or os.environ.get(COMMAND_VARIABLE) or "vllm")
