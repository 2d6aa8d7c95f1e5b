"""Processes of one run, and threads of one process: how they share work, wait and fail."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch._C._distributed_c10d import HashStore

from loraover.common import ranks as room
from loraover.common.errors import ConfigError, DataError, ProcessError
from loraover.common.ranks import Ranks, launched
from loraover.common.reporter import SILENT, Reporter
from loraover.common.threads import MAX_WORKERS, Workers, one_thread, workers


@pytest.fixture(autouse=True)
def short_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "GRACE_S", 0.5)


def in_both(work: Callable[[Ranks], Any]) -> list[Any]:
    """What `work` returns or raises in each of two ranks, inside a block of `together`."""
    store = HashStore()

    def take_part(rank: int) -> Any:
        ranks = Ranks(rank, 2, store)
        try:
            with ranks.together():
                return work(ranks)
        except Exception as error:
            return error

    with ThreadPoolExecutor(2) as threads:
        return list(threads.map(take_part, range(2)))


def test_values_come_by_rank_in_every_process() -> None:
    def work(ranks: Ranks) -> Any:
        first = ranks.gathered([ranks.rank, "a"])
        return first, ranks.gathered(None if ranks.is_first else 0.1), ranks.of_first(lambda: {"rank": ranks.rank})

    assert in_both(work) == [([[0, "a"], [1, "a"]], [None, 0.1], {"rank": 0})] * 2


def test_one_process_writes_and_reports_and_goes_first() -> None:
    written: list[str] = []

    def work(ranks: Ranks) -> Any:
        with ranks.first_then_others():
            written.append(f"in turn {ranks.rank}")
        ranks.write(written.append, f"written by {ranks.rank}")
        return ranks.heard(Reporter()) is SILENT

    assert in_both(work) == [False, True]
    assert written.index("in turn 0") < written.index("in turn 1")
    assert [text for text in written if text.startswith("written")] == ["written by 0"]


@pytest.mark.parametrize("failing", [0, 1])
def test_the_error_of_one_process_ends_both_and_is_told_once(failing: int) -> None:
    def work(ranks: Ranks) -> None:
        if ranks.rank == failing:
            raise DataError(f"row 3 of rank {failing}")
        ranks.meet()
        ranks.meet()

    found = in_both(work)
    assert [(type(error), str(error)) for error in found] == [(DataError, f"row 3 of rank {failing}")] * 2
    assert [error.is_told for error in found] == [False, True]


def test_of_two_errors_the_first_one_is_told() -> None:
    def work(ranks: Ranks) -> None:
        if not ranks.is_first:
            ranks.gathered(0)
        raise ConfigError(f"of rank {ranks.rank}")

    assert {str(error) for error in in_both(work)} == {"of rank 0"}


def test_an_error_that_is_not_ours_names_its_process_in_the_others() -> None:
    def work(ranks: Ranks) -> None:
        if not ranks.is_first:
            raise KeyError("lost")
        ranks.meet()

    first, second = in_both(work)
    assert isinstance(first, ProcessError)
    assert isinstance(second, KeyError)
    assert "process 1 of 2 has failed: KeyError: 'lost'" in str(first)


@pytest.mark.parametrize("error", [RuntimeError("gloo: Connection closed by peer"), KeyboardInterrupt()])
def test_a_broken_exchange_is_told_by_its_cause(error: BaseException) -> None:
    def work(ranks: Ranks) -> None:
        if ranks.is_first:
            raise error
        raise DataError("the cause")

    assert {str(found) for found in in_both(work)} == {"the cause"}


def test_without_a_cause_the_process_that_is_silent_is_named() -> None:
    def work(ranks: Ranks) -> None:
        if ranks.is_first:
            raise RuntimeError("gloo: Timed out")

    first, _ = in_both(work)
    assert isinstance(first, ProcessError)
    assert "process 1 of 2 has ended without a message" in str(first)


def test_a_process_that_does_not_come_is_waited_for_as_long_as_is_said() -> None:
    def work(ranks: Ranks) -> None:
        ranks.patience_s = 0.2
        if ranks.is_first:
            ranks.meet()

    first, _ = in_both(work)
    assert "has not answered for 0.2 s (training.ddp_timeout)" in str(first)


def test_a_block_after_one_that_failed_starts_anew() -> None:
    store = HashStore()

    def take_part(rank: int) -> Any:
        ranks = Ranks(rank, 2, store)
        with suppress(DataError), ranks.together():
            if rank:
                raise DataError("row 3")
            ranks.meet()
            ranks.meet()
        with ranks.together():
            return ranks.gathered(rank)

    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(take_part, range(2))) == [[0, 1], [0, 1]]


def test_alone_everything_is_done_here(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = launched()
    assert (ranks.size, ranks.gathered(3), ranks.of_first(lambda: 4)) == (1, [3], 4)
    with pytest.raises(KeyError), ranks.together():
        raise KeyError
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="WORLD_SIZE is 2"):
        launched()


def test_processes_that_are_started_again_do_not_read_what_the_former_ones_left() -> None:
    store = HashStore()
    names: list[str] = []
    for _ in range(3):
        with ThreadPoolExecutor(3) as threads:
            agreed = [*threads.map(lambda rank: room.name_of_start(store, rank, 3), range(3))]
        assert len({*agreed}) == 1
        names.append(agreed[0])
    assert len({*names}) == 3


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


def test_workers_may_be_fewer() -> None:
    meeting = threading.Barrier(2, timeout=0.2)
    with workers(1) as threads:
        apart = [threads.start(meeting.wait) for _ in range(2)]
        assert all(isinstance(future.exception(), threading.BrokenBarrierError) for future in apart)


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
