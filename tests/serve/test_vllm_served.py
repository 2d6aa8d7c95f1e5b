"""The real vLLM serves adapters over HTTP; PEFT agrees as far as the two engines agree on the base model."""

from __future__ import annotations

from collections.abc import Sequence
from math import hypot
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel

from loraover_export.formats.vllm.releases import known_architectures
from loraover_serve.vllm.client import Completion

from support.agreement import NEW_TOKENS, Agreement, agreement
from support.compatibility import record
from support.serving import Served

pytestmark = [pytest.mark.engine, pytest.mark.matrix]

SURE = 5  # standard errors
FEW = 8  # prompts, where a difference is large


@pytest.fixture(scope="module")
def noise(served: Served) -> Agreement:
    """The two engines on the base model."""
    return compare(served.base(), served, generate(served, served.source.location))


def generate(served: Served, model: str, prompts: int | None = None) -> list[Completion]:
    return served.client.complete_batch(model, served.prompts[:prompts], max_tokens=NEW_TOKENS)


def peft(served: Served, folder: Path) -> Any:
    """The adapter as PEFT reads it, in the dtype that vLLM casts it to."""
    return PeftModel.from_pretrained(served.base(), folder, autocast_adapter_dtype=False).eval()


def compare(model: Any, served: Served, completions: Sequence[Completion]) -> Agreement:
    """From the weights in bfloat16, computed in float32: more exact, and several times faster on many processors."""
    return agreement(model.float(), served.prompts[: len(completions)], completions)


def allowed(tokens: int, noise: Agreement) -> float:
    """The noise, and what estimates of it from so many tokens may differ by."""
    return noise.rms + SURE * hypot(noise.standard_error(tokens), noise.standard_error(len(noise.differences)))


def assert_no_further_apart(found: Agreement, noise: Agreement) -> None:
    """Where the texts part, both tokens' logits may be off by as much as any logprob or gap of the base model."""
    assert found.rms <= allowed(len(found.differences), noise), f"{found}; base model: {noise}"
    assert max(found.gaps, default=0.0) <= 2 * max(noise.largest, *noise.gaps, 0.0), f"{found}; base model: {noise}"


@pytest.mark.parametrize("name", ["vanilla", "folded"])
def test_peft_agrees_with_the_served_adapter(name: str, served: Served, noise: Agreement) -> None:
    completions = generate(served, name)
    found = compare(peft(served, served.sources[name]), served, completions)
    print(f"\n{name}: {found}\nbase model: {noise}")
    assert len(found.differences) == 20 * 32
    assert_no_further_apart(found, noise)
    effect = compare(served.base(), served, completions[:FEW])
    assert effect.rms > 3 * noise.rms, f"the adapter's own effect is lost in the noise: {effect}"
    with pytest.raises(AssertionError):
        assert_no_further_apart(effect, noise)
    engine, limit = f"vLLM {known_architectures().version}, served", allowed(len(found.differences), noise)
    record("SmolLM2-135M-Instruct", engine, f"{name} LoRA, rms of logprobs", "bf16", "passed", found.rms, limit)


def test_an_embedding_and_a_tied_head_are_adapted(served: Served, noise: Agreement) -> None:
    with served.loaded("embeddings", served.guest):
        completions = generate(served, "embeddings", FEW)
    found = compare(peft(served, served.guest), served, completions)
    effect = compare(served.base(), served, completions)
    print(f"\nembeddings: {found}\neffect: {effect}")
    assert_no_further_apart(found, noise)
    assert effect.rms > 2 * allowed(len(found.differences), noise)
