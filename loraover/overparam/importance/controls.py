"""Controls, which a useful score must do better than: the worst sites first, and random ones."""

from __future__ import annotations

import hashlib
from typing import final

from loraover.overparam.importance.base import Probe, Score
from loraover.overparam.importance.fisher import Fisher


@final
class Inverse(Fisher):
    """The score `fisher` with its order reversed."""

    def values(self, probe: Probe | None) -> dict[str, float]:
        return {name: -value for name, value in super().values(probe).items()}


@final
class Random(Score):
    """Random number between 0 and 1, drawn from the seed and the site's name."""

    def values(self, probe: Probe | None) -> dict[str, float]:
        return {name: self._draw(name) for name in self.sites}

    def _draw(self, name: str) -> float:
        digest = hashlib.sha256(f"{self.seed}:rank:{name}".encode()).digest()
        return int.from_bytes(digest[:6], "little") / 2**48
