"""Adapters whose modules have another prefix than the base model's, or the names of an older transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlavaForConditionalGeneration

from loraover.adapters.convert.kind import read_method
from loraover.adapters.convert.prefix import find_move
from loraover.checkpoint.files import CONFIG_FILE, TENSORS_FILE
from loraover.checkpoint.model_facts import read_facts
from loraover.models.load import resolve_model
from loraover_export import check_adapter, convert_adapter

from support.adapters_on_disk import save_base, save_lora
from support.make_checkpoint import edit_json, edit_tensors
from support.plain_adapter import tiny_decoder, write_adapter
from support.tiny_experts import EXPERTS, tiny_moe
from support.tiny_llava import save_llava
from support.tiny_models import fill_b
from support.versions import needs_expert_stacks
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


IDS = torch.arange(3, 20)[None]
RANK = 2
NAMES = {"Qwen3Moe": ("gate_proj", "up_proj", "down_proj"), "Mixtral": ("w1", "w3", "w2")}
"""Projections of an expert by family: gate, up and down."""


def make_base(family: str) -> Any:
    return tiny_moe() if family == "Qwen3Moe" else tiny_decoder(family, num_local_experts=EXPERTS)


@torch.no_grad()
def trained(model: Any, family: str, parts: str, lost: str, scaling: float) -> dict[str, tuple[Tensor, Tensor]]:
    """Add random pairs to a model's experts and routers; returns them by their older names."""
    generator = torch.Generator().manual_seed(0)
    owner = "mlp" if family == "Qwen3Moe" else "block_sparse_moe"
    pairs: dict[str, tuple[Tensor, Tensor]] = {}

    def adapt(weight: Tensor, name: str) -> None:
        a, b = (0.3 * torch.randn(size, generator=generator) for size in ((RANK, weight.shape[1]), (len(weight), RANK)))
        if name != lost:
            weight += scaling * b @ a
            pairs[f"model.layers.{name}"] = a, b

    for number, layer in enumerate(model.model.layers):
        for expert in range(EXPERTS):
            gate, up = layer.mlp.experts.gate_up_proj[expert].chunk(2)
            weights = {"gate": gate, "up": up, "down": layer.mlp.experts.down_proj[expert]}
            for (part, weight), name in zip(weights.items(), NAMES[family], strict=True):
                if part in parts:
                    adapt(weight, f"{number}.{owner}.experts.{expert}.{name}")
        if "router" in parts:
            adapt(layer.mlp.gate.weight, f"{number}.{owner}.gate")
    return pairs


def verdict_of_peft(load: Any, folder: Path, truth: Tensor) -> str:
    """Return what PEFT does, in the words of `check`."""
    try:
        model = PeftModel.from_pretrained(load(), folder).eval()
    except (ValueError, RuntimeError):
        return "refused"
    with torch.no_grad():
        error = float((model(input_ids=IDS).logits - truth).abs().max())
        effect = float((truth - load()(input_ids=IDS).logits).abs().max())
    return "right" if error < 1e-3 * effect else "wrong silently"


CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "all": ("gate up down", {}, "right"),
    "all and the router": ("gate up down router", {}, "right"),
    "down alone": ("down", {}, "right"),
    "the router alone": ("router", {}, "right"),
    "rsLoRA": ("gate up down", {"use_rslora": True}, "wrong silently"),
    "without down": ("gate up", {}, "wrong silently"),
    "without up": ("gate down", {}, "refused"),
    "without an expert's": ("gate up down lost", {}, "refused"),
}


@needs_expert_stacks
@pytest.mark.parametrize("family", NAMES)
@pytest.mark.parametrize("name", CASES)
def test_experts_and_routers(name: str, family: str, tmp_path: Path) -> None:
    parts, fields, expected = CASES[name]
    make_base(family).save_pretrained(tmp_path / "base")

    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()

    model, alpha = load(), 4
    owner = "mlp" if family == "Qwen3Moe" else "block_sparse_moe"
    lost = f"0.{owner}.experts.1.{NAMES[family][1]}" if "lost" in parts else ""
    scaling = alpha / (RANK**0.5 if fields else RANK)
    pairs = trained(model, family, parts, lost, scaling)
    targets = sorted({path.rpartition(".")[2] for path in pairs})
    fields = {
        "lora_alpha": alpha,
        "target_modules": targets,
        "base_model_name_or_path": str(tmp_path / "base"),
        **fields,
    }
    adapter = write_adapter(tmp_path / "adapter", pairs, **fields)
    with torch.no_grad():
        truth = model(input_ids=IDS).logits
    assert verdict_of_peft(load, adapter, truth) == expected
    assert check_adapter(adapter, engines="torch").engines[0].as_it_is.verdict == expected


@needs_expert_stacks
def test_a_multimodal_model(tmp_path: Path) -> None:
    base = save_llava(tmp_path / "base")

    def load() -> Any:
        return LlavaForConditionalGeneration.from_pretrained(base).eval()

    model = get_peft_model(load(), LoraConfig(r=RANK, target_modules=["q_proj", "v_proj"]))
    fill_b(model)
    model.save_pretrained(tmp_path / "adapter")

    def rename(found: dict[str, Tensor]) -> None:
        for key in list(found):
            older = key.replace("model.model.language_model.", "model.language_model.model.")
            found[older.replace("model.model.vision_tower", "model.vision_tower")] = found.pop(key)

    edit_tensors(tmp_path / "adapter" / TENSORS_FILE, rename)
    edit_json(tmp_path / "adapter" / CONFIG_FILE, lambda content: content.update(base_model_name_or_path=str(base)))
    with torch.no_grad():
        truth = model.eval()(input_ids=IDS).logits
    assert verdict_of_peft(load, tmp_path / "adapter", truth) == "right"
    assert check_adapter(tmp_path / "adapter", engines="torch").engines[0].as_it_is.verdict == "right"
