"""Work for a pool's processes, one item of which kills its process; it imports little, so that they start fast."""

from __future__ import annotations

import os
import signal

KILLER = 3


def square(number: int) -> int:
    if number == KILLER:
        os.kill(os.getpid(), signal.SIGKILL)
    return number * number


def lost(number: int) -> int:
    return -number
