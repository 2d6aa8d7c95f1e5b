"""The measurement of one engine: a warm-up, then blocks of waves, which several adapters may answer in turn."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import final

from loraover.common.errors import EngineError
from loraover_serve.engines.base import Sample, Timed, TokenRequest
from loraover_serve.parity.samples import MIXED, SWITCHING, Measurement


def block_orders(arms: Sequence[str], blocks: int, seed: int) -> list[list[str]]:
    """Order of the arms in each block: a random order, followed by the same order reversed (ABBA).

    A drift that is linear within a block changes every arm's mean alike, so their ratios stay the same.

    Args:
        arms: Names of the arms.
        blocks: Number of blocks.
        seed: Seed of the random orders.

    Returns:
        `blocks` lists of 2 x len(arms) names.
    """
    draw = random.Random(seed)
    orders = []
    for _ in range(blocks):
        forth = draw.sample(list(arms), len(arms))
        orders.append(forth + forth[::-1])
    return orders


def measure(
    engine: Timed,
    requests: Sequence[TokenRequest],
    *,
    concurrency: int,
    blocks: int,
    seed: int,
    waves: int = 1,
    warm_up: int = 1,
    on_block: Callable[[], None] = lambda: None,
) -> Measurement:
    """Run every arm twice in every block, both times on the same `waves` times `concurrency` requests.

    Args:
        engine: The engine, with all arms loaded.
        requests: Requests in the order in which they are sent, and from the start again when they run out.
        concurrency: Number of simultaneous requests.
        blocks: Number of blocks to measure.
        seed: Seed of the order of arms.
        waves: Number of waves of simultaneous requests that an arm answers in a row.
        warm_up: Number of blocks that are run first, and not measured.
        on_block: Called after each measured block.

    Returns:
        The samples of complete blocks, also after a failure or Ctrl-C.

    Raises:
        EngineError: An engine that failed before one block was complete.
        KeyboardInterrupt: Ctrl-C before one block was complete.
    """
    samples: list[Sample] = []
    failure = None
    done = 0
    for block, order in enumerate(block_orders(engine.arms, warm_up + blocks, seed)):
        first, size = block * waves * concurrency, waves * concurrency
        row = [requests[i % len(requests)] for i in range(first, first + size)]
        try:
            answered = [sample for arm in order for sample in engine.run(arm, block, first, row)]
        except (EngineError, KeyboardInterrupt) as error:
            if not done:
                raise
            failure = "interrupted" if isinstance(error, KeyboardInterrupt) else str(error)
            break
        if block >= warm_up:
            samples += answered
            done += 1
            on_block()
    return Measurement(engine.name, concurrency, done, tuple(samples), failure, waves)


Together = Callable[[Sequence[str], str, int, int, Sequence[TokenRequest]], list[Sample]]
"""Function that answers each request with its own arm: arms, name in the samples, block, first index, requests."""


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
        found: list[Sample] = []
        for start in range(0, len(requests), self.concurrency):
            wave, at = requests[start : start + self.concurrency], first + start
            if arm == MIXED and self._together is not None:
                adapters = [self._adapter_of(arm, at + i) for i in range(len(wave))]
                found += self._together(adapters, arm, block, at, wave)
            else:
                samples = self._engine.run(self._adapter_of(arm, at), block, at, wave)
                found += [replace(sample, arm=arm) for sample in samples]
        return found

    def _adapter_of(self, arm: str, request: int) -> str:
        return adapter_of(self.adapters, self.concurrency, arm, request)


def adapter_of(adapters: Sequence[str], concurrency: int, arm: str, request: int) -> str:
    """Name of the adapter that answers a request of an arm.

    Args:
        adapters: Names of the adapters that take turns.
        concurrency: Number of requests of a wave.
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
