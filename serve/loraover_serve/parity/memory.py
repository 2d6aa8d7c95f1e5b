"""Peak memory of a server and all its processes, one server for each arm."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import psutil
from pydantic import BaseModel, ConfigDict, Field

from loraover_serve.parity.workload import Request

if TYPE_CHECKING:
    from loraover_serve.parity.engines.vllm import VllmEngine

POLL_S = 0.2


class PeakMemory(BaseModel):
    """Of servers that hold one arm each; it decides nothing."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    concurrency: int
    arm: str
    bytes: list[int] = Field(description="one number for each server that was started")


@dataclass
class Peak:
    """The most memory seen so far, in bytes."""

    bytes: int = 0


@contextmanager
def peak_of(session: int) -> Iterator[Peak]:
    """Watch all processes of a session during a block.

    What processes share is divided among them (proportional set size), where the system tells it.
    """
    peak, done = Peak(), threading.Event()

    def watch() -> None:
        ended = False
        while not ended:
            ended = done.wait(POLL_S)  # and once more at the end
            peak.bytes = max(peak.bytes, _memory(session))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()


def _memory(session: int) -> int:
    total = 0
    with suppress(psutil.NoSuchProcess):
        leader = psutil.Process(session)
        for process in (leader, *leader.children(recursive=True)):
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                found = process.memory_full_info()
                total += getattr(found, "pss", found.rss)
    return total


def measure_memory(
    start: Callable[[], AbstractContextManager[VllmEngine]],
    arm: str,
    requests: Sequence[Request],
    *,
    concurrency: int,
    servers: int,
) -> PeakMemory:
    """Start so many servers, one after another, with one arm alone, and let each answer the requests.

    Args:
        start: a context of a server that has just been started.
    Raises:
        EngineError: a server that does not start or answer.
    """
    found = []
    for _ in range(servers):
        with start() as engine, peak_of(engine.server.pid) as peak:
            for first in range(0, len(requests), concurrency):
                engine.run(arm, 0, first, requests[first : first + concurrency])
        found.append(peak.bytes)
    return PeakMemory(concurrency=concurrency, arm=arm, bytes=found)
