"""Work that waits for other processes or machines, several pieces at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from loraover.progress import Reporter

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_parallel(
    work: Callable[[Item], Result], items: Sequence[Item], workers: int, label: str, report: Reporter
) -> list[Result]:
    """`work` of every item, in order; the first error ends it."""
    found: list[Result] = []
    with report.task(label, len(items)) as advance, ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(work, item) for item in items]
        try:
            for future in futures:
                found.append(future.result())
                advance(len(found))
        finally:
            pool.shutdown(cancel_futures=True)
    return found
