"""Rules about the tensors of an adapter's file: A and B of each module, and nothing else that changes outputs."""

from __future__ import annotations

from collections.abc import Iterator

from loraover.adapters.base_weights import changed_weight, module_of_copy, open_base
from loraover.checkpoint.peft_adapter import BASE_WEIGHT
from loraover.checkpoint.tensor_file import open_tensors
from loraover.common.request import as_written
from loraover_export.formats.vllm.candidate import Candidate, Problem, listed

KINDS = {
    ".lora_B.bias": "a bias of B",
    ".lora_A.bias": "a bias of A",
    "lora_magnitude_vector": "magnitudes of DoRA",
    "trainable_tokens_": "single trained tokens",
    BASE_WEIGHT: "weights of an adapted base layer",
}


def tensors(candidate: Candidate) -> Iterator[Problem]:
    """Tensors in the file that are not the A or B of a module."""
    others = candidate.adapter.others
    copies = [key for key in others if _is_base_weight(candidate, key)]
    for changed in _changed(candidate, copies):
        yield Problem(
            f"{changed}; vLLM skips such tensors",
            f"serve the changed model and name it with {as_written('model')}, or write it with `loraover export merge`",
            is_silent=True,
        )
    for kind in dict.fromkeys(_kind(key) for key in others if key not in copies):
        keys = [key for key in others if key not in copies and _kind(key) == kind]
        yield Problem(
            f"{listed(keys)}: {kind}; A and B cannot hold this",
            "train without it, or merge the adapter into the base model with PEFT and serve the merged model",
        )


def _kind(key: str) -> str:
    return next((kind for part, kind in KINDS.items() if part in key), "an unknown tensor")


def _changed(candidate: Candidate, keys: list[str]) -> list[str]:
    """Return in words which base weights in an adapter's file differ from the served model's."""
    if not keys:
        return []
    served = candidate.served.source
    with open_base(served, may_be_quantised=True) as base, open_tensors(candidate.adapter.tensors_path) as file:
        found = (changed_weight(key, file, candidate.present[module_of_copy(key)], base) for key in keys)
        return [changed for changed in found if changed is not None]


def _is_base_weight(candidate: Candidate, key: str) -> bool:
    """Whether PEFT saved the frozen weights of an adapted embedding or head, in the served model's shape."""
    module = module_of_copy(key)
    if not key.endswith(BASE_WEIGHT) or module not in candidate.present:
        return False
    served = candidate.served_module(module)
    if served.shape is None:
        return False
    n, m = served.shape
    return candidate.adapter.shapes[key] == ((n, m) if served.kind == "embedding" else (m, n))
