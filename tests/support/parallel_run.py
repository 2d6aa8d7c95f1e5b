"""A plain training loop for one process, or for several that share each batch, and a comparison of the two."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from loraover import LoraOverConfig, OverParameterization, Probe, read_checkpoint
from loraover.common.command_line import run
from loraover.overparam.sharding import full
from loraover_export.cli import cli

from support.processes import EXAMPLES, Traffic, script_in_two_processes
from support.tiny_models import lora_matrices, net_batch, tiny_net, trainable

STEPS, ROWS = 6, 4

# As in test_exactness: the sides round a gradient apart by 1e-14 at most, an update is at most LR / EPS = 10 times as
# steep, and the loss is too flat to amplify it.
LR, EPS, TOLERANCE = 1e-2, 1e-3, 2e-12

SCHEDULES = ["all", "static", "static-fisher", "dynamic"]
CONFIGS: dict[str, LoraOverConfig | None] = {
    "plain-lora": None,
    "all": LoraOverConfig(),
    "static": LoraOverConfig.model_validate({"schedule": "static", "score": "loss_impact", "budget": {"sites": 4}}),
    "static-fisher": LoraOverConfig.model_validate({"schedule": "static", "budget": {"parameters": 30}}),
    "dynamic": LoraOverConfig.model_validate(
        {"schedule": "dynamic", "score": "fisher", "budget": {"sites": 4}, "rounds": 2, "start": 0.3, "end": 0.6}
    ),
}


def model(**options: Any) -> Any:
    """TinyNet in float64, with matrices of 3 and of 5 rows, which two processes cannot share evenly."""
    return tiny_net(dtype=torch.float64, **({"r": 3} | options))


def fresh(schedule: str) -> Any:
    """With B = 0 a static schedule takes warm-up steps, which it undoes."""
    return model(draw_b="static" not in schedule)


def loss(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    error: Tensor = net(x) - y
    return error.square().mean()


def share(seed: int, rank: int, world: int) -> tuple[Tensor, Tensor]:
    """This process's rows of a batch."""
    rows = slice(rank * ROWS // world, (rank + 1) * ROWS // world)
    x, y = net_batch(seed, ROWS, torch.float64)
    return x[rows], y[rows]


def train(
    net: Any,
    config: LoraOverConfig | None,
    *,
    rank: int = 0,
    world: int = 1,
    micro_batches: int = 1,
    accumulate: Callable[[bool], AbstractContextManager[Any]] = lambda is_last: nullcontext(),
    probed: Any = None,
    **adamw: Any,
) -> dict[str, Any]:
    """A run of `STEPS` steps: its losses, messages, decisions, and what it leaves.

    Args:
        net: Wrapped or not.
        config: None for plain LoRA.
        accumulate: Context of a micro-batch, given whether it is the step's last.
        probed: The model that a schedule runs, if it is not `net`.
        adamw: Options of the optimizer.
    """
    over = None
    with Traffic() as before:
        if config is not None:
            batches = [share(100 + i, 0, 1) for i in range(2)]
            over = OverParameterization(net, config, steps=STEPS, probe=Probe(probed or net, batches, loss))
    optimizer = torch.optim.AdamW(trainable(net), lr=LR, eps=EPS, **adamw)
    if over is not None:
        over.attach(optimizer)
    losses, messages = [], []
    for step in range(STEPS):
        with Traffic() as traffic:
            for micro in range(micro_batches):
                with accumulate(micro == micro_batches - 1):
                    found = loss(net, share(step * micro_batches + micro, rank, world)) / micro_batches
                    found.backward()  # type: ignore[no-untyped-call]
                losses.append(found.item())
            optimizer.step()
            optimizer.zero_grad()
        messages.append(traffic.messages)
    return {
        "losses": losses,
        "messages_before": before.messages,
        "messages": messages,
        "matrices": {name.removeprefix("module."): full(matrix) for name, matrix in lora_matrices(net).items()},
        "cores": {} if over is None else cores(over),
        "rounds": [] if over is None else [found.model_dump() for found in over.schedule.rounds],
    }


def sharded(net: Any) -> Any:
    """Two layers are units of their own; what the third adds stays whole between a forward and its backward."""
    for layer in (net.get_base_model().first, net.get_base_model().second):
        fully_shard(layer)
    return fully_shard(net)


def fsdp_run(rank: int, net: Any, config: LoraOverConfig | None, **options: Any) -> dict[str, Any]:
    """A run of this process's share under FSDP2."""
    net = sharded(net)

    @contextmanager
    def accumulate(is_last: bool) -> Iterator[None]:
        net.set_requires_gradient_sync(is_last)
        yield

    return train(net, config, rank=rank, world=2, accumulate=accumulate, **options)


def ddp_run(
    rank: int, net: Any, config: LoraOverConfig | None, *, probes_inside: bool = False, **options: Any
) -> dict[str, Any]:
    """A run of this process's share; a schedule runs the wrapped model, or as in the Trainer the model inside."""
    wrapped = DistributedDataParallel(net)
    return train(
        wrapped,
        config,
        rank=rank,
        world=2,
        accumulate=lambda is_last: nullcontext() if is_last else wrapped.no_sync(),
        probed=net if probes_inside else wrapped,
        **options,
    )


def step(net: Any, optimizer: torch.optim.Optimizer, rank: int, seed: int) -> float:
    """One step on this process's share of a batch; returns its loss."""
    found = loss(net, share(seed, rank, 2))
    found.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    optimizer.zero_grad()
    return found.item()


def cores(over: OverParameterization) -> dict[str, Tensor]:
    """Every core and its optimizer state."""
    found = {}
    for name, (group, i) in over.injected.items():
        for k in range(len(group.stacks)):
            found[f"{name}.{k}"] = group.core(k, i)
            state = group.core_state(k, group.owner(k, i)) if k in group.trained else {}
            found |= {f"{name}.{k}.{key}": value for key, value in state.items()}
        if group in over.followers:
            found |= {f"{name}.{key}": value for key, value in over.followers[group].site_state(i).items()}
    return found


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether two runs are equal bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def deviation(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Largest difference between the runs of any element."""
    assert one.keys() == other.keys()
    return max([0.0, *(float((one[name] - other[name]).abs().max()) for name in one)])


def assert_trained_as_one(alone: dict[str, Any], first: dict[str, Any], second: dict[str, Any]) -> None:
    """Two processes are equal bit for bit, and to rounding what one process is at their global batch."""
    mean = [(one + other) / 2 for one, other in zip(first["losses"], second["losses"], strict=True)]
    assert first["losses"] != second["losses"]
    assert max(abs(loss - one) for loss, one in zip(mean, alone["losses"], strict=True)) < TOLERANCE
    assert equal(first["matrices"], second["matrices"])
    assert equal(first["cores"], second["cores"])
    assert deviation(first["matrices"], alone["matrices"]) < TOLERANCE
    assert deviation(first["cores"], alone["cores"]) < TOLERANCE
    assert first["rounds"] == second["rounds"]
    assert [found["chosen"] for found in first["rounds"]] == [found["chosen"] for found in alone["rounds"]]


def assert_example_folds(name: str, folder: Path, start: Callable[..., None] = script_in_two_processes) -> None:
    """Two processes of an example leave one plain LoRA, and with it the cores that fold into it."""
    start(EXAMPLES / f"{name}.py", "--steps", 5, "--output", folder / "adapter")
    checkpoint = read_checkpoint(folder / "adapter")
    assert (len(checkpoint.sites), checkpoint.meta.step, checkpoint.meta.world_size) == (28, 5, 2)
    assert all(matrix.any() for matrix in load_file(checkpoint.tensors_path).values())
    assert run(cli, ["fold", str(folder / "adapter"), "-o", str(folder / "folded")]) == 0
