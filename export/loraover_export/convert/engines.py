"""Ranks that engines take."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from loraover_export.convert.request import ConvertRequest
from loraover_export.vllm.launch import MAX_LORA_RANKS, max_lora_rank

WITHOUT_LIMIT = "PEFT, llama.cpp, MLX, ONNX Runtime and OpenVINO name no largest rank"


class VllmFit(BaseModel):
    """Whether vLLM takes adapters of a rank."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    takes: bool = Field(description="whether vLLM takes the rank")
    max_lora_rank: int | None = Field(description="value of --max-lora-rank to start vLLM with; None if none suffices")
    largest: int = Field(default=MAX_LORA_RANKS[-1], description="largest rank that vLLM takes")


def fit(rank: int) -> VllmFit:
    """Return whether vLLM takes adapters of a rank."""
    return VllmFit(takes=max_lora_rank(rank) is not None, max_lora_rank=max_lora_rank(rank))


def fit_in_words(rank: int) -> str:
    """Return which engines take a rank, and the rank that fits all of them."""
    allowed = max_lora_rank(rank)
    if allowed is None:
        largest, option = MAX_LORA_RANKS[-1], ConvertRequest.named("rank")
        return f"vLLM takes at most rank {largest}, so {option} {largest} would fit it; {WITHOUT_LIMIT}"
    return f"vLLM takes it with --max-lora-rank {allowed}; {WITHOUT_LIMIT}"
