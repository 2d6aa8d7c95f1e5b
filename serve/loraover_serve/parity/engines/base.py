"""What the benchmark asks of an engine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from loraover_serve.parity.sample import Sample
from loraover_serve.parity.workload import Request


class Engine(ABC):
    """A running engine with all arms loaded."""

    name: str
    arms: tuple[str, ...]

    @abstractmethod
    def run(self, arm: str, block: int, first: int, requests: Sequence[Request]) -> list[Sample]:
        """Answer some requests at the same time, greedily and without an early end.

        Args:
            first: index of the first of them.
        Raises:
            EngineError: a request that failed, or hung.
        """
