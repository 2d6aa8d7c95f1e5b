"""Rules about the tensors of an adapter's file: A and B of each module, and nothing else that changes outputs."""

from __future__ import annotations

from collections.abc import Iterator

from loraover.checkpoint.peft_adapter import BASE_WEIGHT, KEY_PREFIX
from loraover_export.vllm.candidate import Candidate, Problem, listed

KINDS = {
    ".lora_B.bias": "a bias of B",
    ".lora_A.bias": "a bias of A",
    "lora_magnitude_vector": "magnitudes of DoRA",
    "trainable_tokens_": "single trained tokens",
    BASE_WEIGHT: "weights of an adapted base layer",
}


def tensors(candidate: Candidate) -> Iterator[Problem]:
    """Tensors in the file that are not the A or B of a module."""
    matrices = set(candidate.adapter.sites.values())
    others = [key for key in candidate.adapter.shapes if key not in matrices]
    copies = [key for key in others if _is_copy(candidate, key)]
    if copies:
        yield Problem(
            f"{listed(copies)}: assumed to be an unchanged copy of the base model's weights; not written, since vLLM "
            "skips such tensors",
            "save with PEFT's save_embedding_layers=False; if the base model was changed, serve the changed one",
            is_warning=True,
        )
    for kind in dict.fromkeys(_kind(key) for key in others if key not in copies):
        keys = [key for key in others if key not in copies and _kind(key) == kind]
        yield Problem(
            f"{listed(keys)}: {kind}; A and B cannot hold this",
            "train without it, or merge the adapter into the base model with PEFT and serve that",
        )


def _kind(key: str) -> str:
    return next((kind for part, kind in KINDS.items() if part in key), "an unknown tensor")


def _is_copy(candidate: Candidate, key: str) -> bool:
    """Whether PEFT saved the frozen weights of an adapted embedding or head, in the served model's shape."""
    module = key.removeprefix(KEY_PREFIX).removesuffix(BASE_WEIGHT)
    if not key.endswith(BASE_WEIGHT) or module not in candidate.present:
        return False
    served = candidate.served_module(module)
    if served.shape is None:
        return False
    n, m = served.shape
    return candidate.adapter.shapes[key] == ((n, m) if served.kind == "embedding" else (m, n))
