"""Adapters under the names of transformers before 5: what PEFT makes of them, and what `loraover check` says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, LlavaForConditionalGeneration

from loraover.checkpoint.files import CONFIG_FILE, TENSORS_FILE
from loraover_export import check_adapter

from support.make_checkpoint import edit_json, edit_tensors
from support.plain_adapter import tiny_decoder, write_adapter
from support.tiny_experts import EXPERTS, tiny_moe
from support.tiny_llava import save_llava
from support.tiny_models import fill_b
from support.versions import needs_expert_stacks

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
