"""Run work that waits for other processes or machines, several items at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from loraover.client.at_once import at_once

if TYPE_CHECKING:
    from loraover.common.reporter import Reporter

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_parallel(
    work: Callable[[Item], Result], items: Sequence[Item], workers: int, label: str, report: Reporter
) -> list[Result]:
    """Apply a function to every item in threads; the first error ends it, and Ctrl-C does not wait for other items.

    Args:
        work: The function.
        items: Its arguments.
        workers: Number of items at the same time.
        label: Name of the work, for progress.
        report: Receiver of progress.

    Returns:
        The results in the order of the items.
    """
    with report.task(label, len(items)) as advance:
        return at_once(work, items, workers, advance)
