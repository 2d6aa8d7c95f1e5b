"""Control: random scores."""

from __future__ import annotations

import hashlib
from typing import final

from loraover.overparam.importance.base import Probe, Score


@final
class Random(Score):
    """Random number between 0 and 1, drawn from the seed and the site's name."""

    def values(self, probe: Probe | None) -> dict[str, float]:
        return {name: self._draw(name) for name in self.sites}

    def _draw(self, name: str) -> float:
        digest = hashlib.sha256(f"{self.seed}:rank:{name}".encode()).digest()
        return int.from_bytes(digest[:6], "little") / 2**48
