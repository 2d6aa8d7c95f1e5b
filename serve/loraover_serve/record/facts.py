"""What a report says of a reference, which is small, unlike the reference."""

from __future__ import annotations

from typing import NamedTuple

from loraover_serve.record.adapter_check.reference import Reference


class Facts(NamedTuple):
    """What a report says of a reference.

    Args:
        adapter: Name of the adapter's folder.
        base_model: Name of the base model.
        sensitivity: Ratio by which rounding moves the adapted model further than the base model.
        bias: Strength of the adapter if PyTorch computes in bfloat16.
        prompts: Number of questions.
        new_tokens: Number of tokens of the longest answer.
        device: Device that PyTorch ran on.
    """

    adapter: str
    base_model: str
    sensitivity: float
    bias: float
    prompts: int
    new_tokens: int
    device: str

    @classmethod
    def of(cls, reference: Reference) -> Facts:
        """The facts of a reference."""
        content = reference.content
        return cls(
            adapter=str(content["adapter"]),
            base_model=str(content["base_model"]),
            sensitivity=reference.sensitivity,
            bias=float(reference.formats["bf16"]["strength"]),
            prompts=len(reference.questions),
            new_tokens=max(len(question["answer"]) for question in reference.questions),
            device=str(content.get("made", {}).get("device", "unknown")),
        )
