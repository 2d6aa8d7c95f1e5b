"""What every report says about the machine."""

from __future__ import annotations

import psutil

from loraover.common.provenance import hardware, processor


def machine() -> str:
    """Processor, memory, system and threads, in one line."""
    memory = psutil.virtual_memory().total / 2**30
    return f"{processor()}, {memory:.0f} GiB of memory, {hardware()}"
