"""Pieces of A and B in a process's optimizer where DeepSpeed's ZeRO has cut them out of one flat parameter.

This is the only file that knows private names of DeepSpeed. They are those of deepspeed/runtime/zero/stage3.py and
deepspeed/utils/tensor_fragment.py in DeepSpeed 0.19.8; a version without them is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
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
        """Return a matrix (m, n) with the part in its place and zeros elsewhere, so that a sum over processes is whole.

        Args:
            part: What `of` gives.
        """
        whole = part.new_zeros(self.shape)
        whole.view(-1)[self.start : self.start + len(part)] = part
        return whole

    def write(self, matrix: Tensor) -> None:
        """Copy this process's part of a matrix (m, n) into the flat parameter."""
        self.values.copy_(matrix.reshape(-1)[self.start : self.start + len(self.values)])


def piece_of(parameter: nn.Parameter) -> Piece | None:
    """Return the piece of a parameter that DeepSpeed has cut; None for any other parameter.

    Raises:
        ConfigError: This version of DeepSpeed keeps its addresses elsewhere.
    """
    held: Any = parameter
    try:
        if hasattr(held, "_z3_optimizer"):
            return _piece_of_stage_3(held)
        if hasattr(held, "_hp_mapping"):
            return _piece_of_fragment(held)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        import deepspeed

        raise ConfigError(
            f"DeepSpeed {deepspeed.__version__} keeps the pieces of A and B in places that are not known here "
            f"({error}). Use DeepSpeed 0.19, or train with DDP or FSDP2."
        ) from error
    return None


def _piece_of_stage_3(parameter: Any) -> Piece:
    """Return the piece of a parameter of which every process holds an equal share; the last one's is filled up."""
    engine = parameter._z3_optimizer
    part, offset, share = engine.grad_position[engine.get_param_id(parameter)]
    group = engine.sub_group_to_group_id[part]
    if (parts := list(engine.sub_group_to_group_id.values()).count(group)) != 1:
        raise ConfigError(
            f"attach: DeepSpeed's ZeRO 3 steps a group of this model's trained parameters in {parts} parts, one after "
            "another, and cores are stepped together. Raise sub_group_size."
        )
    start = min(share * dist.get_rank(parameter.ds_process_group), parameter.ds_numel)
    length = min(share, parameter.ds_numel - start)
    return Piece(
        engine.fp32_partitioned_groups_flat[part].detach().narrow(0, offset, length),
        *(offset, start, tuple(parameter.ds_shape), group),
    )


def _piece_of_fragment(parameter: Any) -> Piece:
    """Return the piece of a parameter of stage 1 or 2, which processes cut wherever their shares end."""
    fragment, shape = parameter._hp_mapping, tuple(parameter.shape)
    if fragment is None:
        return Piece(parameter.new_empty(0, dtype=torch.float32), 0, 0, shape, -1)
    address = fragment.hp_fragment_address.start, fragment.lp_fragment_address.start
    return Piece(fragment.hp_fragment.detach(), *address, shape, fragment.param_group_index)


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
