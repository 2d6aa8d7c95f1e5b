"""Run the design: warm up, then block after block."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from loraover.common.errors import EngineError
from loraover_serve.engines.base import Engine
from loraover_serve.engines.sample import Request, Sample
from loraover_serve.parity.measure.design import block_orders
from loraover_serve.parity.samples import Measurement


def measure(
    engine: Engine,
    requests: Sequence[Request],
    *,
    concurrency: int,
    blocks: int,
    seed: int,
    warm_up: int = 1,
    on_block: Callable[[], None] = lambda: None,
) -> Measurement:
    """Every arm twice in every block, each time on `concurrency` requests at once; both times the same ones.

    Args:
        requests: taken in order, from the start again when they run out.
        warm_up: blocks that are run and forgotten.

    Returns:
        The samples of the blocks that were run whole: an engine that fails in the middle, or Ctrl-C, keeps them.

    Raises:
        EngineError: the engine failed before one block was whole; KeyboardInterrupt likewise.
    """
    samples: list[Sample] = []
    failure = None
    done = 0
    for block, order in enumerate(block_orders(engine.arms, warm_up + blocks, seed)):
        first = block * concurrency
        wave = [requests[i % len(requests)] for i in range(first, first + concurrency)]
        try:
            answered = [sample for arm in order for sample in engine.run(arm, block, first, wave)]
        except (EngineError, KeyboardInterrupt) as error:
            if not done:
                raise
            failure = "interrupted" if isinstance(error, KeyboardInterrupt) else str(error)
            break
        if block >= warm_up:
            samples += answered
            done += 1
            on_block()
    return Measurement(engine.name, concurrency, done, tuple(samples), failure)
