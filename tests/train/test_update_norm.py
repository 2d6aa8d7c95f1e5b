"""The norm of an adapter's update, and the numbers that it has to be served with."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn

from loraover.training.method import TrainingMethod, count_trained, served_size
from loraover.training.recipe import load_recipe

from support.tiny_models import fill_b, tiny_gpt2, tiny_llama, tiny_net, tiny_t5, update_norm, with_lora

UNIT = 2.0**-53


def array(tensor: Tensor) -> Any:
    return tensor.detach().double().numpy()


def dense_norm(model: nn.Module, scalings: dict[str, float], adapter: str = "default") -> float:
    """||concatenation of scaling * B A||, each product formed, from the parameters' names alone.

    Args:
        scalings: By the end of a module's name; "" is for all others.
    """
    parameters = dict(model.named_parameters())
    total = 0.0
    for name, a in parameters.items():
        for kind in ("lora_A", "lora_embedding_A"):
            if f".{kind}.{adapter}" in name:
                b = parameters[name.replace(kind, kind[:-1] + "B")]
                module = name.partition(f".{kind}")[0]
                scaling = next(s for end, s in scalings.items() if module.endswith(end))
                total += float(np.square(scaling * (array(b) @ array(a))).sum())
    return math.sqrt(total)


def close(expected: float, terms: int = 200) -> Any:
    """Squares and sums of about `terms` products, cancellation in B^T B and A A^T included."""
    return pytest.approx(expected, rel=terms * UNIT * 100)


MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, float]]] = {
    "bfloat16": (lambda: tiny_net(dtype=torch.bfloat16, r=3, lora_alpha=12), {"": 4.0}),
    "GPT-2": (lambda: with_lora(tiny_gpt2(), r=4, lora_alpha=6), {"": 1.5}),
    "T5": (lambda: with_lora(tiny_t5(), r=4, lora_alpha=6), {"": 1.5}),
    "embedding": (lambda: with_lora(tiny_llama(), target_modules=["embed_tokens", "q_proj"]), {"": 2.0}),
    "patterns": (
        lambda: tiny_net(rank_pattern={"second": 2}, alpha_pattern={"second": 1, "third": 3}),
        {"second": 0.5, "third": 0.75, "": 2.0},
    ),
}
"""Models, and the scalings of their modules by the end of the names."""


@pytest.mark.parametrize("name", MODELS)
def test_the_norm_is_the_dense_one(name: str) -> None:
    build, scalings = MODELS[name]
    expected = dense_norm(model := build(), scalings)
    assert expected > 0.1
    assert update_norm(model) == close(expected)


def test_a_fresh_lora_changes_nothing() -> None:
    assert update_norm(with_lora(tiny_llama(), draw_b=False)) == 0


def test_only_the_active_adapter_counts() -> None:
    model = tiny_net(r=4, lora_alpha=8)
    model.add_adapter("other", LoraConfig(r=2, lora_alpha=10, target_modules=["second"]))
    fill_b(model, seed=1)
    assert update_norm(model) == close(dense_norm(model, {"": 2.0}))
    model.set_adapter("other")
    assert update_norm(model) == close(dense_norm(model, {"": 5.0}, "other"))


def lora_numbers(model: PeftModel) -> int:
    return sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)


def test_matrices_that_were_frozen_are_served_too() -> None:
    model = with_lora(tiny_llama(), init_lora_weights="mica")
    served = served_size(model)
    assert served is not None
    assert served == (4, lora_numbers(model), 4 * lora_numbers(model))
    assert 0 < count_trained(model, TrainingMethod(load_recipe("demo"))) < served.numbers


def test_embeddings_and_magnitudes_are_served() -> None:
    model = with_lora(
        tiny_llama(), target_modules=["embed_tokens", "q_proj"], use_dora=True, rank_pattern={"q_proj": 6}
    )
    served = served_size(model)
    names = " ".join(name for name, p in model.named_parameters() if p.requires_grad)
    assert "lora_embedding_A" in names
    assert "lora_magnitude_vector" in names
    assert served == (6, lora_numbers(model), 4 * lora_numbers(model))


def test_a_model_without_an_adapter_serves_none() -> None:
    assert served_size(tiny_llama()) is None
