"""Parameters that FSDP2 has spread over processes (DTensor), and ordinary ones, through the same four functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist


def full(tensor: Tensor) -> Tensor:
    """The whole tensor; gathered from all processes where it is sharded."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def local(tensor: Tensor) -> Tensor:
    """What this process holds of it."""
    part = getattr(tensor, "to_local", None)
    return tensor if part is None else part()


@torch.no_grad()
def assign(parameter: Tensor, value: Tensor) -> None:
    """Write a whole matrix, of which every process keeps its own shard."""
    sharded: Any = parameter
    if hasattr(parameter, "to_local"):
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(
            value.to(parameter.dtype), sharded.device_mesh, sharded.placements, src_data_rank=None
        )
    parameter.copy_(value)


def of_rank_zero(numbers: list[float], device: torch.device) -> list[float]:
    """Rank 0's numbers, in every process."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return numbers
    shared = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.broadcast(shared, src=0)
    found: list[float] = shared.tolist()
    return found


def world_size() -> int:
    """Processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
