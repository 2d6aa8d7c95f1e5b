"""The processes that a launcher has started with one command: who writes, and how they agree.

torchrun, `accelerate launch` and others start the same command in several processes, which are numbered by their rank.
Rank 0 writes files and reports progress. The processes exchange small values through the store of torch.distributed's
rendezvous, a table of keys that all of them see. It works before the process group has started, and after an exchange
of gradients has failed.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from functools import cache
from typing import Any, ParamSpec

from loraover.common.errors import ConfigError, LoraOverError, ProcessError, is_out_of_memory, own_kind
from loraover.common.reporter import SILENT, Reporter

P = ParamSpec("P")

GRACE_S = 5.0
"""Seconds in which a process that has failed waits for what the others say about it."""

MEETING_S = 300
"""Seconds in which the processes of a launcher have to find each other."""

POLL_S = 0.05
"""Seconds between two looks into the store."""


class Ranks:
    """This process among those that train one run; every process calls the same functions in the same order.

    Args:
        rank: Number of this process, from 0.
        size: Number of processes.
        store: Store of torch.distributed that all of them see; None: there is only this process.

    Attributes:
        patience_s: Seconds after which a process that does not answer counts as lost; None: no limit, as while rank 0
            reads data for all.
    """

    def __init__(self, rank: int = 0, size: int = 1, store: Any = None) -> None:
        self.rank, self.size = rank, size
        self.patience_s: float | None = None
        self._store, self._meetings, self._blocks, self._is_together = store, 0, 0, False
        self._ended_by: BaseException | None = None

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def heard(self, report: Reporter) -> Reporter:
        """Return a receiver of progress in the process that reports; in the others, one that shows nothing."""
        return report if self.is_first else SILENT

    def write(self, function: Callable[P, object], *places: P.args, **keywords: P.kwargs) -> None:
        """Call a function that writes or prints, in the process that does so; in the others, nothing happens."""
        if self.is_first:
            function(*places, **keywords)

    def of_first(self, make: Callable[[], Any]) -> Any:
        """Return in every process what a function returns in rank 0, a value that JSON can hold."""
        return self.gathered(make() if self.is_first else None)[0]

    def meet(self) -> None:
        """Wait until every process has called this; fail with the error of another, or if one does not answer."""
        self.gathered(None)

    def gathered(self, value: Any) -> list[Any]:
        """Return the values of all processes, which JSON can hold, by rank, in each of them; fail as `meet` does."""
        if self._store is None:
            return [value]
        self._meetings += 1
        self._store.set(self._place(f"{self._meetings}/{self.rank}"), json.dumps(value))
        found = []
        for rank in range(self.size):
            place, began = self._place(f"{self._meetings}/{rank}"), time.monotonic()
            while not self._has(place):
                if self._has(self._place("failed")):
                    raise self._failure()
                if self.patience_s is not None and time.monotonic() - began > self.patience_s:
                    raise self._lost([rank])
                time.sleep(POLL_S)
            found.append(json.loads(self._store.get(place)))
        return found

    def start_group(self, backend: str, timeout_s: float) -> None:
        """Start torch.distributed's process group, if there is none yet, with keys that no earlier start has left."""
        from torch import distributed

        if self._store is not None and not distributed.is_initialized():
            distributed.init_process_group(
                backend,
                store=distributed.distributed_c10d.PrefixStore("group", self._store),
                rank=self.rank,
                world_size=self.size,
                timeout=timedelta(seconds=timeout_s),
            )

    @contextmanager
    def first_then_others(self) -> Iterator[None]:
        """Let rank 0 run a block before the others, which then find the files that it has downloaded or written."""
        if not self.is_first:
            self.meet()
        yield
        if self.is_first:
            self.meet()

    def held(self, make: Callable[[], AbstractContextManager[None]]) -> AbstractContextManager[None]:
        """Return what a function makes in rank 0, held for a block; the other processes hold nothing."""
        return make() if self.is_first else nullcontext()

    @contextmanager
    def together(self) -> Iterator[None]:
        """End a block in every process with the same error, if it fails in one of them.

        The processes whose message rank 0 shows have `is_told` set in their error.
        """
        if self._store is None or self._is_together:
            yield
            return
        self._blocks, self._meetings, self._is_together = self._blocks + 1, 0, True
        self._ended_by = self.patience_s = None
        try:
            with _stopped_by_launcher():
                try:
                    yield
                except (Exception, KeyboardInterrupt) as error:
                    agreed = self.agreed(error)
                    if agreed is error:
                        raise
                    raise agreed from error
        finally:
            self._is_together = False

    def agreed(self, error: BaseException) -> BaseException:
        """Return the error by which all processes end: that of the first one which says why its block has failed."""
        if self._store is None or not isinstance(error, Exception | KeyboardInterrupt):
            return error
        if self._ended_by is not error:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher ends all processes when one ends
            from torch.distributed import DistError

            try:
                self._ended_by = self._agreed(error)
            except DistError:  # rank 0 holds the store, unless the launcher does
                self._ended_by = self._lost([0]) if _is_echo(error) else error
        return self._ended_by

    def _agreed(self, error: BaseException) -> BaseException:
        place = self._place("failed")
        if _is_echo(error):
            self._store.set(self._place(f"here/{self.rank}"), "")
            self._waits_for(lambda: self._has(place) or not self._silent())
            if not self._has(place) and not (silent := self._silent()):
                return error
            if not self._has(place):
                error = self._lost(silent)
        if not self._has(place):
            kind = MemoryError if is_out_of_memory(error) else own_kind(error)
            says = {"rank": self.rank, "kind": kind.__name__, "message": str(error)}
            self._store.compare_set(place, "", json.dumps(says))
        first = json.loads(self._store.get(place))
        agreed = error if first["rank"] == self.rank else self._failure()
        if self.is_first:
            self._store.set(self._place("told"), "")
        elif isinstance(agreed, LoraOverError):
            agreed.is_told = self._waits_for(lambda: self._has(self._place("told")))
        return agreed

    def _failure(self) -> Exception:
        """Return what another process has failed with."""
        first = json.loads(self._store.get(self._place("failed")))
        known: dict[str, type[Exception]] = {kind.__name__: kind for kind in LoraOverError.__subclasses__()}
        if first["kind"] in known:
            return known[first["kind"]](first["message"])
        if first["kind"] == MemoryError.__name__:
            return MemoryError(f"process {first['rank']}: {first['message']}")
        return ProcessError(f"process {first['rank']} of {self.size} has failed: {first['kind']}: {first['message']}")

    def _lost(self, ranks: list[int]) -> ProcessError:
        named = " and ".join(map(str, ranks))
        waited = "" if self.patience_s is None else f", or has not answered for {self.patience_s:g} s"
        return ProcessError(
            f"process {named} of {self.size} has ended without a message{waited} (training.ddp_timeout). A run "
            "that had a complete checkpoint continues from it if the same command is given with --resume auto."
        )

    def _silent(self) -> list[int]:
        """Return the processes that have neither failed with a reason nor noticed that another one has."""
        return [rank for rank in range(self.size) if not self._has(self._place(f"here/{rank}"))]

    def _waits_for(self, holds: Callable[[], bool]) -> bool:
        """Wait for the grace until something holds, and return whether it does."""
        until = time.monotonic() + GRACE_S
        while not (is_so := holds()) and time.monotonic() < until:
            time.sleep(POLL_S)
        return is_so

    def _has(self, place: str) -> bool:
        return bool(self._store.check([place]))

    def _place(self, name: str) -> str:
        return f"{self._blocks}/{name}"


def _is_echo(error: BaseException) -> bool:
    """Whether an error may only say that another process has failed: the launcher's signal, or a broken exchange."""
    import torch

    is_broken = isinstance(error, torch.distributed.DistError) or any(w in str(error) for w in ("gloo", "NCCL"))
    return isinstance(error, KeyboardInterrupt) or (isinstance(error, RuntimeError) and is_broken)


@contextmanager
def _stopped_by_launcher() -> Iterator[None]:
    """Turn the signal by which a launcher ends its processes into KeyboardInterrupt, so that work can be put away."""

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def launched() -> Ranks:
    """Return this process among those that a launcher has started; alone without a launcher."""
    return _launched(os.environ.get("WORLD_SIZE", "1"), os.environ.get("RANK", "0"))


@cache
def _launched(size: str, rank: str) -> Ranks:
    if size == "1":
        return Ranks()
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    try:
        store, number, count = next(rendezvous("env://", timeout=timedelta(seconds=MEETING_S)))
        ours = PrefixStore("loraover", store)
        return Ranks(number, count, PrefixStore(name_of_start(ours, number, count), ours))
    except (ValueError, RuntimeError) as error:
        raise ConfigError(
            f"WORLD_SIZE is {size}, so this is one of {size} processes, but they cannot connect to each other: "
            f"{error}. "
            "Start the run with torchrun or accelerate launch, or unset WORLD_SIZE."
        ) from error


def name_of_start(store: Any, rank: int, size: int) -> str:
    """Agree on a name that these processes alone have: torchrun's store keeps the keys of those before a restart."""

    def said(place: str) -> str:
        return store.get(place).decode() if store.check([place]) else ""

    word = secrets.token_hex(8)
    store.set(f"word/{rank}", word)
    until = time.monotonic() + MEETING_S
    while time.monotonic() < until:
        if rank == 0:
            words = [said(f"word/{other}") for other in range(size)]
            all_words = ".".join(words)
            if all(words):
                store.set("words", all_words)
            if all(said(f"heard/{other}") == all_words for other in range(1, size)):
                store.set("begun", all_words)
                return all_words
        elif word in (all_words := said("words")):
            store.set(f"heard/{rank}", all_words)
            if said("begun") == all_words:
                return all_words
        time.sleep(POLL_S)
    raise RuntimeError(f"a process did not connect within {MEETING_S} s")
