"""Adapters that vLLM must not be given: what is wrong, which rule says so, and what the real vLLM does with them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from support.make_checkpoint import edit_json, edit_tensors

Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True)
class Damage:
    """One mistake in an adapter of a tiny Llama.

    Args:
        rule: Rule of the pre-flight that finds it.
        named: Words that the message must hold.
        vllm_refuses: Whether vLLM's loader fails; otherwise vLLM serves something else without a message.
    """

    change: Callable[[Path], object]
    rule: str
    named: tuple[str, ...]
    vllm_refuses: bool


def config(**values: Any) -> Callable[[Path], object]:
    return lambda folder: edit_json(folder / CONFIG, lambda content: content.update(values))


def name_all(folder: Path) -> None:
    """Let the configuration name the modules that the file has matrices for."""
    keys = load_file(folder / TENSORS)
    modules = {re.split(r"\.lora_", key.removeprefix("base_model.model."))[0] for key in keys if ".lora_" in key}
    config(target_modules=sorted(modules))(folder)


def added(**tensors: Tensor) -> Callable[[Path], object]:
    named = {key.replace("__", "."): tensor for key, tensor in tensors.items()}

    def change(folder: Path) -> None:
        edit_tensors(folder / TENSORS, lambda found: found.update(named))
        name_all(folder)

    return change


def renamed(old: str, new: str) -> Callable[[Path], object]:
    def change(found: dict[str, Tensor]) -> None:
        for key in list(found):
            found[key.replace(old, new)] = found.pop(key)

    def rename(folder: Path) -> None:
        edit_tensors(folder / TENSORS, change)
        name_all(folder)

    return rename


def tied(folder: Path) -> None:
    rank = json.loads((folder / CONFIG).read_text())["r"]
    path = "base_model__model__model__embed_tokens__lora_embedding_"
    added(**{f"{path}A": torch.ones(rank, 64), f"{path}B": torch.ones(64, rank)})(folder)
    config(ensure_weight_tying=True)(folder)


def narrower(found: dict[str, Tensor]) -> None:
    found[f"{Q0}.lora_A.weight"] = found[f"{Q0}.lora_A.weight"][:, :32]


def of_rank(r: int) -> Callable[[Path], object]:
    def grow(found: dict[str, Tensor]) -> None:
        for key, matrix in found.items():
            found[key] = torch.ones(r, matrix.shape[1]) if "lora_A" in key else torch.ones(len(matrix), r)

    def change(folder: Path) -> None:
        edit_tensors(folder / TENSORS, grow)
        config(r=r, rank_pattern={})(folder)

    return change


DAMAGES = {
    "lora_bias": Damage(config(lora_bias=True), "variant", ("lora_bias", "B has a bias"), True),
    "aLoRA": Damage(config(alora_invocation_tokens=[1, 2]), "variant", ("aLoRA",), True),
    "layer_replication": Damage(config(layer_replication=[[0, 2]]), "variant", ("layer_replication",), True),
    "BD-LoRA": Damage(config(use_bdlora={"nblocks": 2}), "variant", ("BD-LoRA",), True),
    "QALoRA": Damage(config(use_qalora=True), "variant", ("QALoRA",), True),
    "target_parameters": Damage(config(target_parameters=["experts.w1"]), "variant", ("fused experts",), False),
    "tied matrices": Damage(tied, "variant", ("share their matrices",), False),
    "a field of the future": Damage(
        config(use_surprise=True, peft_version="99.0"), "variant", ("use_surprise", "does not know"), False
    ),
    "PiSSA": Damage(config(init_lora_weights="pissa"), "initialisation", ("'pissa'", "base weights"), True),
    "PiSSA, fast": Damage(config(init_lora_weights="pissa_niter_4"), "initialisation", ("pissa_niter_4",), True),
    "OLoRA": Damage(config(init_lora_weights="olora"), "initialisation", ("'olora'",), True),
    "CorDA": Damage(config(init_lora_weights="corda"), "initialisation", ("'corda'",), True),
    "LoftQ": Damage(config(init_lora_weights="loftq"), "initialisation", ("'loftq'",), True),
    "LoRA-GA": Damage(config(init_lora_weights="lora_ga"), "initialisation", ("'lora_ga'",), False),
    "trained biases": Damage(config(bias="all"), "bias", ("'all'",), True),
    "modules_to_save": Damage(config(modules_to_save=["lm_head"]), "other parameters", ("lm_head",), True),
    "trained tokens": Damage(config(trainable_token_indices=[7]), "other parameters", ("token", "7"), False),
    "a bias of B": Damage(added(**{f"{Q0}.lora_B.bias": torch.ones(64)}), "tensors", ("a bias of B",), True),
    "a token's delta": Damage(
        added(base_model__model__model__embed_tokens__trainable_tokens_delta=torch.ones(1, 64)),
        "tensors",
        ("single trained tokens",),
        True,
    ),
    "an unknown tensor": Damage(added(base_model__model__extra=torch.ones(2, 2)), "tensors", ("unknown tensor",), True),
    "a whole module": Damage(
        added(base_model__model__lm_head__weight=torch.ones(64, 64)), "tensors", ("lm_head.weight",), True
    ),
    "a prefix too short": Damage(renamed("model.model.model.", "model.model."), "modules", ("14 of 14",), False),
    "a prefix too long": Damage(renamed("model.model.model.", "model.model.x.model."), "modules", ("prefix",), False),
    "another name": Damage(renamed("o_proj", "output"), "modules", ("2 of 14", "layers.0.self_attn.output"), True),
    "another shape": Damage(
        lambda folder: edit_tensors(folder / TENSORS, narrower), "shapes", ("32 to 64", "64 to 64"), False
    ),
    "a rank too large": Damage(of_rank(520), "rank", ("520", "512"), True),
}
