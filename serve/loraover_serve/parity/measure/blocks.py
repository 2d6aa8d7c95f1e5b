"""The measurement of one engine: a warm-up, then one block after another."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from loraover.common.errors import EngineError
from loraover_serve.engines.base import Timed
from loraover_serve.engines.sample import Sample, TokenRequest
from loraover_serve.parity.samples import Measurement


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
