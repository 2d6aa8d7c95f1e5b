"""The canary: it chooses the next adapter within the budget, checks it, and keeps the results."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from loraover.common.errors import LoraOverError
from loraover_serve.judge.reference import read_reference
from loraover_serve.verify.by_reference import NEAREST, Named, ask_server, name_crossed
from loraover_serve.watch.config import HOUR_S, Watched, WatchTarget
from loraover_serve.watch.history import DAY_S, Check, History

AT_ONCE = 4
"""Checks that run at the same time, each on another server."""

CACHES_TIMES = 4
"""Factor on the seconds that a check may take if it also asks the long questions of the server's cache."""

FAILED = "failed"
"""Verdict of a check that did not end; also its verdict on the cache, if it should have asked for one."""


@dataclass
class PlannedCheck:
    """The next check of an adapter.

    Args:
        due: Time of the next check.
        is_running: Whether it is checked just now.
        is_deferred: Whether the check waits for the budget.
    """

    target: WatchTarget
    due: float
    is_running: bool = False
    is_deferred: bool = False


class Canary:
    """Plans checks, and keeps their results. Its time is in seconds since 1970, and comes from the caller.

    The clock may be set back. Even then, no check waits for longer than its interval, and all earlier requests count as
    sent just now.

    Args:
        draw: Source of random numbers, by which intervals vary.
        on_change: Function that gets each check whose verdict or fault is new, and the check before it.
    """

    def __init__(
        self,
        watched: Watched,
        history: History,
        now: float,
        draw: random.Random | None = None,
        on_change: Callable[[Check, Check | None], None] = lambda check, before: None,
    ) -> None:
        self.history, self._draw, self._on_change = history, draw or random.Random(), on_change
        self._lock = threading.RLock()
        self._plan: dict[tuple[str, str], PlannedCheck] = {}
        self._spent = deque(each for each in history.requests_since(now - HOUR_S) if each[0] <= now)
        self._used = sum(requests for _, requests in self._spent)
        """Number of requests in the last hour, with those that running checks may still send."""
        self._reserved: Counter[tuple[str, str]] = Counter()
        self._forgotten = now
        self.checks: Counter[tuple[str, str, str]] = Counter()
        self.requests: Counter[str] = Counter()
        self.deferred = 0
        self.configure(watched, now)

    def configure(self, watched: Watched, now: float) -> None:
        """Take a new configuration; adapters that it still names keep their next time, if it is not too late.

        A first check comes an interval after the last one in the history, or soon, at a random time.
        """
        with self._lock:
            before, self.watched = self._plan, watched
            self._plan = {}
            for target in watched.targets:
                mine = before.get(target.key)
                if mine is not None:
                    due = min(mine.due, now + self._interval(target))
                else:
                    due = now + self._draw.uniform(0, self.watched.config.jitter) * target.interval_s
                    if (last := self.history.last(target.key)) is not None:
                        interval = self._interval(target)
                        due = min(max(due, last.at + interval), now + interval)
                self._plan[target.key] = PlannedCheck(target, due, mine is not None and mine.is_running)
            for known in [key for key in self.checks if key[:2] not in self._plan]:
                del self.checks[known]

    def _interval(self, target: WatchTarget) -> float:
        jitter = self.watched.config.jitter
        return target.interval_s * (1 + self._draw.uniform(-jitter, jitter))

    def begin(self, now: float) -> WatchTarget | None:
        """Begin the most overdue check for which the budget has room, if one is due and its server is free.

        Smaller checks may overtake one that waits for the budget, until it is an hour overdue. Then no other check
        begins before it, and the budget becomes free within an hour.
        """
        with self._lock:
            running = {one.target.server.name for one in self._plan.values() if one.is_running}
            if len(running) >= AT_ONCE:
                return None
            for one in self._plan.values():  # the clock may have been set back
                one.due = min(one.due, now + one.target.interval_s * (1 + self.watched.config.jitter))
            free = (one for one in self._plan.values() if one.due <= now and one.target.server.name not in running)
            for one in sorted(free, key=lambda one: one.due):
                if self.left(now) >= one.target.most:
                    one.is_running, one.is_deferred = True, False
                    self._used += one.target.most
                    return one.target
                self.deferred += not one.is_deferred
                one.is_deferred = True
                if now - one.due >= HOUR_S:
                    return None
            return None

    def asks_caches(self, target: WatchTarget) -> bool:
        """Whether the next check asks the server's cache: the first and each Nth do, and all while a fault lasts.

        A check that failed or decided nothing counts as asked, so that the next checks judge the weights alone.
        """
        last, later = self.history.last_of_caches(target.key)
        return target.caches_every > 0 and (
            last is None
            or last.caches not in ("as trained", "inconclusive", FAILED)
            or later + 1 >= target.caches_every
        )

    def reserve(self, target: WatchTarget, requests: int, now: float) -> bool:
        """Reserve more requests for a check that runs, and return whether the budget has room for them."""
        with self._lock:
            if self.left(now) < requests:
                return False
            self._used += requests
            self._reserved[target.key] += requests
            return True

    def left(self, now: float) -> int:
        """Number of requests that the budget of this hour has left."""
        with self._lock:
            if self._spent and self._spent[-1][0] > now:  # the clock was set back
                self._spent = deque((min(at, now), requests) for at, requests in self._spent)
            while self._spent and self._spent[0][0] <= now - HOUR_S:
                self._used -= self._spent.popleft()[1]
            return self.watched.config.budget - self._used

    def end(self, target: WatchTarget, check: Check) -> None:
        """Keep the result of a check, and plan the next one.

        Args:
            check: The result.
        """
        with self._lock:
            before = self.history.last(check.key)
            check = replace(check, changed=before is None or before.shown != check.shown)
            self._used += check.requests - target.most - self._reserved.pop(target.key, 0)
            self._spent.append((check.at, check.requests))
            self.history.add(check)
            self.requests[check.server] += check.requests
            planned = self._plan.get(target.key)
            if planned is not None:
                self.checks[check.server, check.adapter, check.verdict] += 1
                planned.is_running, planned.due = False, check.at + self._interval(planned.target)
            if check.at - self._forgotten > HOUR_S:
                self._forgotten = check.at
                self.history.forget_before(check.at - self.watched.config.keep_days * DAY_S)
        if check.changed:
            self._on_change(check, before)

    def wait_s(self, now: float) -> float:
        """Seconds until the next check is due; 0 if a check is due but waits for its server or for the budget."""
        with self._lock:
            idle = [one.due for one in self._plan.values() if not one.is_running]
            return max(0.0, min(idle) - now) if idle else HOUR_S

    def targets(self) -> list[WatchTarget]:
        """The adapters, in the order of the configuration."""
        with self._lock:
            return [one.target for one in self._plan.values()]


def ask(
    target: WatchTarget,
    clock: Callable[[], float] = time.time,
    reserve: Callable[[int], bool] = lambda requests: True,
    *,
    with_caches: bool = True,
) -> Check:
    """Check an adapter; one that cannot be checked has the verdict "failed".

    Args:
        clock: Clock in seconds since 1970.
        reserve: Function that reserves a number of further requests, to find out which other adapter answers, and
            returns whether they may be sent.
        with_caches: Whether the server's cache is asked, if the configuration wants it at all.
    """
    begun, request = time.monotonic(), replace(target.request, caches=target.request.caches and with_caches)
    if request.caches and request.check_timeout_s is not None:
        request = replace(request, check_timeout_s=CACHES_TIMES * request.check_timeout_s)
    try:
        _, (found,) = ask_server(request)
        if found["verdict"] == "differs" and target.others and reserve(target.search):
            files = (target.adapter, target.request.references[0]), *target.others
            adapters = [Named(name, partial(read_reference, file)) for name, file in files]
            name_crossed(target.request, adapters, [found], NEAREST)
    except LoraOverError as error:  # such as a reference that was removed, or a key that is no longer set
        found = {"verdict": FAILED, "reason": str(error), "requests": 0}
    strength, distance, caches = found.get("strength"), found.get("adapter"), found.get("caches")
    of_caches = None if caches is None else caches.fault or caches.verdict
    return Check(
        server=target.server.name,
        adapter=target.adapter,
        at=clock(),
        verdict=found["verdict"],
        fault=found.get("fault"),
        reason=found["reason"],
        distance=None if distance is None else float(distance.rms),
        allowed=found.get("allowed"),
        strength=None if strength is None else float(strength.value),
        seconds=time.monotonic() - begun,
        requests=int(found["requests"]),
        caches=FAILED if request.caches and found["verdict"] == FAILED else of_caches,
    )
