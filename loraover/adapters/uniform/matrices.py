"""A and B in the uniform form: delta_W = scaling * B @ A = 1 * [scaling * B, 0] @ [A; 0], with one rank for all.

Engines differ in how they read rank_pattern, alpha_pattern and use_rslora, and some round B before they scale it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from loraover.adapters.numerics.delta import scale
from loraover.checkpoint.exact_tensors import Exact
from loraover.checkpoint.peft_adapter import AdapterDir
from loraover.common.later import torch

if TYPE_CHECKING:
    from torch import Tensor


def to_uniform(adapter: AdapterDir) -> Callable[[str, Exact], Exact]:
    """Return a function that brings a matrix of an adapter into the uniform form, by its key in the adapter's file.

    The function pads the matrix to the largest rank; it multiplies B by its module's scaling before. A product that is
    not exact adds one rounding of float64 to the bound of B; the padding is exact.
    """
    r = adapter.rank

    def form(key: str, exact: Exact) -> Exact:
        module, side = adapter.matrices[key]
        if side == "A":
            return _padded(exact, (0, 0, 0, r - module.rank))
        return _padded(scale(exact, module.scaling), (0, r - module.rank))

    return form


def _padded(exact: Exact, sides: tuple[int, ...]) -> Exact:
    if not any(sides):
        return exact

    def zeros(matrix: Tensor) -> Tensor:
        return torch.nn.functional.pad(matrix, sides)

    return Exact(zeros(exact.value), zeros(exact.bound), exact.site)
