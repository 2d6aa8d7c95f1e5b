"""Work on many items, in this process or in several, of which none ends the others."""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def each(
    work: Callable[[Item], Result], items: Iterable[Item], jobs: int, killed: Callable[[Item], Result]
) -> Iterator[tuple[Item, Result]]:
    """Yield each item with its result, as soon as there is one.

    A process that is killed, such as by a system without memory, takes the items of its pool along. These are tried
    again one at a time, each in a process of its own, so that the one that kills it is known.

    Args:
        work: Function of an item, which can be sent to other processes.
        items: Items of the work.
        jobs: Number of processes; 1 means this process.
        killed: Function that gives the result of an item whose process was killed.
    """
    if jobs == 1:
        for item in items:
            yield item, work(item)
        return
    waiting = deque(items)
    while waiting:
        lost: list[Item] = []
        with _pool(min(jobs, len(waiting))) as pool:
            yield from _until_broken(pool, work, waiting, jobs, lost)
        for item in lost:
            with _pool(1) as alone:
                try:
                    result = alone.submit(work, item).result()
                except BrokenProcessPool:
                    result = killed(item)
            yield item, result


def _until_broken(
    pool: ProcessPoolExecutor, work: Callable[[Item], Result], waiting: deque[Item], jobs: int, lost: list[Item]
) -> Iterator[tuple[Item, Result]]:
    """Take items from `waiting` and yield their results; where the pool breaks, add those that were begun to `lost`."""
    running: dict[Future[Result], Item] = {}
    while waiting or running:
        while waiting and len(running) < jobs:
            item = waiting.popleft()
            try:
                running[pool.submit(work, item)] = item
            except BrokenProcessPool:
                lost += [item, *running.values()]
                return
        done, _ = wait(running, return_when=FIRST_COMPLETED)
        broken = [future for future in done if isinstance(future.exception(), BrokenProcessPool)]
        for future in done - {*broken}:
            yield running.pop(future), future.result()
        if broken:
            lost += running.values()
            return


def _pool(jobs: int) -> ProcessPoolExecutor:
    """Return a pool of new processes: a copy of one that has threads, as PyTorch makes them, may hang."""
    return ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"))
