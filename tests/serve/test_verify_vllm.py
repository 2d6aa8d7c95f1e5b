"""Verification of the real vLLM: one that is started for it, and one that already serves right and wrong adapters."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from serve.test_templates import TURNS, with_template
from transformers import GenerationConfig

from loraover_serve import verify_adapter
from loraover_serve.judge.names import TEMPLATE
from loraover_serve.verify.chats import pack_chats
from loraover_serve.vllm.server import VllmServerConfig

from support.recorded import record
from support.verified import save_adapter, save_base
from support.vllm_command import assert_as_trained, vllm_command
from support.vllm_loading import FEW_BLOCKS, serving_loader

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


@pytest.mark.matrix
def test_the_template_of_a_server_is_compared(tmp_path: Path) -> None:
    """The server prints its own date, and reads tools with fields that nobody sent."""
    base = save_base(tmp_path / "base", max_position_embeddings=1024)
    adapter = save_adapter(tmp_path / "shop", base)
    theirs = "<system>today is {{ strftime_now('%d %B %Y') }}|{{ tools | tojson if tools else '' }}" + TURNS
    (tmp_path / "theirs.jinja").write_text(theirs)
    (adapter / "chat_template.jinja").write_text(theirs)
    told = json.loads(gzip.decompress(record(base, adapter, tmp_path).read_bytes()))
    right, other, found = tmp_path / "right.json", tmp_path / "other.json", {}
    for conversation in told["chats"]["conversations"]:
        first, after = conversation["date"]
        conversation["tokens"][first:after] = conversation["tokens"][first:after][::-1]  # of another day
    right.write_text(json.dumps(told))
    other.write_text(json.dumps(told | pack_chats(with_template(TURNS), told["vocabulary"])))
    options = ("--dtype", "float32", "--enforce-eager", *FEW_BLOCKS)
    config = VllmServerConfig(
        model=str(base),
        adapters={"shop": adapter},
        max_lora_rank=8,
        max_loras=1,
        options=(*options, "--chat-template", str(tmp_path / "theirs.jinja")),
    )
    with serving_loader(config, tmp_path / "vllm.log") as server:
        for file in (right, other):
            asked: dict[str, Any] = {"endpoint": server.url, "served_name": "shop", "without_mixed": True}
            (found[file],) = verify_adapter(references=[file], **asked).engines
            print(f"\n{found[file].verdict}: {found[file].reason}")
    assert (found[right].verdict, found[right].fault) == ("as trained", None)
    assert "chats have the tokens of the recorded template" in str(found[right].template)
    assert (found[other].verdict, found[other].fault) == ("differs", TEMPLATE)
    assert 'prompt differs at token 1 of a chat (user): the server reads "<system>t"' in found[other].reason
