"""What every test stands on.

- One thread, since tensors are tiny and waiting threads slow one another down. No thread is bound to a core: vLLM would
  bind each of its servers to the first one. A step of vLLM may take half an hour: on a busy CPU without AVX-512, one in
  bfloat16 takes longer than the five minutes after which vLLM ends itself.
- Few garbage collections, since one that begins in deep recursion, such as JSON of a thousand brackets, makes another
  test's finalizers fail there. They pass over all that was imported, since each Trainer that ends asks for one.
- bitsandbytes from a folder that is hidden from the processes which tests start, since PEFT imports it wherever it is.
- A lock of progress bars for each process, since a child that is killed while it holds a shared one stops all others.
- Ctrl-C, which a script that runs the suite in its background would have it ignore, with every process that it starts.
- A Hypothesis profile for each speed, and a place for each test among parallel workers (pytest-xdist).
"""

from __future__ import annotations

import gc
import os
import signal
import sys
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from tqdm.std import TqdmDefaultWriteLock
from xdist.scheduler import LoadScopeScheduling

from support.faults import failing_model as failing_model
from support.faults import full_disk_of_pages as full_disk_of_pages
from support.faults import no_model as no_model
from support.faults import wrong_fold as wrong_fold
from support.faults import wrong_rounding as wrong_rounding
from support.faults import wrong_scaling as wrong_scaling
from support.hub_cache import hub_cache as hub_cache
from support.speed import PROFILES, scaled

torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS", "1800")
gc.set_threshold(20_000, 5, 2)
TqdmDefaultWriteLock.mp_lock = None
sys.path.append(str(Path(sys.prefix) / "quantisers"))
signal.signal(signal.SIGINT, signal.default_int_handler)

for name in PROFILES:
    hypothesis.settings.register_profile(name, deadline=None, max_examples=scaled(100, name))
hypothesis.settings.load_profile("full")

SLOW_FIRST = ("matrix", "engine", "statistical", "process")
"""Marks in the order in which their tests begin: what takes longest must not begin last."""

TOGETHER = {
    **dict.fromkeys(
        (
            "test_engine_forms.py",
            "test_methods_served.py",
            "test_parity_several.py",
            "test_parity_vllm.py",
            "test_verify_vllm.py",
            "test_vllm_served.py",
        ),
        "vLLM",
    ),
    **dict.fromkeys(("test_api.py", "test_up.py", "test_up_preflight.py"), "port 8000"),
    **dict.fromkeys(("test_learnt.py", "test_train.py"), "trained runs"),
}
"""Files that share a server, a port or runs, and so a worker."""


class FilesTogether(LoadScopeScheduling):
    """Keeps the tests of a file on one worker, where its fixtures are made once.

    The mark `xdist_group` would name groups in the tests, but pytest-xdist 3.8 reads it through an attribute that
    pytest 9.2 has no longer.
    """

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return TOGETHER.get(file.rpartition("/")[2], file)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> FilesTogether:
    return FilesTogether(config, log)


def pytest_xdist_auto_num_workers() -> int:
    """One more than there are cores, since servers and processes that start leave a core idle."""
    return (os.cpu_count() or 1) + 1


def pytest_configure() -> None:
    lost = TOGETHER.keys() - {path.name for path in Path(__file__).parent.rglob("test_*.py")}
    if lost:
        raise pytest.UsageError(
            f"TOGETHER in {__file__} names {', '.join(sorted(lost))}: no such file; rename it there."
        )


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=_turn)


def _turn(item: pytest.Item) -> tuple[bool, int]:
    """Groups of files first, since one worker runs all of a group; then the marks, slowest first."""
    marks = [i for i, name in enumerate(SLOW_FIRST) if item.get_closest_marker(name) is not None]
    return item.path.name not in TOGETHER, min(marks, default=len(SLOW_FIRST))
