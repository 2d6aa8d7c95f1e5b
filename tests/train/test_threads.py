"""Threads that work beside one another, and what is left of them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import torch

from loraover.common.threads import MAX_WORKERS, Workers, one_thread, workers


@pytest.fixture(autouse=True)
def four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def test_one_thread_is_for_a_block() -> None:
    with one_thread():
        assert torch.get_num_threads() == 1
        with one_thread():
            assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 4


def test_there_are_as_many_workers_as_pytorch_has_threads() -> None:
    meeting = threading.Barrier(4, timeout=10)
    with workers() as threads:
        met = [threads.start(meeting.wait) for _ in range(4)]
        assert sorted(future.result() for future in met) == [0, 1, 2, 3]
        assert threads.start(torch.get_num_threads).result() == 1
    assert torch.get_num_threads() == 4
    assert MAX_WORKERS >= 4


def test_an_exception_is_raised_in_the_caller() -> None:
    def fail() -> None:
        raise LookupError("site 7")

    before = threading.active_count()
    with pytest.raises(LookupError, match="site 7"), workers() as threads:
        threads.start(fail).result()
    assert threading.active_count() == before
    assert torch.get_num_threads() == 4


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_a_block_that_is_left_early_drops_what_has_not_begun(error: type[BaseException]) -> None:
    begun = []
    before = threading.active_count()

    def wait(i: int, ending: threading.Event) -> None:
        begun.append(i)
        assert ending.wait(10)

    def leave(threads: Workers) -> None:
        for i in range(100):
            threads.start(wait, i, threads.ending)
        while len(begun) < 4:
            time.sleep(0.001)
        raise error

    with pytest.raises(error), workers() as threads:
        leave(threads)
    assert sorted(begun) == [0, 1, 2, 3]
    assert threading.active_count() == before
