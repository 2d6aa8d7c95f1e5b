"""A script for torchrun: short runs in DeepSpeed's engine at every stage of ZeRO, and one of the Trainer.

    torchrun --standalone --nproc-per-node 2 support/parallel_zero.py FOLDER

Each process leaves what it saw in FOLDER/<rank>.pt.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, distributed

from loraover import LoraOverConfig, OverParameterization
from loraover.common.errors import ConfigError
from loraover.overparam.sharding import whole

from support.parallel_run import cores
from support.parallel_traffic import count_all, start_deepspeed
from support.parallel_trainer import DYNAMIC, STEPS, run_twice
from support.tiny_experts import EXPERT_LORA, tiny_moe
from support.tiny_models import tiny_llama, token_ids, trainable, with_lora

NORM, RATE = 0.3, 1e-2
CONFIGS = {
    "all": LoraOverConfig(),
    "dynamic": DYNAMIC,
    "eigen": LoraOverConfig.model_validate({"decomposition": "eigen"}),
}

# Stage of ZeRO, schedule or decomposition, and what else the engine is told.
RUNS: dict[str, tuple[int, str, dict[str, Any]]] = {
    "ddp": (0, "all", {}),
    "zero1-groups": (1, "all", {}),
    "zero2": (2, "all", {}),
    "zero3": (3, "all", {}),
    "zero3-groups-taken-away": (3, "all", {"stage3_param_persistence_threshold": 0}),
    "zero2-offload": (2, "all", {"offload_optimizer": {"device": "cpu"}}),
    "zero2-dynamic": (2, "dynamic", {}),
    "zero3-dynamic": (3, "dynamic", {}),
    "zero2-eigen": (2, "eigen", {}),
}


def rows() -> tuple[Tensor, ...]:
    """Micro-batches of four rows, two for each step."""
    return torch.as_tensor(token_ids(seed=7, batch=8 * STEPS)).chunk(2 * STEPS)


def net() -> Any:
    torch.manual_seed(0)
    return with_lora(tiny_llama(), task_type="CAUSAL_LM", lora_dropout=0.0)


def alone(config: str) -> dict[str, Any]:
    """The run in one process: two micro-batches of four rows a step, and clipping."""
    model, batches = net(), rows()
    optimizer = torch.optim.AdamW(trainable(model), lr=RATE)
    over = OverParameterization(model, CONFIGS[config], steps=STEPS)
    over.attach(optimizer)
    losses = []
    for step in range(STEPS):
        for batch in batches[2 * step : 2 * step + 2]:
            loss = model(input_ids=batch, labels=batch).loss
            (loss / 2).backward()
            losses.append(loss.item())
        torch.nn.utils.clip_grad_norm_(trainable(model), NORM)
        optimizer.step()
        optimizer.zero_grad()
    return seen(model, over, losses)


def settings(stage: int, options: dict[str, Any]) -> dict[str, Any]:
    """DeepSpeed's configuration, without its own C++ optimizer, which a compiler would have to make."""
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": NORM,
        "zero_optimization": {"stage": stage, **options},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def grouped(model: Any, name: str) -> Any:
    """The matrices as an optimizer is given them: A in one group and B in another, where a name asks for groups."""
    matrices = trainable(model)
    return [{"params": matrices[::2]}, {"params": matrices[1::2]}] if "groups" in name else matrices


def in_engine(name: str) -> dict[str, Any]:
    """The same rows in two processes, each with two of every four."""
    import deepspeed

    model, batches, rank = net(), rows(), distributed.get_rank()
    stage, config, options = RUNS[name]
    optimizer = torch.optim.AdamW(grouped(model, name), lr=RATE)
    engine, wrapper, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings(stage, options))
    over = OverParameterization(model, CONFIGS[config], steps=STEPS)
    over.attach(wrapper)
    losses = []
    for batch in batches:
        mine = batch[2 * rank : 2 * rank + 2]
        loss = engine(input_ids=mine, labels=mine).loss
        engine.backward(loss)
        engine.step()
        mean = loss.detach().clone()
        distributed.all_reduce(mean)
        losses.append(mean.item() / 2)
    return seen(model, over, losses)


def refusals() -> dict[str, str]:
    """The messages by which runs are refused that ZeRO cannot give to the cores."""
    import deepspeed

    measured = LoraOverConfig.model_validate({"schedule": "static", "score": "loss_impact", "budget": {"sites": 4}})
    cases: dict[str, tuple[int, Any, LoraOverConfig, dict[str, Any]]] = {
        "groups": (2, net(), CONFIGS["eigen"], {}),
        "parts": (3, net(), CONFIGS["all"], {"sub_group_size": 100}),
        "measured": (2, net(), measured, {}),
        "experts": (2, get_peft_model(tiny_moe(), LoraConfig(**EXPERT_LORA)), CONFIGS["all"], {}),
    }
    found = {}
    for case, (stage, model, config, options) in cases.items():
        optimizer: Any = torch.optim.AdamW(grouped(model, case), lr=RATE)
        _, wrapper, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings(stage, options))
        try:
            OverParameterization(model, config, steps=STEPS).attach(wrapper)
        except ConfigError as error:
            found[case] = str(error)
    return found


def seen(model: Any, over: OverParameterization, losses: list[float]) -> dict[str, Any]:
    over.check_unchanged()
    return {
        "losses": losses,
        "matrices": {name: whole(p) for name, p in model.named_parameters() if p.requires_grad},
        "cores": cores(over),
        "rounds": [found.model_dump() for found in over.schedule.rounds],
        "step": over.step,
    }


def main(folder: Path) -> None:
    start_deepspeed()
    found: dict[str, Any] = {name: in_engine(name) for name in RUNS}
    found["refused"] = refusals()
    for stage in (2, 3):
        place, options = folder / f"trainer-{stage}", {"stage3_gather_16bit_weights_on_model_save": True}
        asked = settings(stage, options if stage == 3 else {}) | {"gradient_clipping": "auto"}  # the Trainer's
        found[place.name] = run_twice(place, dropout=0.0, deepspeed=asked)
    torch.save(found, folder / f"{distributed.get_rank()}.pt")
    count_all(folder)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
