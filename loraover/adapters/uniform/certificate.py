"""Contents of `lora_certificate.json`: the proof of a plain LoRA that was written from other adapters."""

from __future__ import annotations

from pathlib import Path
from threading import Event

from pydantic import Field

from loraover.adapters.numerics.matrix_certificate import MatrixCertificate
from loraover.adapters.verdict import NOISE_FACTOR, Certificate, CheckVerdict, Deviation, verdict_on
from loraover.checkpoint.files import CONFIG_FILE, CORES_FILE, META_FILE, TENSORS_FILE
from loraover.checkpoint.tensor_file import sha256_of
from loraover.common.errors import CheckpointError
from loraover.common.strict_json import StrictModel

CERTIFICATE_FILE = "lora_certificate.json"
CONVERSION_FILE = "conversion.json"
"""Certificate of a conversion that another export began with."""
READ_FILES = (CONFIG_FILE, TENSORS_FILE, META_FILE, CORES_FILE)


class SourceRecord(StrictModel):
    """An adapter that was read."""

    path: str = Field(description="Folder of the adapter, as it was named")
    sha256: dict[str, str] = Field(description="SHA-256 of each file that was read, in hexadecimal digits")


def record_source(folder: Path, ending: Event | None = None) -> SourceRecord:
    """Return the record of an adapter, a plain one or a LoRA-Over checkpoint; it is worthless once `ending` is set."""
    try:
        files = [folder / name for name in READ_FILES if (folder / name).is_file()]
        return SourceRecord(path=str(folder), sha256={file.name: sha256_of(file, ending) for file in files})
    except OSError as error:
        raise CheckpointError(
            f"{error.filename or folder}: cannot be read: {error.strerror or error}; check the permissions."
        ) from error


class ModuleCertificate(StrictModel):
    """Distance of one written delta_W from the exact one, as Frobenius norms."""

    module: str = Field(description="Path of the module in the base model")
    embedding: bool = Field(description="Whether the module is an embedding")
    shape: tuple[int, int] = Field(description="out_features and in_features of delta_W")
    rank: int = Field(description="Rank that delta_W takes; smaller ranks than the adapter's are padded with zeros")
    norm: float = Field(description="Norm of the exact delta_W")
    truncation_error: float = Field(
        description="Norm of what a smaller rank left out: the root of the sum of squares of the other singular "
        "values; 0 if nothing was left out"
    )
    arithmetic_bound: float = Field(
        description="Bound of the error of the arithmetic: ours in float64, and PEFT's in float32 where it computes "
        "the start of the adapter from the base weight"
    )
    storage_error: float = Field(description="Norm of the change of delta_W by rounding A and B to the storage type")

    @property
    def error_bound(self) -> float:
        """Bound of the norm of the written delta_W minus the exact one."""
        return self.truncation_error + self.arithmetic_bound + self.storage_error

    @property
    def relative_error_bound(self) -> float:
        """`error_bound`, divided by the norm of the exact delta_W."""
        return self.error_bound / (self.norm or 1.0)


class OutputsOfConversion(StrictModel):
    """Logits of the written adapter against those of its source, both as PEFT loads them.

    The yardstick is the noise of rounding: the distance of either from its *twin*, the same adapter in which some
    numbers, and for the source some weights of the base model, were moved at random by one or two units in the last
    place.
    """

    base: str = Field(description="Base model that was run, in words")
    device: str = Field(description="Device that the models ran on: cpu, cuda, one GPU such as cuda:1, or mps")
    compute_dtype: str = Field(description="Data type that the models ran in: fp32, bf16, fp16 or fp64")
    tokens: int = Field(description="Number of tokens in all prompts")
    prompt_source: str = Field(description="Where the prompts come from, in words")
    error: Deviation = Field(description="Distance of the written adapter from the source")
    noise: Deviation | None = Field(
        description="Larger distance of the source and of the written adapter from their twins; None for an "
        "approximation, whose logits differ by more than rounding"
    )
    adapter_effect: float = Field(description="Largest change of a logit that the source makes to the base model")

    @property
    def bound(self) -> float | None:
        """Largest allowed logit error, NOISE_FACTOR times the noise; None for an approximation."""
        return None if self.noise is None else NOISE_FACTOR * self.noise.max_logit

    @property
    def verdict(self) -> CheckVerdict | None:
        """Verdict on the largest logit error; None for an approximation."""
        return None if self.bound is None else verdict_on(self.error.max_logit, self.bound, self.adapter_effect)


class LoraCertificate(Certificate):
    """Errors of a plain LoRA that was made from other adapters, and the contents of `lora_certificate.json`."""

    verdict: CheckVerdict = Field(
        description='"passed" if every matrix is within its bound, and the logits too if they were compared; '
        '"inconclusive" if the adapter moves logits too little for that comparison'
    )
    asked: dict[str, str] = Field(description="What was asked for, by the names of the command's options")
    sources: list[SourceRecord] = Field(description="Adapters that were read, in the order of the command line")
    base_model: str | None = Field(description="Base model that the adapter names; None if it names none")
    dtype: str = Field(description="Data type that the adapter is stored in: fp32, bf16 or fp16")
    rank: int = Field(description="Rank of every module; smaller ranks are padded with zeros")
    modules: list[ModuleCertificate] = Field(description="One certificate for each delta_W")
    matrices: list[MatrixCertificate] = Field(description="One certificate for each A and each B")
    notes: list[str] = Field(description="What else a reader should know, in words")
    outputs: OutputsOfConversion | None = Field(
        default=None, description="Logits against those of the source; None if they were not compared"
    )
    output_bound: float | None = Field(default=None, description="Largest allowed logit error; None if there is none")
    versions: dict[str, str] = Field(description="Versions of Python and packages, by name")
    hardware: str = Field(description="Processor and accelerator of the machine, in words")


def module_facts(modules: list[ModuleCertificate]) -> dict[str, str]:
    """Return rows of a model card that sum up many modules."""
    left_out = max(module.truncation_error / (module.norm or 1.0) for module in modules)
    return {
        "modules": str(len(modules)),
        "largest share of a module's norm that the rank left out": f"{left_out:.2e}",
        "largest bound of a module's relative error": f"{max(m.relative_error_bound for m in modules):.2e}",
    }
