"""What every test stands on.

One thread, since tensors are tiny and waiting threads slow one another down. Ctrl-C, which a script that runs the suite
in its background would have it ignore, with every process that it starts. A Hypothesis profile for each speed. And a
place for each test among parallel workers (pytest-xdist, `--dist loadgroup`).
"""

from __future__ import annotations

import signal

import hypothesis
import pytest
import torch

from support.speed import PROFILES

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)

for name in PROFILES:
    hypothesis.settings.register_profile(name, deadline=None)
hypothesis.settings.load_profile("full")

SLOW_FIRST = ("engine", "statistical", "process")
"""Marks in the order in which their tests begin: what takes longest must not begin last."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep the tests of a file on one worker, where its fixtures are made once, unless they name a group themselves."""
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.location[0]))
    items.sort(key=_turn)


def _turn(item: pytest.Item) -> int:
    marks = [i for i, name in enumerate(SLOW_FIRST) if item.get_closest_marker(name) is not None]
    return min(marks, default=len(SLOW_FIRST))
