"""The rules of the pre-flight, by name.

Source: vllm/lora/{peft_helper,lora_model,model_manager}.py and vllm/lora/layers of vLLM 0.32 and 0.33, and PEFT 0.21.
Where the two releases differ, a rule asks `Versions`; where vLLM is wrong, `known_faults.json` lists the releases.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from loraover_export.vllm.candidate import Candidate, Problem
from loraover_export.vllm.known_faults import known_faults
from loraover_export.vllm.launch import MAX_LORA_RANKS, max_lora_rank
from loraover_export.vllm.rules.config import bias, initialisation, other_parameters, patterns, variant
from loraover_export.vllm.rules.model import architecture, base_model, modules, no_ops, shapes, targets, vocabulary
from loraover_export.vllm.rules.tensors import tensors
from loraover_export.vllm.versions import READ

CAST_TO = {"bfloat16": "bf16", "float16": "fp16", "float32": "bf16"}
"""What vLLM computes a model of some type in, and so casts adapters to; float32 only where --dtype asks for it."""


def name(candidate: Candidate) -> Iterator[Problem]:
    """An adapter's name that is also the served model's."""
    if candidate.name == candidate.address:
        yield Problem(
            f"the adapter is named {candidate.name!r} like the served model; requests would reach the base model",
            "choose another name with --name",
        )


def rank(candidate: Candidate) -> Iterator[Problem]:
    """A rank that vLLM has no kernels for."""
    if max_lora_rank(candidate.rank) is None:
        yield Problem(
            f"rank {candidate.rank} is above the largest --max-lora-rank, {MAX_LORA_RANKS[-1]}",
            "train with a smaller rank, or merge the adapter into the base model",
        )


def storage_type(candidate: Candidate) -> Iterator[Problem]:
    """A data type that vLLM would round once more."""
    if candidate.dtype is None:
        return
    dtype = candidate.served.dtype
    cast = CAST_TO.get(dtype or "", candidate.dtype)
    if cast != candidate.dtype:
        yield Problem(
            f"stored as {candidate.dtype}, but a model of type {dtype} is served in {cast}: A and B are rounded twice",
            f"use --dtype {cast}, or start the server with a --dtype of its own",
            is_warning=True,
        )


def replacement(candidate: Candidate) -> Iterator[Problem]:
    """An adapter that replaces one which a server may hold already."""
    if candidate.replaces:
        yield Problem(
            "a server that has loaded the folder's old adapter goes on with it, and a reload in place would keep "
            "cached blocks of its outputs",
            "write to a new folder, or restart such a server",
            is_warning=True,
        )


def engine(candidate: Candidate) -> Iterator[Problem]:
    """Faults of the release itself, and releases that the rules were not read from."""
    version = candidate.architectures.version
    if version not in READ:
        yield Problem(
            f"the rules were read from vLLM {READ.since} up to, and without, {READ.before}; {version} may differ",
            "compare the answers with PyTorch's: loraover-serve parity --engine vllm",
            is_warning=True,
        )
    for fault in known_faults().engine:
        if fault.platform == candidate.platform and version in fault.versions:
            yield Problem(f"vLLM {version}: {fault.found}", fault.remedy, is_warning=True)


RULES: dict[str, Callable[[Candidate], Iterator[Problem]]] = {
    "architecture": architecture,
    "base model": base_model,
    "modules": modules,
    "shapes": shapes,
    "targets": targets,
    "silent no-ops": no_ops,
    "vocabulary": vocabulary,
    "rank": rank,
    "variant": variant,
    "initialisation": initialisation,
    "patterns": patterns,
    "bias": bias,
    "other parameters": other_parameters,
    "tensors": tensors,
    "name": name,
    "storage type": storage_type,
    "replacement": replacement,
    "engine": engine,
}
