"""Control: the worst sites first."""

from __future__ import annotations

from collections.abc import Callable
from typing import final

from torch import Tensor

from loraover.overparam.importance.base import GradientScore, Probe


@final
class Inverse(GradientScore):
    """The score `fisher` with its order reversed: a useful score must do better than this one."""

    def of(self, group: int, matrices: Callable[[], Tensor], gradients: Tensor, counts: Tensor) -> Tensor:
        return gradients.square().mean((1, 2))

    def values(self, probe: Probe | None) -> dict[str, float]:
        return {name: -value for name, value in super().values(probe).items()}
