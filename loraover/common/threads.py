"""Number of threads that PyTorch and NumPy use, and threads that work beside one another."""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from functools import lru_cache
from threading import Event
from typing import Any, TypeVar

from loraover.common.later import torch

MAX_WORKERS = 8
"""Largest number of threads: more would wait for memory, and each holds the numbers that it works on."""

KEPT_BYTES = 31 * 2**20
"""Size just below that of the largest freed block which the C library of Linux can be made to keep, 32 MiB."""

S = TypeVar("S")
T = TypeVar("T")


@contextmanager
def one_thread() -> Iterator[None]:
    """Run a block on one thread, which is faster for many small tensors: more threads mostly wait for one another."""
    pools: list[Any] = [*_blas()]
    if "torch" in sys.modules:
        pools.append(torch)
    before = [
        (pool, threads) for pool in pools if (threads := pool.get_num_threads() or 1) > 1
    ]  # None if it does not tell
    for pool, _ in before:
        pool.set_num_threads(1)
    try:
        yield
    finally:
        for pool, threads in before:
            pool.set_num_threads(threads)


@lru_cache(maxsize=1)
def _blas() -> list[Any]:
    """Return the libraries by which NumPy multiplies matrices, whose threads otherwise spin while they wait.

    None are returned without threadpoolctl, which vLLM's environment lacks; folds of large adapters then take longer.
    """
    try:
        from threadpoolctl import ThreadpoolController
    except ImportError:
        return []
    return [library for library in ThreadpoolController().lib_controllers if library.user_api == "blas"]


def usual_threads() -> int:
    """Return the number of threads that PyTorch uses, or would by default: OMP_NUM_THREADS, or all processors."""
    if "torch" in sys.modules:
        found: int = torch.get_num_threads()
        return found
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if asked.isdecimal() and int(asked) > 0:
        return int(asked)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Workers:
    """Threads that run functions for a block of the caller's, made by `workers`.

    Attributes:
        ending: Set when the block is left. A function that takes long should look at it and stop.
    """

    def __init__(self, pool: ThreadPoolExecutor, ending: Event) -> None:
        self._pool = pool
        self.ending = ending

    def start(self, work: Callable[..., T], *arguments: object) -> Future[T]:
        """Run a function when a thread is free; `result()` returns what it returns, or raises what it raises."""
        return self._pool.submit(copy_context().run, work, *arguments)

    def map(self, work: Callable[[S], T], items: Iterable[S]) -> Iterator[T]:
        """Yield what a function returns for each item, in order, computed some items ahead of the caller.

        The items are read on the caller's thread, and no more than 2 MAX_WORKERS of them or their results are held.
        """
        started: deque[Future[T]] = deque()
        for item in items:
            started.append(self.start(work, item))
            if len(started) == 2 * MAX_WORKERS:
                yield started.popleft().result()
        while started:
            yield started.popleft().result()


@contextmanager
def workers(most: int = MAX_WORKERS) -> Iterator[Workers]:
    """Yield as many threads as PyTorch would use, at most `most`; each of them calculates on one thread.

    When the block is left, by its end or by an exception, functions that have not begun are dropped, and those that
    run are waited for, so that nothing of them outlives the block.
    """
    import numpy as np  # only now: `--help` shall not wait for it

    threads = min(usual_threads(), most)
    ending = Event()
    # By default, glibc gives blocks above 128 KiB back to the system when they are freed, and the system clears the
    # memory of each new one, which takes ten times as long as one operation on it. Once a larger block has been freed,
    # glibc keeps all blocks up to that size (mallopt(3), "dynamic mmap threshold"). Elsewhere this has no effect.
    np.empty(KEPT_BYTES, dtype=np.uint8)
    with one_thread():
        pool = ThreadPoolExecutor(threads)
        try:
            yield Workers(pool, ending)
        finally:
            ending.set()
            pool.shutdown(cancel_futures=True)
