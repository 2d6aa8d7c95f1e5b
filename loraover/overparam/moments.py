"""Conversion of an optimizer's state of a matrix into a state of the matrix's centre core."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from loraover.overparam.decompositions import Decomposition
from loraover.overparam.optimizers import PLAIN
from loraover.overparam.sharding import full

LINEAR = {"exp_avg", "momentum_buffer", "grad_avg"}
SQUARED = {"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum"}


@torch.no_grad()
def carried_moments(
    state: Mapping[str, Any], decomposition: Decomposition, cores: Sequence[Tensor], shape: tuple[int, int]
) -> dict[str, Any]:
    """Return the state that the centre core would have, had it been trained with these auxiliary cores from the start.

    The core's gradient is linear in the matrix's, so a mean of gradients is converted exactly. A mean of squared
    gradients is converted as if the gradients of the matrix's elements were independent.

    Args:
        state: The optimizer's state of the matrix, by the optimizer's own keys.
        decomposition: Decomposition that the cores belong to.
        cores: Cores of the matrix; core k has shape (1, p_k, q_k).
        shape: Shape (m, n) of the matrix.

    Returns:
        The centre core's state by the same keys. It is empty if the matrix's state has something that cannot be
        converted (8-bit blocks, factors of rows and columns, lists of tensors).
    """
    carried: dict[str, Any] = {}
    moments: dict[str, Tensor] = {}
    for key, value in state.items():
        whole = full(value) if isinstance(value, Tensor) else value
        if isinstance(whole, PLAIN):
            carried[key] = whole
        elif not isinstance(whole, Tensor):
            return {}
        elif whole.ndim == 0:
            carried[key] = whole.clone()
        elif key in LINEAR | SQUARED and tuple(whole.shape) == shape and whole.is_floating_point():
            moments[key] = whole.to(cores[0].dtype).unsqueeze(0)
        else:
            return {}

    def to_centre(moment: Tensor, squared: bool) -> Tensor:
        return decomposition.to_centre(cores, moment, *shape, squared=squared)[0]

    # Contiguous, as a fused optimizer makes them, which walks through memory.
    return carried | {key: moment.contiguous() for key, moment in converted(moments, to_centre).items()}


def converted(moments: Mapping[str, Tensor], convert: Callable[[Tensor, bool], Tensor]) -> dict[str, Tensor]:
    """Convert an optimizer's means of gradients, and of their squares, into another basis.

    A centred RMSprop divides by the root of square_avg - grad_avg^2, which would become negative if both were converted
    by themselves. What is converted in the place of its squares is that variance.

    Args:
        moments: Moments by the optimizer's own keys.
        convert: Function of a moment, and of whether it is one of squares.
    """
    given = dict(moments)
    is_centred = {"square_avg", "grad_avg"} <= given.keys()
    if is_centred:
        given["square_avg"] = (given["square_avg"] - given["grad_avg"].square()).clamp(min=0)
    found = {key: convert(moment, key in SQUARED) for key, moment in given.items()}
    if is_centred:
        found["square_avg"] = found["square_avg"] + found["grad_avg"].square()
    return found
