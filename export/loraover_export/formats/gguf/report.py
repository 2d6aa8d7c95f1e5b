"""Report of `export_gguf`, the proof of an export for llama.cpp, and its text for the terminal."""

from __future__ import annotations

import shlex

from pydantic import Field
from rich.console import Console

from loraover.adapters.numerics.matrix_certificate import MatrixCertificate, matrix_facts
from loraover.adapters.show import in_one_line, show_left_out, show_place, show_verdict, undecided
from loraover.adapters.verdict import CheckVerdict, ExportVerdict, Proof, verdict_on
from loraover.common.strict_json import StrictModel
from loraover.reporting.reporter import print_line
from loraover_export.requests import GgufRequest

NOISE_FACTOR = 6.0
ARITHMETIC = 2.0**-16
"""Error of 256 successive roundings to float32, as a share of the adapter's effect."""
TABLE = 2.0**-9
"""Error of four roundings to float16, as in llama.cpp's table of GELU, as a share of the adapter's effect."""


class GgufCheck(StrictModel):
    """Logits of llama.cpp with the adapter, on a GGUF file of the base model, against the PyTorch reference's."""

    base_gguf: str = Field(description="File of the base model")
    weight_types: list[str] = Field(description="Storage types of its matrices, such as F32 or Q4_K")
    engine: str = Field(description="Version of llama-cpp-py-sync, whose libllama ran")
    prompts: int = Field(description="Number of prompts")
    tokens: int = Field(description="Number of tokens in all prompts")
    prompt_source: str = Field(description="Where the prompts come from, in words")
    base_distance: float = Field(
        description="Largest logit difference of the two base models, which is the effect of quantisation and rounding"
    )
    error: float = Field(description="Largest logit error of llama.cpp with the adapter")
    rounding_distance: float = Field(
        description="Largest change of a logit in PyTorch by the rounding of A and B to the adapter's data type"
    )
    adapter_effect: float = Field(description="Largest change that the adapter makes to a logit in PyTorch")

    arithmetic: float = Field(description="Allowed error from the engine's arithmetic, as a share of adapter_effect")

    @property
    def bound(self) -> float:
        """Largest allowed error: NOISE_FACTOR times the larger of two measured distances, or a share of the effect.

        The distance of the base models is what quantisation and the engine's arithmetic do to a model. The distance by
        rounding is what the file's data type does to the adapter; llama.cpp rounds activations to that type as well.
        The share is for a base model that is exact because its activations are small, while the adapter makes them
        large. Of 288 exports for random models with two layers, the largest error was 0.6 times its bound.
        """
        distance = max(self.base_distance, self.rounding_distance)
        return max(NOISE_FACTOR * distance, self.arithmetic * self.adapter_effect)

    @property
    def verdict(self) -> CheckVerdict:
        """Verdict on the error; inconclusive where an adapter that does nothing could pass as well."""
        return verdict_on(self.error, self.bound, self.adapter_effect)


class GgufReport(Proof):
    """Result of an export for llama.cpp."""

    verdict: ExportVerdict = Field(
        description='"not checked": every matrix is within its bound, and llama.cpp was not run'
    )
    base_model: str = Field(description="Folder or hub name of the base model")
    architecture: str = Field(description="Model class of the base model in transformers")
    family: str = Field(description="llama.cpp's name of the architecture")
    dtype: str = Field(description="Data type that the adapter is stored in: fp32, fp16 or bf16")
    rank: int = Field(description="Rank of every module; smaller ranks are padded with zeros")
    scaling: dict[str, float] = Field(description="Factor that B was multiplied by, by module")
    reordered: list[str] = Field(description="Modules whose rows of B are in llama.cpp's order")
    left_out: list[str] = Field(description="Tensors not written: copies of the base model's frozen weights")
    matrices: list[MatrixCertificate] = Field(description="One certificate for each A and each scaling * B")
    check: GgufCheck | None = Field(description="Logits of llama.cpp against PyTorch's; None without --base-gguf")
    versions: dict[str, str] = Field(description="Versions of Python and packages, by name")
    hardware: str = Field(description="Processor and accelerator of the machine, in words")


def show_report(report: GgufReport, request: GgufRequest, console: Console) -> None:
    """Print the certificate, the check, the verdict, and how to run the adapter if it was written."""
    facts = in_one_line(matrix_facts(report.matrices))
    print_line(console, f"{report.family}, rank {report.rank}, {report.dtype}, {facts}")
    show_left_out(report.left_out, console)
    if (check := report.check) is not None:
        kinds = "/".join(check.weight_types)
        print_line(console, f"llama.cpp against the PyTorch reference, {check.tokens} tokens, {kinds}:")
        print_line(console, f"  largest logit error {check.error:.2e}, allowed {check.bound:.2e}")
        print_line(console, f"  base model against base model {check.base_distance:.2e}")
        print_line(console, f"  change that the adapter makes {check.adapter_effect:.3g}")
        if check.verdict == "inconclusive":
            remedy = "A GGUF file of the base model in F32 allows a smaller error; "
            remedy += "if this one is in F32, it holds another model's weights."
            print_line(console, undecided("The adapter", remedy), "yellow")
    show_verdict(report, f"export {report.verdict}", console)
    if report.verdict == "not checked":
        print_line(console, "llama.cpp was not run; --base-gguf FILE compares its logits with PyTorch's")
    show_place(report, request.output, console, reason="an adapter that fails its check is not kept")
    if report.verdict != "failed":
        print_line(console, f"run it: {shlex.join(['llama-server', '-m', 'BASE.gguf', '--lora', str(request.output)])}")
