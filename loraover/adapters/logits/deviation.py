"""Distance of one model's logits from another's, summed piece by piece, so that no logits are kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, final

from pydantic import Field

from loraover.common.later import torch
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
        """Add a piece.

        Args:
            reference: Logits of shape (positions, vocabulary), on any device.
            other: The other model's logits of the same positions.
        """
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
