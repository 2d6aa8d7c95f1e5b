"""`loraover train` and the fold on decoders of many families, with LoRA on all their linear layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers

from loraover_export import fold_checkpoint

from support.tiny_hub import save_decoder, write_recipe
from support.train_command import train

pytestmark = pytest.mark.matrix

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
PLAIN = (
    *("Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma2", "Gemma3", "Phi3", "Starcoder2"),
    *("StableLm", "Cohere", "Cohere2", "Olmo", "Olmo2", "Granite", "Nemotron", "Glm"),
    *("Glm4", "Exaone4", "SmolLM3", "Ernie4_5", "Helium", "Lfm2", "GPTNeoX"),
)
CHANGES: dict[str, dict[str, Any]] = {
    "Phi": {"num_key_value_heads": 2},
    "OPT": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "GptOss": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Olmoe": EXPERTS,
    "Qwen2Moe": EXPERTS | {"shared_expert_intermediate_size": 48},
    "Qwen3Moe": EXPERTS,
    # Three layers with linear attention before one with softmax.
    "Qwen3Next": EXPERTS
    | {"num_hidden_layers": 4, "shared_expert_intermediate_size": 48, "linear_num_value_heads": 2}
    | {"linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16},
}


@pytest.mark.parametrize("family", [*PLAIN, *CHANGES])
def test_a_family_is_trained_and_folded(family: str, tmp_path: Path) -> None:
    if not hasattr(transformers, f"{family}ForCausalLM"):
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    base = save_decoder(tmp_path / "base", family, **CHANGES.get(family, {}))
    recipe = write_recipe(tmp_path / "recipe.yaml", base, training={"max_steps": 2})
    assert train(recipe, tmp_path / "run") == 0
    assert fold_checkpoint(tmp_path / "run" / "adapter", tmp_path / "folded", check_error=True).passed
