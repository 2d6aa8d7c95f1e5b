"""Peak memory of servers, each started with one arm alone."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from statistics import fmean

import psutil
from pydantic import Field
from scipy import stats

from loraover.common.strict_json import StrictModel
from loraover_serve.engines.base import BatchingEngine, Setting
from loraover_serve.engines.sample import TokenRequest

POLL_S = 0.2
MIN_SERVERS = 3


class PeakMemory(StrictModel):
    """Peak memory of servers with one arm alone; the verdict does not depend on it."""

    concurrency: int
    arm: str
    bytes: list[int] = Field(description="Peak memory of each server that was started, in bytes")
    interval: tuple[float, float] | None = Field(
        description="95 % t interval of the mean, in bytes; None for fewer than 3 servers"
    )


@dataclass
class Peak:
    """Largest memory so far, in bytes."""

    bytes: int = 0


@contextmanager
def peak_of(session: int) -> Iterator[Peak]:
    """Measure the peak memory of a process and its descendants during a block.

    Memory that processes share is divided among them (proportional set size) if the system reports that.

    Args:
        session: Id of the process.
    """
    peak, done = Peak(), threading.Event()

    def watch() -> None:
        ended = False
        while not ended:
            ended = done.wait(POLL_S)  # measure once more at the end
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
    kind: type[BatchingEngine],
    setting: Setting,
    arm: str,
    requests: Sequence[TokenRequest],
    *,
    concurrency: int,
    servers: int,
) -> PeakMemory:
    """Start servers with one arm alone, one after another, and send the requests to each.

    Args:
        kind: Class of the engine whose servers are started.
        setting: What each is started with.
        arm: Name of the arm.
        requests: The requests to send.
        concurrency: Number of simultaneous requests.
        servers: Number of servers to start.

    Raises:
        EngineError: A server that does not start or answer.
    """
    peaks: list[Peak] = []

    @contextmanager
    def watch(pid: int) -> Iterator[None]:
        with peak_of(pid) as peak:
            peaks.append(peak)
            yield

    for _ in range(servers):
        with kind.start_arms(replace(setting, watch=watch)) as (engine,):
            for first in range(0, len(requests), concurrency):
                engine.run(arm, 0, first, requests[first : first + concurrency])
    found = [peak.bytes for peak in peaks]
    return PeakMemory(concurrency=concurrency, arm=arm, bytes=found, interval=mean_interval(found))


def mean_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """95 % t interval of the mean of a few values; None for fewer than 3, whose spread is too uncertain."""
    if len(values) < MIN_SERVERS:
        return None
    mean, half = fmean(values), float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))
    return mean - half, mean + half
