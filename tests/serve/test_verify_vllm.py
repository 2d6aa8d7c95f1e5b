"""Verification of the real vLLM: one that is started for it, and one that already serves right and wrong adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig

from loraover_serve import EngineResult, verify_adapter

from support.agreement import PROMPTS
from support.serving import Served
from support.verified import save_adapter, save_base
from support.vllm_command import assert_as_trained, vllm_command
from support.vllm_loading import FEW_BLOCKS

pytestmark = pytest.mark.engine


def verify(served: Served, adapter: Path, name: str, **options: Any) -> EngineResult:
    report = verify_adapter(
        adapter, endpoint=served.client.url, served_name=name, base_name=served.source.location, **options
    )
    (found,) = report.engines
    print(f"\n{name}: {found.verdict}: {found.reason}")
    return found


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


@pytest.mark.matrix
def test_a_plain_lora_is_served_as_peft_computes_it(served: Served) -> None:
    found = verify(served, served.adapters["vanilla"], "vanilla")
    assert found.number_format == "bf16"
    assert_as_trained(found)


@pytest.mark.matrix
def test_an_exported_checkpoint_is_served_as_its_unfolded_model(served: Served) -> None:
    assert_as_trained(verify(served, served.sources["folded"], "folded"))


@pytest.mark.matrix
def test_a_wrong_prefix_is_named(served: Served) -> None:
    with served.loaded("misplaced", served.guests["misplaced"]):
        found = verify(served, served.adapters["vanilla"], "misplaced")
    assert (found.verdict, found.fault) == ("differs", "served as base")


@pytest.mark.matrix
def test_a_wrong_scaling_is_named(served: Served, tmp_path: Path) -> None:
    """From two prompts, since PyTorch runs each of them with every suspected fault."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS[:2]))
    with served.loaded("doubled", served.guests["doubled"]):
        found = verify(served, served.adapters["vanilla"], "doubled", prompts=prompts, new_tokens=4)
    assert (found.verdict, found.fault) == ("differs", "wrong scaling")
    assert "times 2" in found.reason
