"""Several requests at a time: those that wait for one another, and those that only keep a server busy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Event
from typing import TypeVar

AT_ONCE = 4  # requests in flight
COMPANIONS, COMPANION_TOKENS = 2, 16  # requests that are always in flight beside others, and length of their answers
Asked = TypeVar("Asked")
Answered = TypeVar("Answered")


def at_once(ask: Callable[[Asked], Answered], items: Sequence[Asked]) -> list[Answered]:
    """Ask several questions at a time, and none of those that wait after a failure.

    Args:
        ask: Asks one.
        items: The questions.
    """
    pool = ThreadPoolExecutor(AT_ONCE)
    try:
        return list(pool.map(ask, items))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


@contextmanager
def in_company(ask: Callable[[], object]) -> Iterator[None]:
    """Ask again and again during a block, so that the block's requests share batches with these.

    The block begins when each companion has had an answer: the first one of a model can take a server long.

    Args:
        ask: Asks for one short answer: a server sends nothing before an answer is complete, and may be given up as
            silent meanwhile.
    """
    enough, begun = Event(), [Event() for _ in range(COMPANIONS)]

    def keep_asking(mine: Event) -> None:
        try:
            while not enough.is_set():
                ask()
                mine.set()
        finally:
            mine.set()

    pool = ThreadPoolExecutor(COMPANIONS)
    try:
        running = [pool.submit(keep_asking, mine) for mine in begun]
        for mine in begun:
            mine.wait()
        yield
        enough.set()
        for each in running:
            each.result()
    finally:
        enough.set()
        pool.shutdown(wait=False)
