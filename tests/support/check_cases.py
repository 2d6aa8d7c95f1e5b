"""Adapters of a tiny Llama, each with one property that engines treat differently, and what each engine does."""

from __future__ import annotations

import json
from collections.abc import Callable
from math import nan as NAN
from pathlib import Path

import torch
from torch import Tensor

from loraover.checkpoint.files import CONFIG_FILE

from support.make_checkpoint import edit_json, edit_tensors
from support.vllm_damage import Q0, TENSORS, added, config, name_all, narrower, of_rank, renamed

Change = Callable[[Path], object]
MODEL = "base_model.model.model"


def embedding(folder: Path) -> None:
    tensors = {
        f"{MODEL}.embed_tokens.lora_embedding_A": torch.ones(4, 64),
        f"{MODEL}.embed_tokens.lora_embedding_B": torch.ones(64, 4),
    }
    added(**tensors)(folder)


def head(folder: Path) -> None:
    tensors = {
        "base_model.model.lm_head.lora_A.weight": torch.ones(4, 64),
        "base_model.model.lm_head.lora_B.weight": torch.ones(64, 4),
    }
    added(**tensors)(folder)


def both(*changes: Change) -> Change:
    def change(folder: Path) -> None:
        for one in changes:
            one(folder)

    return change


def loha(folder: Path) -> None:
    base = json.loads((folder / CONFIG_FILE).read_text())["base_model_name_or_path"]
    fields = {"peft_type": "LOHA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": 4, "alpha": 4}
    (folder / CONFIG_FILE).write_text(json.dumps({**fields, "target_modules": ["layers.0.self_attn.q_proj"]}))

    def replaced(found: dict[str, Tensor]) -> None:
        found.clear()
        for half in ("w1", "w2"):
            found[f"{Q0}.hada_{half}_a"] = torch.ones(64, 4)
            found[f"{Q0}.hada_{half}_b"] = torch.ones(4, 64)

    edit_tensors(folder / TENSORS, replaced)


def add_layer_7(found: dict[str, Tensor]) -> None:
    found |= {key.replace("layers.1", "layers.7"): tensor.clone() for key, tensor in found.items()}


def lose_layer_1(found: dict[str, Tensor]) -> None:
    for key in [key for key in found if "layers.1" in key]:
        del found[key]


CASES: dict[str, Change] = {
    "plain": lambda folder: None,
    "scaled": config(lora_alpha=8),
    "no alpha": lambda folder: edit_json(folder / CONFIG_FILE, lambda content: content.pop("lora_alpha")),
    "rsLoRA": config(use_rslora=True),
    "alpha_pattern": config(alpha_pattern={"q_proj": 12}),
    "DoRA": both(config(use_dora=True), added(**{f"{Q0}.lora_magnitude_vector": torch.ones(64)})),
    "LoHa": loha,
    "aLoRA": config(alora_invocation_tokens=[1, 2]),
    "a field of the future": config(use_surprise=True, peft_version="99.0"),
    "a field of nobody": config(use_surprise=True),
    "Megatron": config(megatron_config={"hidden_size": 64}),
    "matrices tied in vain": config(ensure_weight_tying=True),
    "LoRA-GA": config(init_lora_weights="lora_ga"),
    "CorDA": config(init_lora_weights="corda"),
    "not a number": lambda folder: edit_tensors(
        folder / TENSORS, lambda found: found[f"{Q0}.lora_B.weight"].fill_(NAN)
    ),
    "a doubled prefix": renamed("base_model.model.", "base_model.model.base_model.model."),
    "an absent layer": both(lambda folder: edit_tensors(folder / TENSORS, add_layer_7), name_all),
    "experts": config(target_parameters=["experts.w1"]),
    "PiSSA": config(init_lora_weights="pissa"),
    "OLoRA": config(init_lora_weights="olora"),
    "biases": both(config(bias="all"), added(**{f"{MODEL}.layers.0.self_attn.q_proj.bias": torch.ones(64)})),
    "a bias of B": both(config(lora_bias=True), added(**{f"{Q0}.lora_B.bias": torch.ones(64)})),
    "a trained head": both(
        config(modules_to_save=["lm_head"]), added(**{"base_model.model.lm_head.weight": torch.ones(64, 64)})
    ),
    "a trained norm": both(config(modules_to_save=["model.norm"]), added(**{f"{MODEL}.norm.weight": torch.ones(64)})),
    "a lost head": config(modules_to_save=["lm_head"]),
    "trained tokens": both(
        config(trainable_token_indices=[7]),
        added(**{f"{MODEL}.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(1, 64)}),
    ),
    "embedding": embedding,
    "head": head,
    "rank 32": both(of_rank(32), config(lora_alpha=32)),
    "rank 520": both(of_rank(520), config(lora_alpha=520)),
    "another rank in the configuration": config(r=2, lora_alpha=2),
    "no prefix": renamed("base_model.model.", ""),
    "another prefix": renamed("model.model.model.", "model.model."),
    "another shape": lambda folder: edit_tensors(folder / TENSORS, narrower),
    "unnamed modules": config(target_modules=["q_proj"]),
    "a lost matrix": lambda folder: edit_tensors(folder / TENSORS, lambda found: found.pop(f"{Q0}.lora_B.weight")),
    "lost modules": lambda folder: edit_tensors(folder / TENSORS, lose_layer_1),
}

R, S, OK = "refused", "wrong silently", "right"
INERT = ("a field of nobody", "matrices tied in vain")
UNLIKE = ("unnamed modules", "lost modules")
EXPECTED: dict[str, dict[str, tuple[str, str]]] = {
    "vllm": {
        "a lost matrix": (R, R),
        "no alpha": (R, OK),
        **dict.fromkeys((*INERT, "Megatron"), (OK, OK)),
        **dict.fromkeys(("LoRA-GA", "not a number"), (S, R)),
        **dict.fromkeys(("a doubled prefix", "an absent layer"), (OK, R)),
        "CorDA": (R, R),
        **dict.fromkeys(("plain", "scaled", "rsLoRA", "alpha_pattern", "embedding", "head", "rank 32"), (OK, OK)),
        **dict.fromkeys(("DoRA", "LoHa", "aLoRA", "PiSSA", "OLoRA", "biases", "a bias of B"), (R, R)),
        **dict.fromkeys(("a trained head", "a lost head", "a trained norm", "trained tokens", "rank 520"), (R, R)),
        **dict.fromkeys(("a field of the future", "experts", "another prefix"), (S, R)),
        **dict.fromkeys(("another rank in the configuration", "another shape"), (S, R)),
        **dict.fromkeys(UNLIKE, (S, R)),
        "no prefix": (OK, R),
    },
    "llamacpp": {
        "a lost matrix": (R, R),
        "no alpha": (R, OK),
        **dict.fromkeys((*INERT, "Megatron"), (OK, OK)),
        **dict.fromkeys(("LoRA-GA", "CorDA", "not a number"), (S, R)),
        "a doubled prefix": (OK, R),
        "an absent layer": (R, R),
        **dict.fromkeys(("plain", "scaled", "embedding", "head", "rank 32", "rank 520"), (OK, OK)),
        **dict.fromkeys(("rsLoRA", "alpha_pattern"), (S, OK)),
        **dict.fromkeys(
            ("DoRA", "LoHa", "experts", "biases", "a bias of B", "a trained head", "trained tokens"), (R, R)
        ),
        **dict.fromkeys(("a field of the future", "PiSSA", "OLoRA", "a trained norm"), (S, R)),
        **dict.fromkeys(("another prefix", "another shape"), (R, R)),
        "another rank in the configuration": (S, R),
        **dict.fromkeys(("aLoRA", "no prefix"), (OK, R)),
        **dict.fromkeys((*UNLIKE, "a lost head"), (S, R)),
    },
    "onnx": {
        "no alpha": (OK, OK),
        **dict.fromkeys(INERT, (OK, OK)),
        **dict.fromkeys(("LoRA-GA", "not a number", "another prefix", "a lost matrix"), (S, R)),
        **dict.fromkeys(("CorDA", "a doubled prefix"), (R, R)),
        "Megatron": (R, OK),
        "an absent layer": (OK, R),
        **dict.fromkeys(("plain", "scaled", "rsLoRA", "alpha_pattern", "rank 32", "rank 520"), (OK, OK)),
        **dict.fromkeys(("a trained head", "a trained norm", "biases"), (OK, OK)),
        **dict.fromkeys(("PiSSA", "OLoRA"), (OK, R)),
        "embedding": (S, OK),
        "head": (R, OK),
        **dict.fromkeys(("DoRA", "LoHa", "aLoRA", "a field of the future", "a bias of B", "trained tokens"), (S, R)),
        "no prefix": (S, R),
        **dict.fromkeys(("experts", "another rank in the configuration", "another shape", "a lost head"), (R, R)),
        **dict.fromkeys(UNLIKE, (S, R)),
    },
    "openvino": {
        "a lost matrix": (R, R),
        "no alpha": (S, OK),
        **dict.fromkeys((*INERT, "Megatron"), (OK, OK)),
        **dict.fromkeys(("LoRA-GA", "CorDA", "not a number", "a doubled prefix"), (S, R)),
        "an absent layer": (OK, R),
        **dict.fromkeys(("plain", "head", "rank 32"), (OK, OK)),
        **dict.fromkeys(("scaled", "rsLoRA", "alpha_pattern"), (S, OK)),
        "embedding": (S, S),
        **dict.fromkeys(("rank 520", "another prefix"), (OK, R)),
        **dict.fromkeys(("DoRA", "LoHa", "aLoRA", "a field of the future", "experts", "PiSSA", "OLoRA"), (S, R)),
        **dict.fromkeys(("biases", "a bias of B", "a trained norm", "trained tokens", "no prefix"), (S, R)),
        "another rank in the configuration": (S, R),
        "another shape": (R, R),
        **dict.fromkeys((*UNLIKE, "a lost head"), (S, R)),
        "a trained head": (OK, R),
    },
    "mlx": {
        "a lost matrix": (R, R),
        "no alpha": (R, OK),
        **dict.fromkeys((*INERT, "Megatron"), (R, OK)),
        **dict.fromkeys(("LoRA-GA", "CorDA", "not a number", "a doubled prefix", "an absent layer"), (R, R)),
        **dict.fromkeys(("plain", "scaled", "rsLoRA", "alpha_pattern", "embedding", "head"), (R, OK)),
        **dict.fromkeys(("rank 32", "rank 520"), (R, OK)),
        **dict.fromkeys(("DoRA", "LoHa", "aLoRA", "a field of the future", "experts", "PiSSA", "OLoRA"), (R, R)),
        **dict.fromkeys(("biases", "a bias of B", "a trained head", "a trained norm", "trained tokens"), (R, R)),
        **dict.fromkeys(("no prefix", "another prefix", "a lost head", *UNLIKE), (R, R)),
        **dict.fromkeys(("another rank in the configuration", "another shape"), (R, R)),
    },
    "torch": {
        "no alpha": (OK, OK),
        **dict.fromkeys(INERT, (OK, OK)),
        **dict.fromkeys(("LoRA-GA", "not a number", "another prefix", "a lost matrix"), (S, R)),
        **dict.fromkeys(("CorDA", "a doubled prefix"), (R, R)),
        "Megatron": (R, OK),
        "an absent layer": (OK, R),
        **dict.fromkeys(("plain", "scaled", "rsLoRA", "alpha_pattern", "embedding", "head"), (OK, OK)),
        "rank 32": (OK, OK),
        **dict.fromkeys(("DoRA", "LoHa", "aLoRA", "a field of the future", "experts", "PiSSA", "OLoRA"), (OK, R)),
        **dict.fromkeys(("biases", "a bias of B", "a trained head", "a trained norm", "trained tokens"), (OK, R)),
        **dict.fromkeys(("no prefix", *UNLIKE), (S, R)),
        **dict.fromkeys(("another rank in the configuration", "another shape", "a lost head"), (R, R)),
        "rank 520": (OK, R),
    },
}
"""Verdicts on the adapter as it is and as exported, by engine and case."""
