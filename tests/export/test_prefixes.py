"""Adapters under another prefix than the base model's are found again in each family, with the same numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from loraover.adapters.convert.kind import read_method
from loraover.adapters.convert.prefix import find_move
from loraover.checkpoint.model_facts import read_facts
from loraover.models.load import resolve_model
from loraover_export import convert_adapter

from support.adapters_on_disk import save_base, save_lora
from support.plain_adapter import write_adapter
from support.vllm_damage import renamed

BELOW_MODEL = (
    "AudioFlamingo3ForConditionalGeneration",
    "Exaone4_5_ForConditionalGeneration",
    "Gemma3ForConditionalGeneration",
    "Glm4vForConditionalGeneration",
    "Glm4vMoeForConditionalGeneration",
    "GlmAsrForConditionalGeneration",
    "GlmOcrForConditionalGeneration",
    "GraniteSpeechForConditionalGeneration",
    "InternVLForConditionalGeneration",
    "Lfm2VlForConditionalGeneration",
    "LlavaForConditionalGeneration",
    "LlavaNextForConditionalGeneration",
    "LlavaNextVideoForConditionalGeneration",
    "Mistral3ForConditionalGeneration",
    "PaliGemmaForConditionalGeneration",
    "Qwen2VLForConditionalGeneration",
    "Qwen2_5_VLForConditionalGeneration",
    "Qwen3VLForConditionalGeneration",
    "Qwen3VLMoeForConditionalGeneration",
    "Qwen3_5ForConditionalGeneration",
    "Qwen3_5MoeForConditionalGeneration",
    "VibeVoiceAsrForConditionalGeneration",
    "VoxtralForConditionalGeneration",
)
LANGUAGE_MODELS = {
    **dict.fromkeys(BELOW_MODEL, "model.language_model"),
    "Idefics3ForConditionalGeneration": "model.text_model",
    "SmolVLMForConditionalGeneration": "model.text_model",
    "Llama4ForConditionalGeneration": "language_model.model",
    "Gemma2ForCausalLM": "model",
    "GemmaForCausalLM": "model",
    "LlamaForCausalLM": "model",
    "MistralForCausalLM": "model",
    "Phi3ForCausalLM": "model",
    "Qwen2ForCausalLM": "model",
    "Qwen3ForCausalLM": "model",
}
"""Path of the language model in classes that vLLM serves with adapters."""

OTHERS: Mapping[str, Callable[[str], str]] = {
    "a text model's": lambda rest: f"model.{rest}",
    "a multimodal model's": lambda rest: f"model.language_model.{rest}",
    "an older transformers'": lambda rest: f"language_model.model.{rest}",
    "a wrapper's": lambda rest: f"module.model.{rest}",
}
"""Names of a module by its path in the language model."""


@pytest.mark.parametrize("family", LANGUAGE_MODELS)
def test_an_adapter_under_another_prefix_is_found_again(family: str, tmp_path: Path) -> None:
    """The configuration of a family's default model is enough: nothing is as large as its weights."""
    kind = getattr(transformers, family, None)
    if kind is None:
        pytest.skip(f"transformers {transformers.__version__} does not have {family}")
    base, prefix = tmp_path / "base", LANGUAGE_MODELS[family]
    config = kind.config_class()
    config.architectures = [family]
    config.save_pretrained(base)
    shapes = read_facts(resolve_model(str(base))).shapes()
    layers = (f"{prefix}.layers.0.", f"{prefix}.layers.1.")
    modules = {path.removeprefix(f"{prefix}."): shape for path, shape in shapes.items() if path.startswith(layers)}
    generator = torch.Generator().manual_seed(0)
    pairs = {
        rest: (torch.randn(1, n, generator=generator), torch.randn(m, 1, generator=generator))
        for rest, (m, n) in modules.items()
    }
    assert len(pairs) >= 8

    def written(name: str, rename: Callable[[str], str]) -> Path:
        renamed = {rename(rest): pair for rest, pair in pairs.items()}
        targets = sorted({rest.rpartition(".")[2] for rest in pairs})
        return write_adapter(tmp_path / name, renamed, target_modules=targets, base_model_name_or_path=str(base))

    for name, rename in OTHERS.items():
        adapter = written(name, rename)
        _, layout = read_method(adapter)
        move = find_move(layout, shapes)
        if rename("") == f"{prefix}.":
            assert move is None
        else:
            assert move is not None
            assert move.paths == {rename(rest): f"{prefix}.{rest}" for rest in pairs}, name


@pytest.mark.parametrize("layers", [(0, 1), (1,)], ids=["with a layer that is there", "alone"])
def test_a_layer_that_the_base_lacks_is_not_another_parts(layers: tuple[int, ...], tmp_path: Path) -> None:
    """The base model has an encoder of one layer, and a decoder of two: it is another model, not other names."""
    name = "model.{}.layers.{}.self_attn.q_proj"
    shapes = {name.format(*place): (16, 16) for place in (("encoder", 0), ("decoder", 0), ("decoder", 1))}
    pairs = {name.format("encoder", layer): (torch.ones(1, 16), torch.ones(16, 1)) for layer in layers}
    _, layout = read_method(write_adapter(tmp_path / "adapter", pairs, target_modules=list(pairs)))
    assert find_move(layout, shapes) is None


def test_copies_of_base_weights_move_with_their_modules(tmp_path: Path) -> None:
    """PEFT saves the weight of an adapted head beside its A and B."""
    base = save_base(tmp_path / "base")
    adapter = save_lora(base, tmp_path / "adapter", target_modules=["q_proj", "lm_head"])
    assert any(key.endswith("lm_head.base_layer.weight") for key in load_file(adapter / "adapter_model.safetensors"))
    plain = convert_adapter(adapter, tmp_path / "plain")
    renamed("base_model.model.", "base_model.model.base_model.model.")(adapter)
    converted = convert_adapter(adapter, tmp_path / "converted")
    assert converted.passed
    files = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("plain", "converted")]
    assert files[0].keys() == files[1].keys()
    assert plain.certificate.rank == converted.certificate.rank
