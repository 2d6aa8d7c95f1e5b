"""The verdicts of `loraover export check` on vLLM, beside what vLLM's own loader does with the same adapters."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from loraover_export.vllm.launch import MAX_LORA_RANKS

from support.check_cases import CASES, EXPECTED
from support.plain_adapter import make_adapter
from support.vllm_command import vllm_command

pytestmark = pytest.mark.engine

READER = Path(__file__).with_name("vllm_reader.py")
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens", "lm_head")


@pytest.fixture(scope="module")
def refusals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    """Why vLLM's loader refuses each case; None where it does not."""
    folder = tmp_path_factory.mktemp("cases")
    source = make_adapter(folder / "llama", "Llama", rank_pattern={}, r=4, lora_alpha=4)
    adapters = []
    for number, change in enumerate(CASES.values()):
        path = shutil.copytree(source, folder / str(number))
        change(path)
        adapters.append({"path": str(path), "expected": MODULES, "rank": MAX_LORA_RANKS[-1]})
    out = tmp_path_factory.mktemp("deltas")
    request = json.dumps({"adapters": adapters, "architectures": [], "names": {}, "out": str(out)})
    python = vllm_command().parent / "python"
    done = subprocess.run([python, READER], input=request, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip(CASES, json.loads(done.stdout.splitlines()[-1])["read"], strict=True))


@pytest.mark.parametrize("name", CASES)
def test_vllm_loads_what_is_not_refused(name: str, refusals: dict[str, str | None]) -> None:
    assert (refusals[name] is not None) == (EXPECTED["vllm"][name][0] == "refused"), refusals[name]
