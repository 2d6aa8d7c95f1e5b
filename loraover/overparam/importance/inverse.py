"""Control: the worst sites first."""

from __future__ import annotations

from typing import final

from loraover.overparam.importance.base import Probe
from loraover.overparam.importance.fisher import Fisher


@final
class Inverse(Fisher):
    """The score `fisher` with its order reversed: a useful score must do better than this one."""

    def values(self, probe: Probe | None) -> dict[str, float]:
        return {name: -value for name, value in super().values(probe).items()}
