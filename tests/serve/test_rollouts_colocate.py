"""The judge of rollouts beside a vLLM that runs in the trainer's own process, as `vllm_mode="colocate"` has it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from loraover_serve.judge.names import NOT_APPLIED

from support.tiny_hub import save_llama
from support.vllm_command import vllm_command

pytestmark = [pytest.mark.engine, pytest.mark.matrix]

ROOT = Path(__file__).parents[2]


def found(base: Path, output: Path, fault: str) -> list[dict[str, Any]]:
    """Findings of all steps of a run."""
    paths = [ROOT, *(ROOT / name for name in ("export", "serve", "tests"))]
    settings = {
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }
    arguments = [sysconfig.get_path("purelib"), str(base), str(output), fault]
    command = [str(vllm_command().with_name("python")), "-m", "support.trl_colocate", *arguments]
    done = subprocess.run(command, env=os.environ | settings, stdout=sys.stderr, check=False)
    assert done.returncode == 0
    told: list[dict[str, Any]] = json.loads((output / "findings.json").read_text())
    return told


@pytest.mark.parametrize("fault", ["", "base"])
def test_an_engine_in_the_trainers_process_is_judged(fault: str, tmp_path: Path) -> None:
    base = save_llama(tmp_path / "base", hidden_size=64, num_attention_heads=2, num_key_value_heads=2)
    verdicts = [(step["verdict"], step["fault"]) for step in found(base, tmp_path / "run", fault)]
    assert len(verdicts) == 6
    assert ("differs" in {verdict for verdict, _ in verdicts}) is bool(fault), verdicts
    assert verdicts[-1] == (("differs", NOT_APPLIED) if fault else ("as trained", None)), verdicts
