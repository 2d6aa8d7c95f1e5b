"""Arms whose requests go to several adapters: one after the other, or together in one batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import final

from loraover_serve.engines.base import Timed
from loraover_serve.engines.sample import Sample, TokenRequest
from loraover_serve.parity.samples import MIXED, SWITCHING

Together = Callable[[Sequence[str], str, int, int, Sequence[TokenRequest]], list[Sample]]
"""Answers each request with the arm of its own: arms, name in the samples, block, first index, requests."""


@final
class SeveralAdapters(Timed):
    """An engine whose arms answer waves of simultaneous requests, several in a row.

    The waves of "switching" go to the adapters in turn, and the requests of one wave of "mixed" go to the adapters in
    turn. All waves of another arm go to that arm.

    Args:
        engine: The engine, with every adapter loaded as an arm.
        adapters: Names of the arms that the adapters have; the first one is an arm here, too.
        concurrency: Number of requests of a wave.
        together: Function that sends the requests of a wave to different adapters; None leaves "mixed" out.
    """

    def __init__(self, engine: Timed, adapters: Sequence[str], concurrency: int, together: Together | None) -> None:
        self.name = engine.name
        self.adapters, self.concurrency = tuple(adapters), concurrency
        alone = tuple(arm for arm in engine.arms if arm not in self.adapters[1:])
        self._engine = engine
        self._together = together if concurrency > 1 else None
        self.arms = (*alone, SWITCHING, *(() if self._together is None else (MIXED,)))

    def run(self, arm: str, block: int, first: int, requests: Sequence[TokenRequest]) -> list[Sample]:
        waves = range(0, len(requests), self.concurrency)
        found = [self._wave(arm, block, first + i, requests[i : i + self.concurrency]) for i in waves]
        return [sample for wave in found for sample in wave]

    def _wave(self, arm: str, block: int, first: int, requests: Sequence[TokenRequest]) -> list[Sample]:
        if arm == MIXED and self._together is not None:
            adapters = [self._adapter_of(arm, first + i) for i in range(len(requests))]
            return self._together(adapters, arm, block, first, requests)
        samples = self._engine.run(self._adapter_of(arm, first), block, first, requests)
        return [replace(sample, arm=arm) for sample in samples]

    def _adapter_of(self, arm: str, request: int) -> str:
        return adapter_of(self.adapters, self.concurrency, arm, request)


def adapter_of(adapters: Sequence[str], concurrency: int, arm: str, request: int) -> str:
    """Name of the adapter that answers a request of an arm.

    Args:
        adapters: Names of the adapters that take turns.
        concurrency: Number of requests of a wave.
        arm: Name of the arm.
        request: Index of the request.
    """
    if arm not in (SWITCHING, MIXED):
        return arm
    turn = request if arm == MIXED else request // concurrency
    return adapters[turn % len(adapters)]


def answers_alone(
    engine: Timed, adapters: Sequence[str], requests: Sequence[TokenRequest], indices: Sequence[int], concurrency: int
) -> dict[tuple[str, int], Sample]:
    """Answers of each adapter alone to the same waves of requests, by its name and the index of the request.

    Args:
        engine: The engine, with every adapter loaded as an arm.
        adapters: Names of the adapters.
        requests: Requests in the order in which they are sent, and from the start again when they run out.
        indices: Indices of the requests, as many as a number of waves has.
        concurrency: Number of requests of a wave.

    Raises:
        EngineError: A request that failed.
    """
    found: dict[tuple[str, int], Sample] = {}
    for adapter in adapters:
        for start in range(0, len(indices), concurrency):
            wave = indices[start : start + concurrency]
            samples = engine.run(adapter, 0, wave[0], [requests[i % len(requests)] for i in wave])
            found |= {(adapter, sample.request): sample for sample in samples}
    return found
