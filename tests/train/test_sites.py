"""Which matrices of which models can be over-parameterised, and what they are called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model, inject_adapter_in_model
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim import SGD

from loraover import LoraOverConfig, OverParameterization
from loraover.common.errors import ConfigError
from loraover.overparam.sites import find_sites, match_sites

from support.tiny_models import (
    fill_b,
    lora_matrices,
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
    tiny_net,
    tiny_t5,
    token_ids,
    trainable,
    with_lora,
)
from support.versions import needs_tied_lora


def language_loss(model: Any) -> Any:
    return model(input_ids=token_ids(), labels=token_ids(1)).loss


def class_loss(model: Any) -> Any:
    return model(input_ids=token_ids(), labels=torch.tensor([0, 1, 0, 1])).loss


MODELS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any], dict[str, tuple[int, int]], int]] = {
    "llama": (
        lambda: with_lora(tiny_llama()),
        language_loss,
        {
            "model.layers.0.self_attn.q_proj.lora_A": (4, 32),
            "model.layers.0.self_attn.k_proj.lora_B": (16, 4),
            "model.layers.1.mlp.down_proj.lora_A": (4, 48),
        },
        28,
    ),
    "gpt2": (
        lambda: with_lora(tiny_gpt2()),
        language_loss,
        {"transformer.h.0.attn.c_attn.lora_A": (4, 32), "transformer.h.1.attn.c_attn.lora_B": (96, 4)},
        16,
    ),
    "t5": (
        lambda: with_lora(tiny_t5()),
        language_loss,
        {
            "encoder.block.0.layer.0.SelfAttention.q.lora_A": (4, 32),
            "decoder.block.1.layer.1.EncDecAttention.o.lora_B": (32, 4),
        },
        64,
    ),
    "bert": (
        lambda: with_lora(tiny_bert(), task_type="SEQ_CLS"),
        class_loss,
        {"bert.encoder.layer.1.attention.self.query.lora_B": (32, 4), "bert.pooler.dense.lora_A": (4, 32)},
        26,
    ),
    "embedding": (
        lambda: with_lora(tiny_llama(), target_modules=["embed_tokens", "q_proj"]),
        language_loss,
        {"model.embed_tokens.lora_embedding_A": (4, 64), "model.embed_tokens.lora_embedding_B": (32, 4)},
        6,
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_sites_of_an_architecture_are_found_and_trained(name: str) -> None:
    build, loss, some, count = MODELS[name]
    model = build()
    over = OverParameterization(model, LoraOverConfig(decomposition="chain"))
    assert {key: over.sites[key].shape for key in some} == some
    assert len(over.sites) == len(over.injected) == count
    assert {id(site.parameter) for site in over.sites.values()} == {
        id(p) for key, p in model.named_parameters() if "lora_" in key
    }
    before = {key: site.parameter.detach().clone() for key, site in over.sites.items()}
    over.attach(optimizer := SGD(trainable(model), lr=0.1))
    loss(model).backward()
    optimizer.step()
    assert not [key for key, site in over.sites.items() if torch.equal(site.parameter, before[key])]
    for group in over.groups:
        for site, matrix in zip(group.sites, group.contract(), strict=True):
            assert torch.equal(site.parameter, matrix)


def test_several_adapters_have_sites_of_their_own() -> None:
    model = tiny_net(target_modules=["first"])
    model.add_adapter("other", LoraConfig(r=2, target_modules=["first", "second"]))
    assert list(find_sites(model)) == ["first.lora_A", "first.lora_B"]
    model.base_model.set_adapter(["default", "other"])
    sites = find_sites(model)
    assert set(sites) == {
        "first.lora_A",
        "first.lora_B",
        *(f"other:{module}.lora_{x}" for module in ("first", "second") for x in "AB"),
    }
    other = sites["other:first.lora_A"]
    assert (other.adapter, other.path, other.shape) == ("other", "first.lora_A", (2, 6))
    model.set_adapter("other")
    alone = find_sites(model)
    assert {site.adapter for site in alone.values()} == {"other"}
    assert list(alone) == [f"{module}.lora_{x}" for module in ("first", "second") for x in "AB"]


def test_a_parameter_shared_by_two_modules_is_one_site() -> None:
    model = tiny_net()
    net = model.get_base_model()
    net.third.lora_A["default"].weight = net.second.lora_A["default"].weight
    over = OverParameterization(model)
    assert "third.lora_A" not in over.sites
    assert len(over.sites) == 5
    over.attach(optimizer := SGD(trainable(model), lr=0.1))
    torch.autograd.backward(model(torch.ones(2, 6)).square().mean())
    before = lora_matrices(model)
    optimizer.step()
    after = lora_matrices(model)
    assert not any(torch.equal(before[key], after[key]) for key in before)
    assert net.third.lora_A["default"].weight is net.second.lora_A["default"].weight


@needs_tied_lora
def test_transposed_views_of_one_memory_are_one_site_whose_gradients_are_summed() -> None:
    model = with_lora(
        tiny_llama(tie_word_embeddings=True), target_modules=["embed_tokens", "lm_head"], ensure_weight_tying=True
    )
    output = model.get_base_model().lm_head
    sites = find_sites(model)
    assert list(sites) == ["model.embed_tokens.lora_embedding_A", "model.embed_tokens.lora_embedding_B"]
    assert [site.aliases for site in sites.values()] == [
        [output.lora_B["default"].weight],
        [output.lora_A["default"].weight],
    ]
    fill_b(model)
    language_loss(model).backward()
    site = sites["model.embed_tokens.lora_embedding_A"]
    (alias,) = site.aliases
    assert site.parameter.grad is not None
    assert alias.grad is not None
    expected = site.parameter.grad + alias.grad.mT
    taken = site.gradient()
    site.clear_gradient()
    assert taken is not None
    assert torch.equal(taken, expected)
    assert site.parameter.grad is None
    assert alias.grad is None


# Names


class Wrapper(nn.Module):
    """As DistributedDataParallel: the model is its only child."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def queries(base: Any = None, wrap: Callable[[Any], Any] | None = None) -> Any:
    """A LoRA of the projections of queries, of whose layers the first may be wrapped."""
    model = with_lora(tiny_llama() if base is None else base, target_modules=["q_proj"])
    if wrap is not None:
        layers: Any = model.get_base_model().model.layers
        layers[0] = wrap(layers[0])
    return model


WRAPPERS: dict[str, Callable[[], Any]] = {
    "ddp": lambda: Wrapper(queries()),
    "compile": lambda: torch.compile(queries()),
    "ddp-compile": lambda: Wrapper(torch.compile(queries())),  # type: ignore[arg-type]
    "compiled-layer": lambda: queries(wrap=torch.compile),
    "checkpointed-layer": lambda: queries(wrap=checkpoint_wrapper),
    "compiled-base": lambda: queries(torch.compile(tiny_llama())),
    "no-peft-model": lambda: inject_adapter_in_model(LoraConfig(r=4, target_modules=["q_proj"]), tiny_llama()),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_names_do_not_depend_on_wrappers(wrapper: str) -> None:
    expected = list(find_sites(with_lora(tiny_llama(), target_modules=["q_proj"])))
    assert list(find_sites(WRAPPERS[wrapper]())) == expected


# Refusals


class Image(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.attention = nn.MultiheadAttention(8, 2)
        self.linear = nn.Linear(8, 8)


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: tiny_net(use_dora=True), r"first: DoraLinearVariant is not a plain product"),
        (lambda: with_lora(Image(), target_modules=["conv", "linear"]), r"conv: LoRA of a convolution"),
        (lambda: with_lora(Image(), target_modules=["attention"]), r"attention: LoRA of nn\.MultiheadAttention"),
        (
            lambda: get_peft_model(tiny_llama(), AdaLoraConfig(target_modules=["q_proj"], total_step=9)),
            r"q_proj: AdaLoRA trains B diag\(E\) A, .* Train with a LoraConfig",
        ),
        (tiny_llama, r"has no LoRA layers; wrap it with peft\.get_peft_model"),
        (lambda: get_peft_model(tiny_llama(), LoraConfig(inference_mode=True)), "none of .* requires a gradient"),
    ],
    ids=["dora", "conv2d", "multihead", "adalora", "no-lora", "frozen"],
)
def test_what_is_not_a_trainable_plain_lora_is_refused(build: Callable[[], Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        OverParameterization(build())


# Patterns


@pytest.mark.parametrize(
    ("is_peft", "trained"), [(True, ["first"]), (True, ["second"]), (False, ["first"]), (True, []), (False, [])]
)
def test_of_two_models_in_a_module_the_trained_one_has_the_sites(is_peft: bool, trained: list[str]) -> None:
    models: Any = {"first": tiny_net(), "second": tiny_net()}
    if not is_peft:
        models["second"] = models["second"].get_base_model()
    for name in trained and models.keys() - trained:
        models[name].requires_grad_(False)
    pair: Any = nn.ModuleDict(models)
    if not trained:
        with pytest.raises(ConfigError, match=r"second\.\S*first: .* outside of the PeftModel at 'first'"):
            find_sites(pair)
        pair = models["second"]  # as the message suggests
    assert [id(site.parameter) for site in find_sites(pair).values()] == [id(p) for p in trainable(pair)]


def test_patterns_choose_sites_in_the_models_order() -> None:
    names = list(find_sites(tiny_net()))
    assert match_sites(names, ["third.*", "*lora_A"]) == [
        "first.lora_A",
        "second.lora_A",
        "third.lora_A",
        "third.lora_B",
    ]
    over = OverParameterization(tiny_net(), LoraOverConfig(sites=["third.*", "*lora_A"]))
    assert set(over.injected) == set(match_sites(names, ["third.*", "*lora_A"]))
    assert len(over.sites) == 6


@pytest.mark.parametrize(
    ("pattern", "near"),
    [
        ("*q_prj*", "*q_proj*"),
        ("*.layer.3.*.v_prj.lora_A", "*.layers.3.*.v_proj.lora_A"),
        ("model.layers.3.self_attn.q_proj", "model.layers.3.self_attn.q_proj.lora_A"),
    ],
)
def test_the_nearest_names_in_a_model_of_many_layers(pattern: str, near: str) -> None:
    modules = [f"model.layers.{i}.self_attn.{x}_proj" for i in range(30) for x in "qkvo"]
    names = [f"{module}.lora_{matrix}" for module in modules for matrix in "AB"]
    with pytest.raises(ConfigError, match="matches none of 240 sites") as refusal:
        match_sites(names, [pattern])
    assert near in str(refusal.value).partition("Nearest: ")[2]
