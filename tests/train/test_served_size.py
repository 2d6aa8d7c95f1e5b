"""Size of an adapter as it is served."""

from __future__ import annotations

from peft import PeftModel

from loraover.training.method import TrainingMethod, count_trained, served_size
from loraover.training.recipe import load_recipe

from support.tiny_models import tiny_llama, with_lora


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
