"""Result of a conversion."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from loraover_export.convert.engines import VllmFit
from loraover_export.fold.certificate import Deviation
from loraover_export.uniform.certificate import LoraCertificate


class OutputsOfConversion(BaseModel):
    """Logits of the written adapter against those of the source, both as PEFT loads them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    base: str = Field(description="base model that was run, in words")
    device: str = Field(description="device that the models ran on: cpu, cuda, one GPU such as cuda:1, or mps")
    compute_dtype: str = Field(description="data type that the models ran in: fp32, bf16, fp16 or fp64")
    tokens: int = Field(description="number of tokens in all prompts")
    prompt_source: str = Field(description="where the prompts come from, in words")
    error: Deviation = Field(description="distance of the written adapter from the source")
    adapter_effect: float = Field(description="largest change of a logit that the source makes to the base model")


class ConvertReport(BaseModel):
    """Ranks, errors and certificate of one conversion."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: str = Field(description="kind of the source, as PEFT names it")
    exact_rank: int = Field(description="largest rank of any module's exact delta_W")
    truncated: bool = Field(description="whether a smaller rank than the exact one was asked for")
    vllm: VllmFit = Field(description="whether vLLM takes the written rank")
    engines: str = Field(description="which engines take the exact rank, in words")
    certificate: LoraCertificate = Field(description="errors of the written adapter")
    outputs: OutputsOfConversion | None = Field(
        default=None, description="effect on logits; None if it was not asked for, or the certificate failed"
    )

    @property
    def passed(self) -> bool:
        """Whether the certificate passed, so that the adapter was written."""
        return self.certificate.passed
