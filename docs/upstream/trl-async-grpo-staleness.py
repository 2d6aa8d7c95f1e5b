"""AsyncGRPO with max_staleness=0 trains a micro-batch a step on the previous adapter's samples: exit code 0 if so.

Run it by the Python of an environment that holds TRL and accelerate; it needs no GPU, no model and no server. The queue
stands for an engine that always answers with the newest adapter, and has no sample in advance.
"""

from __future__ import annotations

import itertools
import sys
from collections import defaultdict
from types import SimpleNamespace

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from torch.utils.data import DataLoader
from trl import __version__
from trl.experimental.async_grpo.async_grpo_trainer import RolloutQueueDataset

STEPS, MICRO_BATCHES, ROWS = 4, 2, 4
version, metrics = itertools.count(), defaultdict(list)
now = next(version)


def sample(timeout: float) -> SimpleNamespace:
    """A sample of the newest adapter, whose number is its group."""
    empty = {"input_ids": [], "completion_mask": [], "old_log_probs": [], "advantage": 0.0, "metrics": {}}
    return SimpleNamespace(model_version=now, group_id=now, enqueued_at=None, **empty)


dataset = RolloutQueueDataset(
    SimpleNamespace(get=sample, qsize=lambda: 0), lambda: now, lambda after: None, 60.0, metrics, max_staleness=0
)
accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(dispatch_batches=True))
loader = DataLoader(dataset, batch_size=ROWS, collate_fn=lambda rows: torch.tensor([row["group_id"] for row in rows]))
batches, stale = iter(accelerator.prepare(loader)), 0
for step in range(STEPS):
    sampled_by = [next(batches).tolist() for _ in range(MICRO_BATCHES)]
    behind = [step - max(rows) for rows in sampled_by]
    stale += sum(behind)
    print(f"step {step}: micro-batches are {behind} adapters behind")
    now = next(version)  # optimizer.step() and the sync
print(f"TRL {__version__}: {stale} of {STEPS * MICRO_BATCHES} micro-batches are of the previous adapter, ", end="")
print(f"and sample/staleness_max is {max(metrics['sample/staleness_max']):g}")
sys.exit(0 if stale == STEPS - 1 else 1)
