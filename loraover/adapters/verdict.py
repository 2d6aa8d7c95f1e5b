"""The distance of one model's logits from another's, and the verdict on it: the rule that every comparison has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self, final

from pydantic import Field

from loraover.checkpoint.carried_files import KEPT_FILE
from loraover.checkpoint.files import REFERENCE_FILE
from loraover.checkpoint.tensor_file import sha256_of
from loraover.common.atomic_output import AbandonedError
from loraover.common.later import torch
from loraover.common.paths import list_folder
from loraover.common.strict_json import StrictModel
from loraover.models.device import WITHOUT_FLOAT64

if TYPE_CHECKING:
    from torch import Tensor


ELEMENTS_AT_ONCE = 2**20
"""Logits that are compared at once: 8 MiB in float64, and a comparison holds about six such tensors."""


class Deviation(StrictModel):
    """Distance of one model's outputs from another's, over all positions of all prompts."""

    max_logit: float = Field(description="Largest absolute difference of two logits")
    mean_logit: float = Field(description="Mean absolute difference of logits")
    max_kl: float = Field(description="Largest KL(unfolded || other) of a position, in nats")
    mean_kl: float = Field(description="Mean KL(unfolded || other) of the positions, in nats")
    top1_agreement: float = Field(description="Share of positions with the same most likely token")


@final
class RunningDeviation:
    """Maxima and sums over all pieces so far; NaN anywhere makes the maxima NaN, which no bound accepts."""

    def __init__(self) -> None:
        self._maxima = torch.zeros(2, dtype=torch.float64)
        self._sums = torch.zeros(2, dtype=torch.float64)
        self._logits = self._positions = self._same = 0

    def add(self, reference: Tensor, other: Tensor) -> None:
        """Add a piece: two models' logits (positions, vocabulary) of the same positions, on any device."""
        if reference.device.type in WITHOUT_FLOAT64:
            reference, other = reference.cpu(), other.cpu()
        rows = max(1, ELEMENTS_AT_ONCE // reference.shape[-1])
        for p, q in zip(torch.split(reference, rows), torch.split(other, rows), strict=True):
            self._same += int((p.argmax(-1) == q.argmax(-1)).sum())
            error = (p.double() - q.double()).abs()
            log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
            divergence = (log_p.exp() * (log_p - log_q)).sum(-1).clamp_min(0)
            self._maxima = torch.maximum(self._maxima, torch.stack((error.max(), divergence.max())).cpu())
            self._sums += torch.stack((error.sum(), divergence.sum())).cpu()
            self._logits += error.numel()
            self._positions += len(divergence)

    def result(self) -> Deviation:
        """Return the figures over all pieces, of which there must be one at least."""
        return Deviation(
            max_logit=float(self._maxima[0]),
            mean_logit=float(self._sums[0]) / self._logits,
            max_kl=float(self._maxima[1]),
            mean_kl=float(self._sums[1]) / self._positions,
            top1_agreement=self._same / self._positions,
        )


def largest(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """Return the largest absolute difference of two lists of logits; NaN if one is NaN."""
    return float(torch.stack([difference.abs().max() for difference in differences(one, other)]).max())


def differences(one: Sequence[Tensor], other: Sequence[Tensor]) -> list[Tensor]:
    """Return the differences of two lists of logits, in float64."""
    return [a.double() - b.double() for a, b in zip(one, other, strict=True)]


def largest_of(noises: list[Deviation]) -> Deviation:
    """Return the largest of each distance, and the smallest agreement."""
    return Deviation(
        **{name: max(getattr(n, name) for n in noises) for name in ("max_logit", "mean_logit", "max_kl", "mean_kl")},
        top1_agreement=min(n.top1_agreement for n in noises),
    )


NOISE_FACTOR = 3.0
POWER = 2.0
"""Multiple of the allowed error by which an adapter must change some logit, so that its loss would be noticed."""

CheckVerdict = Literal["passed", "failed", "inconclusive"]
ExportVerdict = Literal["passed", "failed", "inconclusive", "not checked"]
EXIT_CODES = {"passed": 0, "not checked": 0, "failed": 1, "inconclusive": 3}
"""Exit code of the command for each verdict."""


class Proof(StrictModel):
    """Verdict on an output, and what it rests on."""

    schema_version: int = 1
    verdict: str

    @property
    def passed(self) -> bool:
        """Whether the verdict is "passed"."""
        return self.verdict == "passed"

    @property
    def exit_code(self) -> int:
        """Exit code of the command."""
        return EXIT_CODES[self.verdict]


class Certificate(Proof):
    """A proof that lies beside the output, whose files it names."""

    output: dict[str, str] = Field(
        default={}, description="SHA-256 of each file that lay beside the certificate when it was written, by its path"
    )

    def keep(self, file: Path, known: Mapping[str, str] | None = None) -> Self:
        """Write the certificate beside the output, and return it with the digests of the output's files.

        It names no reference, which may be recorded again. A verdict "failed" raises AbandonedError. `known` has the
        digests of files that were hashed before.
        """
        if self.verdict == "failed":
            raise AbandonedError
        found = list_folder(file.parent).files.items()
        output = {
            name: (known or {}).get(name) or sha256_of(path)
            for name, path in found
            if not name.endswith((REFERENCE_FILE, KEPT_FILE))
        }
        kept = self.model_copy(update={"output": output})
        file.write_text(kept.model_dump_json(indent=1) + "\n")
        return kept


def verdict_on(error: float, bound: float, adapter_effect: float) -> CheckVerdict:
    """Return the verdict on a logit error.

    It is inconclusive where the error is within its bound, but an adapter that does nothing could be within it as
    well: where the adapter changes no logit, or none by POWER times the bound.

    Args:
        error: Largest logit error; NaN fails.
        bound: Largest allowed error.
        adapter_effect: Largest change of a logit that the adapter makes to the base model; NaN proves nothing.
    """
    if not error <= bound:
        return "failed"
    return "passed" if adapter_effect > 0 and adapter_effect >= POWER * bound else "inconclusive"
