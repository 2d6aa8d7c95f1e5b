"""Clock of operations that may run on an accelerator, which returns before they are done."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from loraover.models.device import choose_device


class Seconds(NamedTuple):
    """Times of one piece of work.

    Args:
        host: Seconds until Python has launched it.
        whole: Seconds until the device has finished it.
    """

    host: float
    whole: float


def find_device() -> torch.device:
    """Return the device that $LORAOVER_DEVICE names; else the CUDA device if there is one, else the CPU."""
    return choose_device(os.environ.get("LORAOVER_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu"))


def timed(work: Callable[[], object], device: torch.device) -> Seconds:
    """Run work on an idle device, and return its seconds."""
    synchronise(device)
    started = time.perf_counter()
    work()
    launched = time.perf_counter()
    synchronise(device)
    return Seconds(launched - started, time.perf_counter() - started)


def synchronise(device: torch.device) -> None:
    """Wait until a device has done its work; the CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
