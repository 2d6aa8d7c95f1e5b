"""A script for torchrun: Trainer runs under FSDP2, each saved in its middle and continued from there.

    torchrun --standalone --nproc-per-node 2 support/parallel_fsdp_trainer.py FOLDER

Each process leaves what it saw in FOLDER/<rank>.pt.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch import distributed

from support.parallel_trainer import run_twice

STATE_DICTS = ("FULL_STATE_DICT", "SHARDED_STATE_DICT")


def allow_fsdp_on_cpus() -> None:
    """Let Accelerate shard on CPUs, as it does on every other device: it asks for FSDP only where it saw another."""
    made: Any = PartialState.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_XPU

    PartialState.__init__ = init


def main(folder: Path) -> None:
    allow_fsdp_on_cpus()
    found = {}
    for kind in STATE_DICTS:
        sharded = {"state_dict_type": kind, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
        found[kind] = run_twice(folder / kind, dropout=0.0, fsdp_config=sharded)
    torch.save(found, folder / f"{distributed.get_rank()}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
