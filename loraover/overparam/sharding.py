"""Functions that treat parameters sharded by FSDP2 (DTensors) and ordinary parameters alike.

Those that gather or exchange values must be called in every process; a process that is missing makes the others wait.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from loraover.overparam.pieces import all_reduced, is_taken_away, piece_of, summed


def full(tensor: Tensor) -> Tensor:
    """Return the full tensor, gathered from all processes if it is sharded."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def gathered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the full tensors by name, with one message for all that have the same shape, dtype and sharding."""
    found = {name: tensor for name, tensor in tensors.items() if not is_sharded(tensor)}
    alike: dict[Any, list[str]] = {}
    for name in tensors:
        if name not in found:
            tensor: Any = tensors[name]
            alike.setdefault((tensor.shape, tensor.dtype, tensor.device_mesh, tensor.placements), []).append(name)
    for names in alike.values():
        found.update(zip(names, full(torch.stack([tensors[name] for name in names])), strict=True))
    return found


def trainable_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return a sharded model's trainable parameters, gathered and on the CPU, for PEFT's `save_pretrained`.

    Call it in every process: the parameters that FSDP2 has sharded are gathered from all of them.

    Args:
        model: PEFT model, sharded or not.

    Returns:
        Every parameter that requires a gradient, by its name in the model.

    Example:
        ```python
        from torch import distributed

        from loraover import trainable_state_dict


        def save(model, folder):
            state = trainable_state_dict(model)  # in every process
            if distributed.get_rank() == 0:
                model.save_pretrained(folder, state_dict=state)
        ```
    """
    return {name: whole(p).cpu() for name, p in model.named_parameters() if p.requires_grad}


def whole(parameter: nn.Parameter) -> Tensor:
    """Return a parameter's values, gathered from all processes if FSDP2 or ZeRO 3 has cut it."""
    if not is_taken_away(parameter):
        return full(parameter.detach())
    piece = piece_of(parameter)
    assert piece is not None
    return summed({"": piece.spread(piece.values)})[""]


def local(tensor: Tensor) -> Tensor:
    """Return this process's part of a tensor."""
    part = getattr(tensor, "to_local", None)
    return tensor if part is None else part()


@torch.no_grad()
def assign(parameters: Sequence[Tensor], values: Tensor) -> None:
    """Write full matrices into parameters of one type; of sharded ones, each process keeps its part.

    Args:
        parameters: G parameters of shape (m, n).
        values: Their new values, (G, m, n).
    """
    values = values.to(parameters[0].dtype)
    if not is_sharded(parameters[0]):
        torch._foreach_copy_(list(parameters), list(values.unbind()))
        return
    from torch.distributed.tensor import distribute_tensor

    for parameter, value in zip(parameters, values, strict=True):
        sharded: Any = parameter
        parameter.copy_(distribute_tensor(value, sharded.device_mesh, sharded.placements, src_data_rank=None))


def reshard(model: nn.Module) -> None:
    """Free the full parameters that FSDP2 keeps after a forward without a backward.

    Otherwise the next forward would use them and ignore what has been written into the shards since.
    """
    if dist.is_available() and dist.is_initialized():
        from torch.distributed.fsdp import FSDPModule

        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def in_any_process(flags: list[bool], device: torch.device | None) -> list[bool]:
    """Return for each flag whether it is true in any process.

    Args:
        flags: This process's flags.
        device: Device over which to send them; None: all processes have the same.
    """
    if device is None:
        return flags
    shared = torch.tensor(flags, dtype=torch.uint8, device=device)
    return [bool(flag) for flag in all_reduced(shared, dist.ReduceOp.MAX).tolist()]


def of_rank_zero(numbers: list[float], device: torch.device) -> list[float]:
    """Return rank 0's numbers in every process."""
    bits = torch.tensor(numbers, dtype=torch.float64).view(torch.int64)  # not every GPU has float64
    found: list[float] = of_first_process(bits, device).cpu().view(torch.float64).tolist()
    return found


def of_first_process(tensor: Tensor, device: torch.device | None = None) -> Tensor:
    """Return rank 0's tensor, in every process.

    Args:
        tensor: This process's tensor.
        device: Device over which to send it, if that is another than the tensor's.
    """
    if world_size() == 1:
        return tensor
    sent = tensor.to(device or tensor.device).clone(memory_format=torch.contiguous_format)
    dist.broadcast(sent, src=0)
    return sent.to(tensor.device)


def wait_for_all() -> None:
    """Wait until every process has called this."""
    if world_size() > 1:
        dist.barrier()


def world_size() -> int:
    """Number of processes that train together; 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_sharded(tensor: Tensor) -> bool:
    """Whether the model holds only this process's part of a parameter, or a tensor like one: by FSDP2 or by ZeRO 3."""
    return hasattr(tensor, "to_local") or is_taken_away(tensor)
