"""Prompts that are answered and run at once are answered as each one alone, or else one by one."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM

from loraover_serve.engines import torch as torch_engine
from loraover_serve.engines.torch import TorchEngine, common_beginning, greedy_answers, model_logits
from loraover_serve.judge.limits import ADAPTER, BASE
from loraover_serve.verify import right_models
from loraover_serve.verify.right_models import RightModels

from support.plain_adapter import tiny_decoder
from support.tiny_models import tiny_gpt2, tiny_neox

NEW_TOKENS = 4
BEGINNING = (1, 5, 9, 4, 7)
PROMPTS = [(*BEGINNING, *more) for more in ((3, 8), (6,), (3, 6, 6, 5, 2, 8, 4), (9, 2, 3))]
FAMILIES: dict[str, Any] = {
    **{name: partial(tiny_decoder, name) for name in ("Llama", "Qwen3", "Gemma3", "Phi3")},
    "gpt2": tiny_gpt2,
    "neox": tiny_neox,
}


def lively(family: str, **options: Any) -> Any:
    """A tiny model whose answers depend on the prompt: with small weights, the likeliest token is always the same."""
    return enlarged(FAMILIES[family](**options))


def enlarged(model: Any) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model.eval()


def one_by_one(model: Any) -> list[tuple[int, ...]]:
    return TorchEngine({ADAPTER: partial(nullcontext, model)}).generate(ADAPTER, PROMPTS, NEW_TOKENS)


@pytest.mark.parametrize("prompts", [PROMPTS, [prompt[2 + i :] for i, prompt in enumerate(PROMPTS)]])
@pytest.mark.parametrize("at_once", [20, 1024], ids=["several batches", "one batch"])
@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_are_continued_at_once_as_each_one_alone(
    family: str, at_once: int, prompts: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_engine, "TOKENS_AT_ONCE", at_once)
    model = lively(family)
    found = greedy_answers(model, prompts, NEW_TOKENS)
    assert len(set(found)) > 1, "the answers depend on the prompts"
    engine = TorchEngine({ADAPTER: partial(nullcontext, model)})
    assert found == engine.generate(ADAPTER, prompts, NEW_TOKENS)


def test_the_common_beginning_is_read_once() -> None:
    model, read = lively("Llama"), list[int]()
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: read.append(args[0].numel()))
    greedy_answers(model, PROMPTS, NEW_TOKENS)
    longest = max(map(len, PROMPTS)) - len(BEGINNING)
    assert read == [len(BEGINNING), longest * len(PROMPTS), *[len(PROMPTS)] * (NEW_TOKENS - 1)]
    assert common_beginning([(1, 2), (1, 2, 3)]) == 1, "the last token of a prompt is left to be continued"
    assert common_beginning([(1, 2), (3,)]) == 0


def test_a_batch_has_no_more_keys_and_values_than_tokens_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    longest = max(map(len, PROMPTS)) + NEW_TOKENS
    monkeypatch.setattr(torch_engine, "TOKENS_AT_ONCE", 2 * longest)
    model, rows = lively("Llama"), list[int]()
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: rows.append(len(args[0])))
    greedy_answers(model, PROMPTS, NEW_TOKENS)
    assert rows == [1, *[2] * 2 * NEW_TOKENS], "the beginning, then two batches of two prompts"


def failing(*args: Any) -> Any:
    raise TypeError("forward() got an unexpected keyword argument 'position_ids'")


def wrong(model: Any, prompts: list[tuple[int, ...]], tokens: int) -> list[tuple[int, ...]]:
    return [tuple(token + 1 if index == 2 else token for token in each) for index, each in enumerate(one_by_one(model))]


@pytest.mark.parametrize("at_once", [greedy_answers, failing, wrong])
def test_a_model_that_mixes_prompts_or_fails_is_asked_one_by_one(at_once: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(right_models, "greedy_answers", at_once)
    base, adapted, done = lively("Llama"), lively("Llama", seed=3), list[float]()
    found = RightModels(base, adapted, "fp32").run(PROMPTS, (), NEW_TOKENS, done.append)
    assert [question.answer for question in found.questions] == one_by_one(adapted)
    steps = right_models.right_passes(PROMPTS, NEW_TOKENS, "fp32")
    told = steps["answers"] + steps["tree"] + 2 * steps["exact"] + 2 * steps["rounded"]
    assert sum(done) == pytest.approx(told), "no pass is told twice"


def test_a_model_whose_state_is_not_passed_on_is_answered_without_it() -> None:
    """Mamba takes no `past_key_values`, so that a next token would see none before it."""
    adapted = MambaForCausalLM(MambaConfig(vocab_size=32, hidden_size=32, state_size=8, num_hidden_layers=2))
    adapted = enlarged(adapted)
    found = RightModels(lively("Llama"), adapted, "fp32").run(PROMPTS, (), NEW_TOKENS)
    assert [question.answer for question in found.questions] != one_by_one(adapted)
    for question in found.questions:
        with torch.inference_mode():
            likeliest = adapted(torch.tensor([question.tokens])).logits[0, len(question.prompt) - 1 :].argmax(-1)
        assert question.answer == tuple(likeliest.tolist())


def test_both_models_are_run_as_trees_with_the_logprobs_of_single_runs() -> None:
    models = {BASE: lively("Llama"), ADAPTER: lively("Llama", seed=3)}
    found = RightModels(models[BASE], models[ADAPTER], "fp32").run(PROMPTS, (), NEW_TOKENS)
    assert found.as_tree
    for arm, model in models.items():
        with torch.inference_mode():
            alone = [*model_logits(model, [question.tokens for question in found.questions])]
        for index, (question, logits) in enumerate(zip(found.questions, alone, strict=True)):
            right = torch.tensor(logits).double().log_softmax(-1).numpy()
            for position in question.window:
                assert abs(found.exact[arm].at(index, position) - right[position]).max() < 1e-4
                off = abs(found.rounded[arm].at(index, position) - right[position]).max()
                assert 1e-4 < off < 1, "bfloat16 rounds"


def test_an_adapted_model_that_needs_its_order_keeps_both_from_trees() -> None:
    linear = {"linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 16}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    more = {"linear_value_head_dim": 16, "shared_expert_intermediate_size": 16, "num_hidden_layers": 4}
    adapted = tiny_decoder("Qwen3Next", **linear, **experts, **more).eval()
    found = RightModels(lively("Llama"), adapted, "fp32").run(PROMPTS, (), NEW_TOKENS)
    assert not found.as_tree
    assert [question.answer for question in found.questions] == one_by_one(adapted)
    alone = RightModels(lively("Llama"), adapted, "fp32").run(PROMPTS[:1], (), NEW_TOKENS)
    assert not alone.as_tree, "trees are tried on a branch even where no questions begin alike"
