"""The command `vllm` that tests start, $LORAOVER_VLLM or what `make vllm` installs, and what it has to answer."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import pytest
from packaging.version import Version

from loraover_serve import EngineResult
from loraover_serve.judge.names import LEAKS
from loraover_serve.vllm.server import vllm_version

DEFAULT = Path(__file__).resolve().parents[2] / ".venv-vllm" / "bin" / "vllm"


def vllm_command() -> Path:
    """Path of the command; skips the test if there is none."""
    path = Path(os.environ.get("LORAOVER_VLLM") or DEFAULT)
    if not path.is_file():
        pytest.skip(f"{path}: no such command; `make vllm` installs it, or name one in LORAOVER_VLLM")
    return path


@cache
def leaks_in_mixed_batches() -> bool:
    """Whether this vLLM computes base rows of a mixed batch with an adapter: on a CPU, before 0.33."""
    version = Version(vllm_version(str(vllm_command())) or "0")
    return version < Version("0.33") and "cpu" in (version.local or "")


def assert_as_trained(found: EngineResult) -> None:
    """The adapter is as trained; vLLM before 0.33 has a fault in mixed batches on a CPU, which is named if it shows.

    Whether requests share a batch is the server's choice. The cells of test_engine_forms.py expect the fault.
    """
    assert found.adapter is not None
    assert found.allowed is not None
    assert found.mixed is not None
    allowed = {("as trained", None)} | ({("differs", LEAKS)} if leaks_in_mixed_batches() else set())
    assert (found.verdict, found.fault) in allowed, found.reason
    assert found.adapter.rms <= found.allowed
    assert found.mixed.adapter.rms <= found.allowed
