"""What an optimizer remembers of a matrix, carried into the matrix's centre core."""

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
    """The optimizer's state of a centre core, had the core been trained with these auxiliary cores from the start.

    The core's gradient is linear in the matrix's, so a mean of gradients is carried exactly. A mean of squared
    gradients is carried as if the matrix's elements had independent gradients.

    Args:
        state: of the matrix, by the optimizer's own keys.
        cores: core k (1, p_k, q_k).
        shape: of the matrix.

    Returns:
        Empty where the state has a tensor of another kind (8-bit blocks, factors of rows and columns).
    """
    carried: dict[str, Any] = {}
    for key, value in state.items():
        whole = full(value) if isinstance(value, Tensor) else value
        if not isinstance(whole, Tensor) or whole.ndim == 0:
            carried[key] = whole.clone() if isinstance(whole, Tensor) else whole
        elif key in LINEAR | SQUARED and tuple(whole.shape) == shape and whole.is_floating_point():
            moment = whole.to(cores[0].dtype).unsqueeze(0)
            carried[key] = decomposition.to_centre(cores, moment, *shape, squared=key in SQUARED)[0]
        else:
            return {}
    return carried
