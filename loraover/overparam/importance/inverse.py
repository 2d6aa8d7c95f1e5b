"""Control: the worst sites first."""

from __future__ import annotations

from collections.abc import Callable
from typing import final

from torch import Tensor

from loraover.overparam.importance.base import GradientScore, Probe


@final
class Inverse(GradientScore):
    """`fisher` with its order reversed; a score that is worth something must beat it."""

    def of(self, group: int, matrices: Callable[[], Tensor], gradients: Tensor, counts: Tensor) -> Tensor:
        return gradients.square().mean((1, 2))

    def values(self, probe: Probe | None) -> dict[str, float]:
        return {name: -value for name, value in super().values(probe).items()}
