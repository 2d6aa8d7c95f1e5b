"""Check of an adapter on a server, by its reference."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

from loraover.common.errors import LoraOverError
from loraover_serve.record.adapter_check.reference import read_reference
from loraover_serve.record.check import ask_server, name_crossed
from loraover_serve.record.crossed import NEAREST, Named
from loraover_serve.watch.config import WatchTarget
from loraover_serve.watch.history import Check


def ask(
    target: WatchTarget, clock: Callable[[], float] = time.time, reserve: Callable[[int], bool] = lambda requests: True
) -> Check:
    """Check an adapter; one that cannot be checked has the verdict "failed".

    Args:
        target: The adapter.
        clock: Clock in seconds since 1970.
        reserve: Asked whether so many more requests may be sent, to find out which adapter answers in its place.
    """
    begun = time.monotonic()
    try:
        _, (found,) = ask_server(target.request)
        if found["verdict"] == "differs" and target.others and reserve(target.search):
            files = (target.adapter, target.request.references[0]), *target.others
            adapters = [Named(name, partial(read_reference, file)) for name, file in files]
            name_crossed(target.request, adapters, [found], NEAREST)
    except LoraOverError as error:  # such as a reference that was removed, or a key that is no longer set
        found = {"verdict": "failed", "reason": str(error), "requests": 0}
    strength, distance = found.get("strength"), found.get("adapter")
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
    )
