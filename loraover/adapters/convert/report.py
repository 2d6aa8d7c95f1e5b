"""Result of a conversion."""

from __future__ import annotations

from pydantic import Field

from loraover.adapters.convert.request import ConvertRequest
from loraover.adapters.uniform.certificate import LoraCertificate, OutputsOfConversion
from loraover.adapters.uniform.rank_limits import MAX_LORA_RANKS, max_lora_rank
from loraover.common.strict_json import StrictModel


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
        option = ConvertRequest.named("approximate_to_rank")
        return f"only vLLM names a largest rank, {self.largest}, so {option} {self.largest} would fit it"


class ConvertReport(StrictModel):
    """Ranks, errors and certificate of one conversion."""

    method: str = Field(description="Kind of the source, as PEFT names it")
    exact_rank: int = Field(description="Largest rank of any module's exact delta_W")
    truncated: bool = Field(description="Whether a smaller rank than the exact one was asked for")
    vllm: VllmFit = Field(description="Whether vLLM takes the written rank")
    engines: str = Field(description="Which engines take the exact rank, in words")
    certificate: LoraCertificate = Field(description="Verdict and errors of the written adapter")

    @property
    def outputs(self) -> OutputsOfConversion | None:
        """Comparison of logits; None if it was not asked for, or a matrix failed its check."""
        return self.certificate.outputs

    @property
    def passed(self) -> bool:
        """Whether the certificate's verdict is "passed"."""
        return self.certificate.passed

    @property
    def exit_code(self) -> int:
        """Exit code of the command."""
        return self.certificate.exit_code
