"""Greedy answers as text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerFast

from loraover.common.errors import DataError, EngineError
from loraover.training.run.answers import greedy_answers

from support.tiny_experts import tiny_moe
from support.tiny_hub import tiny_tokenizer
from support.tiny_models import tiny_gpt2, tiny_llama, with_lora

TOKENS = ["<pad>", "</s>", "\u2581", "\u2581def", ":", "\n", "return", "\u2581x", "\u2581."]
ANSWER = ["\u2581", "\u2581", "\u2581", "\u2581", "return", "\u2581x", "\u2581.", "</s>"]


def as_llama_2s() -> Any:
    """A tokenizer whose decoder drops the first space of a text."""
    backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate(TOKENS)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()])
    parts = [decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(parts)
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>")


class Writes(torch.nn.Module):
    """A model that goes on with `ANSWER`."""

    config = PretrainedConfig()
    generation_config = GenerationConfig()
    device = "cpu"

    def generate(self, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        answer = torch.tensor([[TOKENS.index(token) for token in ANSWER]])
        return torch.cat([input_ids, answer.expand(len(input_ids), -1)], dim=1)


@pytest.mark.parametrize("cleans_up", [False, True])
def test_an_answer_keeps_its_indentation(cleans_up: bool) -> None:
    tokenizer = as_llama_2s()
    tokenizer.clean_up_tokenization_spaces = cleans_up
    answers = greedy_answers(Writes(), tokenizer, ["def :", "def"], max_new_tokens=7, batch_size=2)
    assert answers == ["    return x ."] * 2


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_give_no_answer(value: float) -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight[7] = value
    with pytest.raises(EngineError, match="scores of the next token hold NaN or infinity"):
        greedy_answers(model, tiny_tokenizer(), ["what?"], max_new_tokens=2, batch_size=1)


NOT_GREEDY = {
    "repetition_penalty": 9.0,
    "no_repeat_ngram_size": 1,
    "num_beams": 3,
    "suppress_tokens": list(range(20, 60)),
}


@pytest.mark.parametrize("name", NOT_GREEDY)
def test_the_settings_of_a_models_folder_do_not_change_greedy_answers(name: str) -> None:
    tokenizer, inner = tiny_tokenizer(), tiny_llama(seed=3)
    model = with_lora(inner, task_type="CAUSAL_LM")
    ids = tokenizer("what is", return_tensors="pt").input_ids
    for _ in range(12):
        ids = torch.cat([ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    greedy = tokenizer.decode(ids[0, 7:], skip_special_tokens=True)
    inner.generation_config = own = GenerationConfig(**{name: NOT_GREEDY[name]})
    assert greedy_answers(model, tokenizer, ["what is"], max_new_tokens=12, batch_size=1) == [greedy]
    assert inner.generation_config is own


def test_routers_whose_loss_is_asked_for_do_not_change_answers() -> None:
    """TRL asks a mixture of experts for it during training; it cannot be computed from a cache."""
    tokenizer, model = tiny_tokenizer(), tiny_moe()
    expected = greedy_answers(model, tokenizer, ["what", "why is"], max_new_tokens=4, batch_size=2)
    model.config.output_router_logits = True
    assert greedy_answers(model, tokenizer, ["what", "why is"], max_new_tokens=4, batch_size=2) == expected
    assert model.config.output_router_logits


def test_an_answer_ends_where_the_context_does() -> None:
    """GPT-2 has a learnt embedding for each position, and none beyond."""
    model, tokenizer = tiny_gpt2(), tiny_tokenizer()
    context = model.config.max_position_embeddings
    model.generation_config.eos_token_id = None
    prompts = ["a" * (context - 5), "b", "c" * (context - 1)]
    answers = greedy_answers(model, tokenizer, prompts, max_new_tokens=9, batch_size=2)
    alone = greedy_answers(model, tokenizer, prompts, max_new_tokens=5, batch_size=2)
    assert answers == alone
    with pytest.raises(DataError, match=f"question 4: its {context} tokens leave no room .* context of {context}"):
        greedy_answers(model, tokenizer, [*prompts, "d" * context], max_new_tokens=9, batch_size=4)
