"""Parameters that FSDP2 has spread over processes (DTensor), and ordinary ones, through the same functions.

Every process must call those that gather or agree, or the others wait for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist


def full(tensor: Tensor) -> Tensor:
    """The whole tensor; gathered from all processes where it is sharded."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def gathered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The whole of each tensor, in one message for all that are sharded alike."""
    found = {name: tensor for name, tensor in tensors.items() if not _is_sharded(tensor)}
    alike: dict[Any, list[str]] = {}
    for name in tensors:
        if name not in found:
            tensor: Any = tensors[name]
            alike.setdefault((tensor.shape, tensor.dtype, tensor.device_mesh, tensor.placements), []).append(name)
    for names in alike.values():
        found.update(zip(names, full(torch.stack([tensors[name] for name in names])), strict=True))
    return found


def trainable_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The model's trainable parameters, whole and on the CPU, for PEFT to save.

    state = trainable_state_dict(model)  # in every process
    if rank == 0:
        model.save_pretrained(folder, state_dict=state)
    """
    return {name: full(p.detach()).cpu() for name, p in model.named_parameters() if p.requires_grad}


def local(tensor: Tensor) -> Tensor:
    """What this process holds of it."""
    part = getattr(tensor, "to_local", None)
    return tensor if part is None else part()


@torch.no_grad()
def assign(parameters: Sequence[Tensor], values: Tensor) -> None:
    """Write whole matrices of one type, of which every process keeps its own shards.

    Args:
        parameters: G of them, of shape (m, n).
        values: (G, m, n).
    """
    values = values.to(parameters[0].dtype)
    if not _is_sharded(parameters[0]):
        torch._foreach_copy_(list(parameters), list(values.unbind()))
        return
    from torch.distributed.tensor import distribute_tensor

    for parameter, value in zip(parameters, values, strict=True):
        sharded: Any = parameter
        parameter.copy_(distribute_tensor(value, sharded.device_mesh, sharded.placements, src_data_rank=None))


def reshard(model: nn.Module) -> None:
    """Free the whole parameters that FSDP2 keeps after a forward without a backward.

    The next forward would use them, whatever has been written into the shards since.
    """
    if dist.is_available() and dist.is_initialized():
        from torch.distributed.fsdp import FSDPModule

        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def in_any_process(flags: list[bool], tensor: Tensor) -> list[bool]:
    """Whether each holds in one of the processes among which `tensor` is divided."""
    if not _is_sharded(tensor):
        return flags
    shared = torch.tensor(flags, dtype=torch.uint8, device=tensor.device)
    dist.all_reduce(shared, dist.ReduceOp.MAX)
    return [bool(flag) for flag in shared.tolist()]


def of_rank_zero(numbers: list[float], device: torch.device) -> list[float]:
    """Rank 0's numbers, in every process."""
    if world_size() == 1:
        return numbers
    shared = torch.tensor(numbers, dtype=torch.float64).view(torch.int64).to(device)  # not every GPU has float64
    dist.broadcast(shared, src=0)
    found: list[float] = shared.cpu().view(torch.float64).tolist()
    return found


def of_first_process(tensor: Tensor) -> Tensor:
    """Rank 0's tensor, in every process."""
    if world_size() > 1:
        tensor = tensor.contiguous()
        dist.broadcast(tensor, src=0)
    return tensor


def wait_for_all() -> None:
    """Until every process has come here."""
    if world_size() > 1:
        dist.barrier()


def world_size() -> int:
    """Processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "to_local")
