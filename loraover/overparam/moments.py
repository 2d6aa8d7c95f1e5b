"""Conversion of an optimizer's state of a matrix into a state of the matrix's centre core."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from loraover.overparam.decompositions import Decomposition
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
        The centre core's state by the same keys. It is empty if the matrix's state has a tensor that cannot be
        converted (8-bit blocks, factors of rows and columns).
    """
    carried: dict[str, Any] = {}
    for key, value in state.items():
        whole = full(value) if isinstance(value, Tensor) else value
        if not isinstance(whole, Tensor) or whole.ndim == 0:
            carried[key] = whole.clone() if isinstance(whole, Tensor) else whole
        elif key in LINEAR | SQUARED and tuple(whole.shape) == shape and whole.is_floating_point():
            moment = whole.to(cores[0].dtype).unsqueeze(0)
            centre = decomposition.to_centre(cores, moment, *shape, squared=key in SQUARED)[0]
            carried[key] = centre.contiguous()  # as a fused optimizer makes it, which walks through memory
        else:
            return {}
    return carried
