"""Parameters of which each process may hold a part, treated like ordinary ones.

FSDP2 shards parameters as DTensors. DeepSpeed's ZeRO cuts pieces of A and B out of one flat parameter. Functions that
gather or exchange values must be called in every process; a process that is missing makes the others wait.

This is the only file that knows private names of DeepSpeed. They are those of deepspeed/runtime/zero/stage3.py and
deepspeed/utils/tensor_fragment.py in DeepSpeed 0.19.8; a version without them is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from loraover.common.errors import ConfigError


@dataclass(frozen=True)
class Piece:
    """The part of one matrix that this process's optimizer holds in a flat parameter.

    Args:
        values: The part, 1-D: a view of the flat parameter, float32. It is empty where the process holds nothing.
        offset: Its place in the flat parameter.
        start: Its place in the matrix (m, n), read row by row.
        shape: Shape (m, n) of the matrix.
        group: Number of the optimizer's parameter group that the flat parameter is; -1 where the process holds nothing.
    """

    values: Tensor
    offset: int
    start: int
    shape: tuple[int, int]
    group: int

    def of(self, flat: Tensor) -> Tensor:
        """Return the part of a tensor that is shaped like the flat parameter, a view."""
        return flat.narrow(0, self.offset, len(self.values))

    def spread(self, part: Tensor) -> Tensor:
        """Return a matrix (m, n) with the part in its place and zeros elsewhere; summed over processes, it is whole."""
        whole = part.new_zeros(self.shape)
        whole.view(-1)[self.start : self.start + len(part)] = part
        return whole

    def write(self, matrix: Tensor) -> None:
        """Copy this process's part of a matrix (m, n) into the flat parameter."""
        self.values.copy_(matrix.reshape(-1)[self.start : self.start + len(self.values)])


def piece_of(parameter: nn.Parameter) -> Piece | None:
    """Return the piece of a parameter that DeepSpeed has cut; None for any other parameter."""
    held: Any = parameter
    try:
        if hasattr(held, "_z3_optimizer"):  # every process holds an equal share, of which the last one's is filled up
            zero = held._z3_optimizer
            part, offset, share = zero.grad_position[zero.get_param_id(held)]
            group = zero.sub_group_to_group_id[part]
            if (parts := list(zero.sub_group_to_group_id.values()).count(group)) != 1:
                raise ConfigError(
                    f"attach: DeepSpeed's ZeRO 3 steps a group of this model's trained parameters in {parts} parts, "
                    "one after another, and cores are stepped together. Raise sub_group_size."
                )
            start = min(share * dist.get_rank(held.ds_process_group), held.ds_numel)
            values = zero.fp32_partitioned_groups_flat[part].detach()
            values = values.narrow(0, offset, min(share, held.ds_numel - start))
            return Piece(values, offset, start, tuple(held.ds_shape), group)
        if hasattr(held, "_hp_mapping"):  # of stage 1 or 2: processes cut wherever their shares end
            fragment, shape = held._hp_mapping, tuple(held.shape)
            if fragment is None:
                return Piece(held.new_empty(0, dtype=torch.float32), 0, 0, shape, -1)
            address = fragment.hp_fragment_address.start, fragment.lp_fragment_address.start
            return Piece(fragment.hp_fragment.detach(), *address, shape, fragment.param_group_index)
    except ConfigError:  # which is a ValueError
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        import deepspeed

        raise ConfigError(
            f"DeepSpeed {deepspeed.__version__} keeps the pieces of A and B in places that are not known here "
            f"({error}). Use DeepSpeed 0.19, or train with DDP or FSDP2."
        ) from error
    return None


def whole_shape(parameter: nn.Parameter) -> torch.Size:
    """Return the shape of a parameter, also of one whose values ZeRO 3 has taken away until they are needed."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def summed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the sums over all processes, with one message for all tensors of the same shape and dtype."""
    alike: dict[Any, list[str]] = {}
    for name, tensor in tensors.items():
        alike.setdefault((tensor.shape, tensor.dtype), []).append(name)
    found: dict[str, Tensor] = {}
    for names in alike.values():
        sums = all_reduced(torch.stack([_as_sent(tensors[name]) for name in names]))
        found.update((name, one.to(tensors[name].device)) for name, one in zip(names, sums, strict=True))
    return found


def all_reduced(tensor: Tensor, operation: Any = dist.ReduceOp.SUM) -> Tensor:
    """Return the sum, or another reduction, of all processes' tensors on the tensor's device.

    With an optimizer offloaded to the CPU, pieces are there, and a process without a piece has an empty one on its GPU:
    all of them send from the GPU.
    """
    sent = _as_sent(tensor)
    dist.all_reduce(sent, operation)
    return sent.to(tensor.device)


def _as_sent(tensor: Tensor) -> Tensor:
    return tensor.to(torch.accelerator.current_accelerator()) if torch.accelerator.is_available() else tensor


def is_taken_away(parameter: Tensor) -> bool:
    """Whether ZeRO 3 owns a parameter, so that the model holds its values only while it computes with them."""
    return hasattr(parameter, "_z3_optimizer")


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
    """Return all values of a parameter, gathered from all processes if FSDP2 or ZeRO 3 has cut it."""
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
    """Write full matrices (G, m, n) into parameters of one type; of sharded ones, each process keeps its part."""
    values = values.to(parameters[0].dtype)
    if not is_sharded(parameters[0]):
        torch._foreach_copy_(list(parameters), list(values.unbind()))
        return
    from torch.distributed.tensor import distribute_tensor

    for parameter, value in zip(parameters, values, strict=True):
        sharded: Any = parameter
        parameter.copy_(distribute_tensor(value, sharded.device_mesh, sharded.placements, src_data_rank=None))


def reshard(model: nn.Module) -> None:
    """Free full parameters that FSDP2 keeps after a forward alone: the next one would ignore new values."""
    if dist.is_available() and dist.is_initialized():
        from torch.distributed.fsdp import FSDPModule

        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def in_any_process(flags: list[bool], device: torch.device | None) -> list[bool]:
    """Return for each flag whether it is true in any process; without a device, all processes have the same flags."""
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
    """Return rank 0's tensor, in every process; it is sent over the device, if one is given."""
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
