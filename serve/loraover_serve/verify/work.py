"""Work of a recording: how long it takes, which is said before it begins, and how much of it is done.

Work is counted in passes, each of the base model over one question or text.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, repeat
from typing import TypeVar

import torch

from loraover.common.reporter import Reporter

Item = TypeVar("Item")
Advance = Callable[[float], None]
"""Function that is told how many passes are done beside those before."""

TRIED = 2  # questions or texts, on which a pass is timed
ROUNDED = 4.0  # passes over a question in the time in which each weight of the model is rounded


@dataclass(frozen=True)
class Work:
    """Work of a recording.

    Args:
        pass_s: Seconds of a pass.
        right: Passes of the right models, for their answers and logprobs.
        formats: Passes in coarser number formats.
        faults: Passes of each model with a fault.
        long: Passes over long questions.
    """

    pass_s: float
    right: float
    formats: float
    faults: Sequence[float]
    long: float = 0.0

    @property
    def passes(self) -> float:
        """Number of all passes."""
        return self.right + self.formats + sum(self.faults) + self.long

    @property
    def seconds(self) -> float:
        """Seconds of all passes."""
        return self.passes * self.pass_s

    @contextmanager
    def shown(self, report: Reporter, label: str) -> Iterator[Advance]:
        """Show during a block how much of the work is done."""
        total, so_far = max(1, round(self.passes)), 0.0
        with report.task(label, total) as done:

            def advance(passes: float) -> None:
                nonlocal so_far
                so_far += passes
                done(min(total, round(so_far)))

            yield advance


def unseen(passes: float) -> None:
    """Show nothing."""


def each_done(items: Iterable[Item], costs: Iterable[float], advance: Advance) -> Iterator[Item]:
    """Yield items when they are there, and tell the passes of each."""
    for item, cost in zip(items, chain(costs, repeat(0.0)), strict=False):
        advance(cost)
        yield item


@torch.inference_mode()
def time_passes(run: Callable[[], object], number: int) -> float:
    """Seconds of a pass, from the second of two runs of so many passes: the first one fills caches."""
    for _ in range(2):
        start = time.monotonic()
        run()
    return (time.monotonic() - start) / number
