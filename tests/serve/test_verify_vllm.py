"""Verification of the real vLLM: one that is started for it, and one that already serves right and wrong adapters."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import GenerationConfig

from loraover_serve import verify_adapter

from support.verified import save_adapter, save_base
from support.vllm_command import assert_as_trained, vllm_command
from support.vllm_loading import FEW_BLOCKS

pytestmark = pytest.mark.engine


def test_a_server_that_is_started_answers_as_trained(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    GenerationConfig(repetition_penalty=5.0).save_pretrained(base)  # as Qwen2.5's 1.1, which vLLM takes for its default
    adapter = save_adapter(tmp_path / "adapter", base)
    options = ("--dtype", "float32", "--enforce-eager", *FEW_BLOCKS)
    report = verify_adapter(adapter, engines=["vllm"], vllm=vllm_command(), options=options, output=tmp_path / "out")
    (found,) = report.engines
    print(f"\n{found.verdict}: {found.reason}")
    assert (found.number_format, found.compared) == ("fp32", "top tokens")
    assert_as_trained(found)
    assert found.mixed is not None
    assert found.mixed.other is not None
    print(found.mixed)
    assert found.greedy is not None
    assert found.greedy.equal == 1
    assert (tmp_path / "out" / "vllm.log").is_file()
