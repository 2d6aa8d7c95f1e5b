"""A script for torchrun: what plain LoRA and LoRA-Over send in a step, and hold after it, under each mechanism.

    torchrun --standalone --nproc-per-node 4 support/parallel_traffic.py FOLDER

Each process leaves what it counted in FOLDER/traffic-<rank>.pt. `support/parallel_zero.py` counts the same.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from loraover import LoraOverConfig, OverParameterization
from loraover.overparam.sharding import local

from support.processes import Traffic
from support.tiny_models import tiny_llama, token_ids, trainable, with_lora

STEPS = 2
ALWAYS_CUT = ("param_persistence_threshold", "max_live_parameters", "max_reuse_distance", "prefetch_bucket_size")
"""Settings of ZeRO 3 by which it keeps weights for later; at 0, every use gathers them."""


class Case(NamedTuple):
    """One run."""

    mechanism: str
    is_over: bool
    checkpointing: bool = False
    is_short: bool = False

    def __str__(self) -> str:
        flags = "-checkpointing" * self.checkpointing + "-bf16" * self.is_short
        return f"{self.mechanism}-{'over' if self.is_over else 'lora'}{flags}"


CASES = [
    *(
        Case(mechanism, is_over)
        for mechanism in ("ddp", "zero1", "zero2", "zero3", "fsdp2")
        for is_over in (False, True)
    ),
    *(Case(mechanism, True, True, mechanism != "fsdp2") for mechanism in ("zero2", "zero3", "fsdp2")),
]


def count(case: Case) -> dict[str, Any]:
    """Numbers of the model, bytes of the last step's messages by their names, and bytes that are held after it."""
    torch.manual_seed(0)
    base = tiny_llama()
    layers, whole = (sum(p.numel() for p in module.parameters()) for module in (base.model.layers, base))
    model: Any = with_lora(base, task_type="CAUSAL_LM", lora_dropout=0.0)
    model.train()
    matrices = sum(p.numel() for p in trainable(model))
    if case.checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    step, optimizer, over, cut = _start(case, model)
    for number in range(STEPS):
        with Traffic() as seen:
            step(torch.as_tensor(token_ids(seed=number, batch=2)))
    messages: Counter[str] = Counter()
    for name, size in seen.messages:
        messages[name] += size
    groups = [] if over is None else over.groups
    kept = [getattr(parameter, "ds_tensor", parameter) for parameter in model.parameters()]
    kept += [value for state in optimizer.state.values() for value in state.values()]
    cores = [stack for group in groups for stack in group.stacks]
    kept += [*cut, *cores, *(value for group in groups for state in group.state.values() for value in state.values())]
    numbers = (layers, whole - layers, matrices, sum(core.numel() for core in cores))
    return {"numbers": numbers, "messages": dict(messages), "held": _bytes(kept)}


def _bytes(tensors: Iterable[Any]) -> int:
    """Bytes of this process's parts, without single numbers such as counts of steps."""
    return sum(local(tensor).nbytes for tensor in tensors if isinstance(tensor, Tensor) and tensor.numel() > 1)


Started = tuple[Callable[[Tensor], None], torch.optim.Optimizer, OverParameterization | None, list[Tensor]]


def _start(case: Case, model: Any) -> Started:
    """The run's step, its innermost optimizer, its cores, and the float32 copy that ZeRO cuts."""
    if case.mechanism.startswith("zero"):
        return _start_zero(case, model)
    if case.mechanism == "fsdp2":
        for layer in model.get_base_model().model.layers:
            fully_shard(layer)
        fully_shard(model)
    wrapped = DistributedDataParallel(model) if case.mechanism == "ddp" else model
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)

    def step(ids: Tensor) -> None:
        wrapped(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, optimizer, _attached(case, wrapped, optimizer), []


def _start_zero(case: Case, model: Any) -> Started:
    import deepspeed

    stage, inner = int(case.mechanism[-1]), torch.optim.AdamW(trainable(model), lr=1e-2)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage, **({f"stage3_{name}": 0 for name in ALWAYS_CUT} if stage == 3 else {})},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": case.is_short},
    }
    engine, wrapper, _, _ = deepspeed.initialize(model=model, optimizer=inner, config=config)

    def step(ids: Tensor) -> None:
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()

    name = "fp32_partitioned_groups_flat" if stage == 3 else "single_partition_of_fp32_groups"
    return step, inner, _attached(case, model, wrapper), getattr(wrapper, name)


def _attached(case: Case, model: Any, optimizer: Any) -> OverParameterization | None:
    return OverParameterization(model, LoraOverConfig()).attach(optimizer) if case.is_over else None


def count_all(folder: Path) -> None:
    """Count in every process of an initialised group, and leave the counts in a folder."""
    torch.save({str(case): count(case) for case in CASES}, folder / f"traffic-{distributed.get_rank()}.pt")


def start_deepspeed() -> None:
    """Initialise this process's group as DeepSpeed's, on CPUs."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # its first use would compile C++
    deepspeed.init_distributed("gloo")


def main(folder: Path) -> None:
    start_deepspeed()
    count_all(folder)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
