"""The ranks that engines take: vLLM can be started for some, and no other engine names a largest one."""

from __future__ import annotations

from pydantic import Field

from loraover.common.request import as_written
from loraover.common.strict_json import StrictModel

MAX_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values of --max-lora-rank: vllm/config/lora.py of vLLM 0.32."""

DEFAULT_MAX_LORA_RANK = 16
"""Value of --max-lora-rank if the server is started without it: the same file."""


def max_lora_rank(r: int) -> int | None:
    """Return the smallest allowed --max-lora-rank for adapters of rank r; None if r is above all of them.

    A larger value costs time and memory: vLLM pads every adapter to it.
    """
    return next((allowed for allowed in MAX_LORA_RANKS if allowed >= r), None)


class VllmFit(StrictModel):
    """Whether vLLM takes adapters of a rank; no other engine names a largest rank."""

    takes: bool = Field(description="Whether vLLM takes the rank")
    max_lora_rank: int | None = Field(description="Value of --max-lora-rank to start vLLM with; None if none suffices")
    largest: int = Field(default=MAX_LORA_RANKS[-1], description="Largest rank that vLLM takes")

    @classmethod
    def of(cls, rank: int) -> VllmFit:
        """Return whether vLLM takes adapters of a rank."""
        return cls(takes=max_lora_rank(rank) is not None, max_lora_rank=max_lora_rank(rank))

    def in_words(self) -> str:
        """Return which engines take the rank, and the rank that fits all of them."""
        if self.takes:
            return f"vLLM takes it with --max-lora-rank {self.max_lora_rank}; no other engine names a largest rank"
        option = as_written("approximate_to_rank")
        return f"only vLLM names a largest rank, {self.largest}, so {option} {self.largest} would fit it"
