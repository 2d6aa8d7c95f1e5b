"""Contents of `fold_certificate.json`: the proof of a fold."""

from __future__ import annotations

from pydantic import Field

from loraover.adapters.logits.verdict import NOISE_FACTOR, Certificate, CheckVerdict, Deviation, verdict_on
from loraover.adapters.numerics.matrix_certificate import MatrixCertificate
from loraover.common.strict_json import StrictModel


class OutputCertificate(StrictModel):
    """Outputs of the folded adapter, as PEFT loads it, against the unfolded model's.

    The yardstick is the noise of rounding: the distance between *twins*, adapters whose elements were rounded at
    random to one of the two neighbouring numbers.
    """

    base: str = Field(description="Base model that was run, in words")
    device: str = Field(description="Device that the models ran on: cpu, cuda, one GPU such as cuda:1, or mps")
    compute_dtype: str = Field(description="Data type that the models ran in: fp32, bf16, fp16 or fp64")
    prompts: int = Field(description="Number of prompts")
    tokens: int = Field(description="Number of tokens in all prompts")
    compared_tokens: int = Field(
        description="Number of these tokens at which every layer applied its cores; where cores are too large to be "
        "applied at all tokens, the others went through the folded A and B"
    )
    prompt_source: str = Field(description="Where the prompts come from, in words")
    error: Deviation = Field(description="Distance of the folded adapter from the unfolded model")
    noise: Deviation = Field(description="Largest distance between any two twins")
    twins: int = Field(description="Number of twins; each also has its ranks in another order")
    adapter_effect: float = Field(description="Largest change of a logit that the adapter makes to the base model")

    @property
    def bound(self) -> float:
        """Largest allowed logit error: NOISE_FACTOR times the noise.

        Two twins differ by two random roundings, each of twice the variance of one rounding to nearest, so about half
        of their noise is expected; the factor leaves room for the spread of maxima and for the other arithmetic of
        the unfolded model.
        """
        return NOISE_FACTOR * self.noise.max_logit

    @property
    def verdict(self) -> CheckVerdict:
        """Verdict on the largest logit error."""
        return verdict_on(self.error.max_logit, self.bound, self.adapter_effect)

    @property
    def passed(self) -> bool:
        """Whether the verdict is "passed"."""
        return self.verdict == "passed"


class TrainedBase(StrictModel):
    """The folded adapter on the base model as it was quantised in training, and on the full one."""

    quantization: str = Field(description="How bitsandbytes quantised the base model in training: nf4 or int8")
    served: str = Field(description="Base model that the adapter names and engines load, in full precision, in words")
    difference: Deviation = Field(description="Distance of the adapter on the quantised base from it on the full one")
    bases: Deviation = Field(description="Distance of the quantised base from the full one, both without an adapter")

    def __str__(self) -> str:
        return (
            f"Engines will serve the adapter on {self.served} in full precision, but it was trained on that model in "
            f"{self.quantization}. Between the two, its logits differ by up to {self.difference.max_logit:.2g} "
            f"(mean KL {self.difference.mean_kl:.2g} nats, {self.difference.top1_agreement:.1%} same top-1); without "
            f"the adapter by up to {self.bases.max_logit:.2g} (mean KL {self.bases.mean_kl:.2g} nats)."
        )


class FoldCertificate(Certificate):
    """Result of a fold, and the contents of `fold_certificate.json`."""

    verdict: CheckVerdict
    base_model: str | None = Field(description="Base model that the adapter names; None if it names none")
    dtype: str = Field(description="Data type that the adapter is stored in: fp32, bf16 or fp16")
    decomposition: str = Field(description="Tensor network that the matrices were trained as")
    step: int = Field(description="Optimizer steps that the checkpoint was trained for")
    seed: int | None = Field(description="Seed of the random draws in training's cores; None: the run's, or 0")
    matrices: list[MatrixCertificate] = Field(description="One certificate for each A and B")
    outputs: OutputCertificate | None = Field(description="Check of the outputs; None if it was not asked for")
    trained_base: TrainedBase | None = Field(
        None, description="The adapter on the base as quantised in training and on the full one; None: not asked for"
    )
    output_bound: float | None = Field(description="Largest allowed logit error; None without a check of the outputs")
    versions: dict[str, str] = Field(description="Versions of Python and packages, by name")
    hardware: str = Field(description="Processor and accelerator of the machine, in words")
    date: str = Field(description="Day of the fold, in UTC")
