"""Diagonal of the empirical Fisher information."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from loraover.overparam.importance.base import GradientScore


class Fisher(GradientScore):
    """Mean over elements and steps of the squared gradient.

    With gradient accumulation it is the square of the mean over micro-batches. The score of A is zero in the first
    step, where B = 0.

    Source:
        Gao et al. 2023 (OPF), section 3.3.
    """

    def of(self, group: int, matrices: Callable[[], Tensor], gradients: Tensor, counts: Tensor) -> Tensor:
        return gradients.square().mean((1, 2))
