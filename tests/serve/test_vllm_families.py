"""A tiny model of every family, served by the real vLLM with an adapter that the command wrote, against PEFT."""

from __future__ import annotations

from pathlib import Path

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM

from loraover.common.command_line import run
from loraover_export.cli import cli
from loraover_serve.vllm.server import VllmServerConfig, serve_vllm

from support.agreement import agreement
from support.engine_forms import TINY
from support.plain_adapter import FAMILIES, make_adapter
from support.tiny_hub import tiny_tokenizer
from support.tiny_models import token_ids
from support.vllm_command import vllm_command

pytestmark = pytest.mark.matrix


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_served_as_peft_computes_it(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    adapter, base = make_adapter(tmp_path, family), tmp_path / "base"
    tiny_tokenizer().save_pretrained(base)
    assert run(cli, ["vllm", str(adapter), "-o", str(tmp_path / "out"), "--dtype", "fp32"]) == 0
    config = VllmServerConfig(
        model=str(base),
        adapters={"adapter": tmp_path / "out"},
        max_lora_rank=8,
        options=TINY,
    )
    prompts: list[list[int]] = token_ids(batch=8, length=12).tolist()
    with serve_vllm(config, tmp_path / "log", executable=str(vllm_command())) as client:
        plain, adapted = (client.complete_batch(name, prompts, max_tokens=32) for name in (str(base), "adapter"))
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    noise, effect = agreement(model, prompts, plain), agreement(model, prompts, adapted)
    found = agreement(PeftModel.from_pretrained(model, tmp_path / "out").eval(), prompts, adapted)
    assert found.gaps == []
    assert effect.largest > 100 * noise.largest
    assert found.largest <= 3 * noise.largest + 1e-5
