"""Random numbers for code that runs a model in the middle of training without changing what training draws."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def seeded(seed: int, devices: Iterable[torch.device]) -> Iterator[None]:
    """Seed all random generators for a block, and restore their states (Python's, NumPy's, PyTorch's) after it.

    Args:
        seed: Seed of every generator.
        devices: Devices of the model. The CPU's generator is always included.
    """
    used = set(devices)
    gpus = sorted({device.index or 0 for device in used if device.type == "cuda"})
    apple = torch.mps.get_rng_state() if any(device.type == "mps" for device in used) else None
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=gpus):
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.default_generator.manual_seed(seed)
        for index in gpus:
            torch.cuda.default_generators[index].manual_seed(seed)
        if apple is not None:
            torch.mps.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
            if apple is not None:
                torch.mps.set_rng_state(apple)
