"""Several requests at a time: those that wait for one another, and those that only keep a server busy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from queue import Empty, SimpleQueue
from threading import Event, Thread
from typing import TypeVar

AT_ONCE = 4  # requests in flight
COMPANIONS, COMPANION_TOKENS = 2, 16  # requests that are always in flight beside others, and length of their answers
Asked = TypeVar("Asked")
Answered = TypeVar("Answered")


def at_once(
    ask: Callable[[Asked], Answered],
    items: Sequence[Asked],
    most: int = AT_ONCE,
    on_answer: Callable[[int], object] = lambda answered: None,
) -> list[Answered]:
    """Ask several questions at a time; after a failure or Ctrl-C, start no further one, and wait for none that runs.

    The queues are those that Ctrl-C cannot leave locked. In a pool of the standard library an exception just after a
    lock was taken keeps it, and whatever ends the pool waits for ever: on busy cores in 2 of 100 interrupts.

    Args:
        ask: Function that asks one question.
        items: The questions.
        most: Questions at a time.
        on_answer: Function that is called after each answer with the number of answers so far.

    Returns:
        The answers in the order of the questions.
    """
    waiting: SimpleQueue[int] = SimpleQueue()
    ended: SimpleQueue[tuple[int, Future[Answered]]] = SimpleQueue()
    for place in range(len(items)):
        waiting.put(place)

    def take() -> None:
        with suppress(Empty):
            while True:
                place, outcome = waiting.get_nowait(), Future[Answered]()
                try:
                    outcome.set_result(ask(items[place]))
                except BaseException as error:
                    outcome.set_exception(error)
                ended.put((place, outcome))

    found: dict[int, Answered] = {}
    try:
        for _ in range(min(most, len(items))):
            Thread(target=take, daemon=True).start()
        while len(found) < len(items):
            place, outcome = ended.get()
            found[place] = outcome.result()
            on_answer(len(found))
    finally:
        with suppress(Empty):
            while True:
                waiting.get_nowait()
    return [found[place] for place in range(len(items))]


@contextmanager
def in_company(ask: Callable[[], object]) -> Iterator[None]:
    """Send further requests again and again during a block, so that the block's requests share batches with them.

    The block begins when each companion has had an answer: the first one of a model can take a server long.

    Args:
        ask: Function that asks for one short answer: a server sends nothing before an answer is complete, and may be
            given up as silent meanwhile.
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
