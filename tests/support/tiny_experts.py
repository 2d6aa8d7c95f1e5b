"""A tiny Qwen3-MoE, adapters on its experts, and their files as PEFT before 0.19 wrote them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from support.plain_adapter import tiny_decoder
from support.tiny_models import fill_b

EXPERTS = 4
EXPERT_SIZES = {
    "num_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
}
PARAMETERS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
EXPERT_LORA: dict[str, Any] = {
    "r": 4,
    "lora_alpha": 12,
    "use_rslora": True,
    "rank_pattern": {"down_proj": 3},
    "target_modules": ["q_proj", "v_proj"],
    "target_parameters": PARAMETERS,
    "task_type": "CAUSAL_LM",
}
"""LoRA on the experts with two ranks, and on two projections of the attention."""


def tiny_moe(**changes: Any) -> Any:
    """Two layers of four experts, hidden size 64; no matrix of an expert is square."""
    return tiny_decoder("Qwen3Moe", **{**EXPERT_SIZES, **changes})


def tiny_llama4() -> Any:
    """Two layers of four experts, whose parameters hold inputs before outputs; the router returns two tensors."""
    sizes = {"intermediate_size": 48, "intermediate_size_mlp": 48, "interleave_moe_layer_step": 1}
    return tiny_decoder("Llama4", num_local_experts=EXPERTS, **sizes)


def expert_lora(model: Any, folder: Path, **lora: Any) -> PeftModel:
    """Put an adapter on experts, fill it and save it in `folder`; returns PEFT's model."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        wrapped = get_peft_model(model, LoraConfig(**{**EXPERT_LORA, **lora}))
    fill_b(wrapped, seed=2)
    wrapped.save_pretrained(folder)
    return wrapped.eval()


def flip(folder: Path, version: str | None) -> None:
    """Rewrite an adapter of experts as PEFT before 0.19 would have saved the same function."""
    config = json.loads((folder / "adapter_config.json").read_text())
    config.pop("peft_version", None)
    (folder / "adapter_config.json").write_text(json.dumps(config | ({"peft_version": version} if version else {})))
    tensors = load_file(folder / "adapter_model.safetensors")
    for key in [key for key in tensors if ".experts." in key and "lora_A" in key]:
        a, b = tensors[key], tensors[twin := key.replace("lora_A", "lora_B")]
        parts_a, parts_b = a.reshape(EXPERTS, -1, a.shape[1]), b.reshape(len(b), -1, EXPERTS)
        tensors[key] = parts_b.permute(2, 1, 0).reshape(-1, len(b)).contiguous()
        tensors[twin] = parts_a.permute(2, 1, 0).reshape(a.shape[1], -1).contiguous()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def peft_deltas(model: Any) -> dict[str, Tensor]:
    """delta_W (out_features, in_features) of every adapted expert as PEFT computes it, by `module.expert.parameter`."""
    from peft.tuners.lora.layer import ParamWrapper

    found = {}
    for path, layer in model.named_modules():
        if isinstance(layer, ParamWrapper):
            module = path.removeprefix("base_model.model.").replace(".base_layer", "")
            deltas = layer.get_delta_weight("default").detach()
            is_transposed = getattr(layer.get_base_layer(), "is_transposed", False)
            for expert, delta in enumerate(deltas.reshape(layer.num_experts, *deltas.shape[-2:])):
                found[f"{module}.{expert}.{layer.parameter_name}"] = delta.mT if is_transposed else delta
    return found
