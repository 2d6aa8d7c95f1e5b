"""Work that waits for other processes or machines, several pieces at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from multiprocessing.pool import ThreadPool
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from loraover.reporting.reporter import Reporter

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_parallel(
    work: Callable[[Item], Result], items: Sequence[Item], workers: int, label: str, report: Reporter
) -> list[Result]:
    """`work` of every item, in order; the first error ends it, and Ctrl-C waits for no piece that is on its way."""
    found: list[Result] = []
    with report.task(label, len(items)) as advance, ThreadPool(workers) as pool:
        for result in pool.imap(work, items):
            found.append(result)
            advance(len(found))
    return found
