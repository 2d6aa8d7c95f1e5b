"""Base models of several kinds with a LoRA on each, on disk, and their deltas in extended precision."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from support.make_checkpoint import EMBEDDING, LINEAR
from support.tiny_models import fill_b, tiny_bert, tiny_gpt2, tiny_llama, token_ids

Long = npt.NDArray[np.longdouble]
PATTERNS = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 7}}
TIED = partial(tiny_llama, tie_word_embeddings=True)


@dataclass(frozen=True)
class Case:
    """A base model, and options of a LoRA on it."""

    model: Callable[[], Any]
    lora: dict[str, Any]
    auto: Any = AutoModelForCausalLM
    dtype: torch.dtype = torch.float32


CASES = {
    "linear": Case(tiny_llama, {"target_modules": LINEAR, **PATTERNS}),
    "rslora, r = 1": Case(tiny_llama, {"target_modules": ["o_proj"], "r": 1, "use_rslora": True}),
    "Conv1D": Case(tiny_gpt2, {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "embedding": Case(tiny_llama, {"target_modules": EMBEDDING}),
    "tied embedding": Case(TIED, {"target_modules": EMBEDDING}),
    "tied head": Case(TIED, {"target_modules": ["lm_head", "v_proj"]}),
    "tied, both": Case(TIED, {"target_modules": ["lm_head", "embed_tokens"]}),
    "tied, kept so": Case(TIED, {"target_modules": EMBEDDING, "ensure_weight_tying": True}),
    "tied, saved head": Case(TIED, {"target_modules": LINEAR, "modules_to_save": ["lm_head"]}),
    "tied, saved embedding": Case(TIED, {"target_modules": LINEAR, "modules_to_save": ["embed_tokens"]}),
    "tied, both saved alike": Case(
        TIED, {"target_modules": LINEAR, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    ),
    "biases": Case(partial(tiny_llama, attention_bias=True), {"target_modules": ["q_proj"], "bias": "all"}),
    "saved norm": Case(tiny_llama, {"target_modules": LINEAR, "modules_to_save": ["norm"]}),
    "saved classifier": Case(
        partial(tiny_bert, num_labels=3),
        {"target_modules": ["query", "dense"], "task_type": "SEQ_CLS", "modules_to_save": ["classifier"]},
        AutoModelForSequenceClassification,
    ),
    "float64": Case(tiny_llama, {"target_modules": LINEAR, **PATTERNS}, dtype=torch.float64),
    "bfloat16": Case(tiny_llama, {"target_modules": LINEAR, **PATTERNS}, dtype=torch.bfloat16),
    "float16": Case(tiny_llama, {"target_modules": LINEAR, **PATTERNS}, dtype=torch.float16),
}


@dataclass(frozen=True)
class Saved:
    """A base model and an adapter on disk, and the PEFT model that wrote it."""

    case: Case
    folder: Path
    peft: Any

    def base(self) -> Any:
        return self.case.auto.from_pretrained(self.folder / "base", dtype=self.case.dtype)

    @property
    def adapter(self) -> Path:
        return self.folder / "adapter"


def save(name: str, folder: Path) -> Saved:
    case = CASES[name]
    case.model().to(case.dtype).save_pretrained(folder / "base")
    saved = Saved(case, folder, None)
    options = {"r": 4, "lora_alpha": 5, "task_type": "CAUSAL_LM"} | case.lora
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = get_peft_model(saved.base(), LoraConfig(**options), autocast_adapter_dtype=False)
    fill_b(model, seed=2)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_" not in parameter_name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter)
    model.save_pretrained(saved.adapter)
    return Saved(case, folder, model.eval())


def deltas(adapter: Path) -> dict[str, Long]:
    """scaling B A of each module, shaped like an `nn.Linear`'s weight; an embedding's is (dimension, tokens)."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    found = load_file(adapter / "adapter_model.safetensors")
    long = {k: v.double().numpy().astype(np.longdouble) for k, v in found.items()}
    result = {}
    for key, a in long.items():
        if "lora_A" in key or "lora_embedding_A" in key:
            module = key.removeprefix("base_model.model.").partition(".lora_")[0]
            alpha = next((v for k, v in config["alpha_pattern"].items() if module.endswith(k)), config["lora_alpha"])
            scaling = alpha / (sqrt(len(a)) if config["use_rslora"] else len(a))
            other = key.replace("lora_A", "lora_B").replace("lora_embedding_A", "lora_embedding_B")
            result[module] = np.longdouble(scaling) * (long[other] @ a)
    return result


def shards(folder: Path) -> dict[str, Tensor]:
    """All tensors of a saved model."""
    return {key: tensor for file in sorted(folder.glob("*.safetensors")) for key, tensor in load_file(file).items()}


def long(tensor: Tensor) -> Long:
    return tensor.detach().double().numpy().astype(np.longdouble)


@torch.no_grad()
def outputs(model: Any) -> Tensor:
    found: Tensor = model(input_ids=token_ids(seed=100, batch=3, length=7)).logits
    return found
