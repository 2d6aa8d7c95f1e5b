"""First-order change of the loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import final

from torch import Tensor

from loraover.overparam.importance.base import GradientScore


@final
class Taylor(GradientScore):
    """Mean over elements and steps of |M * dL/dM|: to first order, the change of the loss if an element is set to zero.

    It is zero for both matrices of a module while B = 0.

    Source:
        Molchanov et al. 2019, arXiv:1906.10771, equation 8.
    """

    def of(self, group: int, matrices: Callable[[], Tensor], gradients: Tensor, counts: Tensor) -> Tensor:
        return (matrices() * gradients).abs().mean((1, 2))
