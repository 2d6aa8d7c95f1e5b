"""The rules of the pre-flight, by name.

Source: vllm/lora/{peft_helper,lora_model,model_manager}.py and vllm/lora/layers of vLLM 0.32, and PEFT 0.21.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from loraover_export.vllm.candidate import Candidate, Problem
from loraover_export.vllm.config_rules import bias, initialisation, other_parameters, variant
from loraover_export.vllm.launch import MAX_LORA_RANKS, max_lora_rank
from loraover_export.vllm.model_rules import architecture, base_model, modules, shapes, targets, vocabulary
from loraover_export.vllm.tensor_rules import tensors

CAST_TO = {"bfloat16": "bf16", "float16": "fp16", "float32": "bf16"}
"""What vLLM computes a model of some type in, and so casts adapters to; float32 only where --dtype asks for it."""


def name(candidate: Candidate) -> Iterator[Problem]:
    if candidate.name == candidate.address:
        yield Problem(
            f"the adapter is named {candidate.name!r} like the served model; requests would reach the base model",
            "choose another name with --name",
        )


def rank(candidate: Candidate) -> Iterator[Problem]:
    if max_lora_rank(candidate.rank) is None:
        yield Problem(
            f"rank {candidate.rank} is above the largest --max-lora-rank, {MAX_LORA_RANKS[-1]}",
            "train with a smaller rank, or merge the adapter into the base model",
        )


def storage_type(candidate: Candidate) -> Iterator[Problem]:
    dtype = candidate.served.dtype
    cast = CAST_TO.get(dtype or "", candidate.dtype)
    if cast != candidate.dtype:
        yield Problem(
            f"stored as {candidate.dtype}, but a model of type {dtype} is served in {cast}: A and B are rounded twice",
            f"use --dtype {cast}, or start the server with a --dtype of its own",
            is_warning=True,
        )


def replacement(candidate: Candidate) -> Iterator[Problem]:
    if candidate.replaces:
        yield Problem(
            "a server that has loaded the folder's old adapter goes on with it, and a reload in place would keep "
            "cached blocks of its outputs",
            "write to a new folder, or restart such a server",
            is_warning=True,
        )


RULES: dict[str, Callable[[Candidate], Iterator[Problem]]] = {
    "architecture": architecture,
    "base model": base_model,
    "modules": modules,
    "shapes": shapes,
    "targets": targets,
    "vocabulary": vocabulary,
    "rank": rank,
    "variant": variant,
    "initialisation": initialisation,
    "bias": bias,
    "other parameters": other_parameters,
    "tensors": tensors,
    "name": name,
    "storage type": storage_type,
    "replacement": replacement,
}
