"""Models that are run on a part of their layers or tokens, or by another library, answer as whole runs do."""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from loraover.models.fast_linear import OneDnnLinear
from loraover_serve.engines import torch as torch_engine
from loraover_serve.engines.answers import Expected, last_rows
from loraover_serve.engines.torch import model_logits, tree_logits
from loraover_serve.judge.models import Question
from loraover_serve.verify.base_variants import base_faults, chain_of
from loraover_serve.verify.layers import RightLayers
from loraover_serve.verify.right_models import agrees_in_trees

from support.plain_adapter import tiny_decoder
from support.tiny_models import VOCABULARY, tiny_gpt2, tiny_neox

LAYERS = 4
TEXTS = ([1, 5, 9, 4, 7], [3, 8], [2, 6, 6, 5, 4, 3], [9, 1, 2])
LINEAR = {
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
FAMILIES: dict[str, dict[str, Any]] = {
    **{name: {} for name in ("Llama", "Mistral", "Qwen3", "Gemma", "Gemma3", "Phi3")},
    "Qwen3Moe": EXPERTS,
    "Qwen3Next": LINEAR | EXPERTS,
}


def answers(model: Any) -> list[torch.Tensor]:
    with torch.inference_mode():
        return [torch.tensor(found) for found in model_logits(model, TEXTS)]


def counted(model: nn.Module, stack: ExitStack) -> Counter[int]:
    """How often the layers' multilayer perceptrons run, by the index of the layer."""
    runs: Counter[int] = Counter()
    for index, layer in enumerate(chain_of(model)):
        hook = layer.get_submodule("mlp").register_forward_hook(lambda *_, index=index: runs.update([index]))
        stack.callback(hook.remove)
    return runs


def each_both_ways(model: Any) -> tuple[RightLayers, int]:
    """Compare every fault of a layer with a whole run; returns the layers, and the number of faults."""
    right, number = RightLayers(chain_of(model)), 0
    for each in base_faults(model, longest=6):
        if "layer" not in each.detail:
            continue
        with each.change():
            whole = answers(model)
        with right.before(each.layer, "base"), each.change():
            found = answers(model)
        assert all(torch.equal(one, other) for one, other in zip(found, whole, strict=True)), each.detail
        number += 1
    return right, number


def tiny(family: str) -> PreTrainedModel:
    """A tiny model of a family, in evaluation mode."""
    others = {"gpt2": tiny_gpt2, "neox": tiny_neox}
    made = others[family]() if family in others else tiny_decoder(family, num_hidden_layers=LAYERS, **FAMILIES[family])
    return made.eval()


@pytest.mark.parametrize("at_once", [4, 64], ids=["several batches", "one batch"])
@pytest.mark.parametrize("family", [*FAMILIES, "gpt2", "neox"])
def test_a_run_from_the_layer_with_the_fault_is_a_whole_run(
    family: str, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_engine, "LOGITS_AT_ONCE", at_once * VOCABULARY)
    model = tiny(family)
    before = answers(model)
    _, number = each_both_ways(model)
    assert number == 2 * len(model.base_model.layers if hasattr(model.base_model, "layers") else model.base_model.h) - 1
    assert all(map(torch.equal, before, answers(model))), "the model is left as it was"


def test_layers_that_are_right_run_once_more_at_most() -> None:
    model = tiny_decoder("Llama", num_hidden_layers=LAYERS).eval()
    with ExitStack() as stack:
        runs = counted(model, stack)
        right = RightLayers(chain_of(model))
        for layer in range(LAYERS):
            with right.before(layer, "base"):
                answers(model)
    assert runs == {0: 2, 1: 3, 2: 4, 3: 4}


def test_outputs_of_another_model_or_of_other_texts_are_not_taken() -> None:
    model = tiny_decoder("Llama", num_hidden_layers=LAYERS).eval()
    right, plain = RightLayers(chain_of(model)), answers(model)
    with right.before(3, ("base", 4)):
        answers(model)
    with torch.no_grad():
        chain_of(model)[0].get_parameter("mlp.up_proj.weight").mul_(3)
    with right.before(3, ("adapter", 4)):
        changed = answers(model)
    assert not torch.equal(changed[0], plain[0])
    assert torch.equal(changed[0], answers(model)[0])
    with right.before(1, ("adapter", 4)):
        assert torch.equal(answers(model)[0], changed[0]), "an earlier layer has the fault"


def test_a_run_that_fails_leaves_the_layers_as_they_were() -> None:
    model = tiny_decoder("Llama", num_hidden_layers=LAYERS).eval()
    right, plain = RightLayers(chain_of(model)), answers(model)
    with right.before(2, "base"):
        answers(model)
    with pytest.raises(RuntimeError, match="interrupted"), right.before(3, "base"):
        raise RuntimeError("interrupted")
    assert all(map(torch.equal, plain, answers(model)))


def test_layers_that_read_the_keys_of_earlier_ones_all_run() -> None:
    sizes: dict[str, Any] = {
        "num_hidden_layers": LAYERS,
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 4,
    }
    words: dict[str, Any] = {"vocab_size_per_layer_input": VOCABULARY, "activation_sparsity_pattern": LAYERS * [0.0]}
    model = tiny_decoder("Gemma3n", **sizes, **words).eval()
    right, whole = RightLayers(chain_of(model)), answers(model)
    with right.before(3, "base"):
        answers(model)
    with right.before(3, "base"):
        assert all(map(torch.equal, answers(model), whole))
    assert not [each for each in base_faults(model, longest=6) if "layer" in each.detail]


BEGINNING = (1, 5, 9, 4, 7, 2, 2, 8)
QUESTIONS = [Question((*BEGINNING, *more), answer) for more in ((3, 8), (3, 6, 6), (9,)) for answer in ((4,), (5, 1))]


def without_a_tree(model: Any) -> Expected:
    with torch.inference_mode():
        found = model_logits(model, [question.tokens for question in QUESTIONS])
        return Expected.of([question.answered for question in QUESTIONS], found)


@pytest.mark.parametrize("at_once", [12, 64], ids=["several trees", "one tree"])
@pytest.mark.parametrize("family", [*FAMILIES, "gpt2", "neox"])
def test_a_tree_is_used_where_it_answers_as_its_sequences_do(
    family: str, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers of linear attention mix all tokens in their order, and would continue one question with the next."""
    monkeypatch.setattr(torch_engine, "LOGITS_AT_ONCE", at_once * VOCABULARY)
    model = tiny(family)
    expected = without_a_tree(model)
    assert agrees_in_trees(model, QUESTIONS, with_rows=True) == (family != "Qwen3Next")
    if family == "Qwen3Next":
        return
    with torch.inference_mode():
        found = list(
            tree_logits(model, [each.tokens for each in QUESTIONS], [len(each.answered) for each in QUESTIONS])
        )
    for index, (question, logits) in enumerate(zip(QUESTIONS, found, strict=True)):
        for place, row in last_rows(index, question.answered, logits).items():
            assert abs(row - expected.at(*place)).max() < 1e-4


def test_linear_layers_by_onednn_round_as_float32_does() -> None:
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        pytest.skip("PyTorch without oneDNN")
    torch.manual_seed(0)
    for shape in ((1, 5, 64), (7, 64)):
        x, weight, bias = torch.randn(shape), torch.randn(96, 64), torch.randn(96)
        exact = x.double() @ weight.double().mT + bias.double()
        bound = (
            66 * torch.finfo(torch.float32).eps * (x.abs().double() @ weight.abs().double().mT + bias.abs().double())
        )
        with torch.inference_mode(), OneDnnLinear():
            found = nn.functional.linear(x, weight, bias)
            assert nn.functional.linear(x.double(), weight.double()).dtype == torch.float64
        assert found.shape == exact.shape
        assert ((found.double() - exact).abs() <= bound).all()
    weight.requires_grad_()
    with OneDnnLinear():
        nn.functional.linear(x, weight).sum().backward()  # type: ignore[no-untyped-call]
    assert weight.grad is not None
