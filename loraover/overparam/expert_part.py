"""Matrix of an expert in a stack of LoRA matrices, as PEFT keeps them for a parameter that holds all experts.

For a parameter (E, m, n), PEFT's `target_parameters` makes one A (E r, n), whose rows are sorted by the expert, and one
B (m, r E), in whose columns the expert runs fastest: delta_W_e = scaling * B_e @ A_e.

Source: ParamWrapper.get_delta_weight in peft/tuners/lora/layer.py of PEFT 0.21.2.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np

from loraover.common.arrays import Array

if TYPE_CHECKING:
    from torch import Tensor

Stack = TypeVar("Stack", "Tensor", Array)

MatrixName = Literal["A", "B"]
SIDES: tuple[MatrixName, MatrixName] = ("A", "B")

FUSED = ("gate_up_proj", "down_proj")
"""Parameters of transformers' modules of experts, in the order in which PEFT wraps them, from the inside."""


@dataclass(frozen=True)
class ExpertPart:
    """Place of one expert's matrix in a stack.

    Args:
        matrix: "A", a stack of shape (E r, n), or "B", one of shape (m, r E).
        expert: Index of the expert.
        experts: Number E of experts.
    """

    matrix: MatrixName
    expert: int
    experts: int

    def of(self, stack: Stack) -> Stack:
        """Return the expert's A (r, n) or B (m, r): a view, whatever the strides of the stack."""
        cut: Any = stack.reshape if isinstance(stack, np.ndarray) else stack.view
        is_a = self.matrix == "A"
        parts = cut(self.experts, -1, stack.shape[1]) if is_a else cut(len(stack), -1, self.experts)
        found: Stack = parts[self.expert] if is_a else parts[..., self.expert]
        return found


def without_base_layers(path: str) -> str:
    """Return a module's path in the base model, without `.base_layer` for each of PEFT's wrappers of parameters."""
    return re.sub(r"(\.base_layer)+$", "", path)


def part_of(part: ExpertPart | None, tensor: Tensor) -> Tensor:
    """Return one expert's matrix of a stack, or the tensor itself if it is the matrix."""
    return tensor if part is None else part.of(tensor)


def stack_experts(matrix: MatrixName, parts: Sequence[Array]) -> Array:
    """Return the stack that holds these A or B, one of each expert in order."""
    return np.concatenate(parts) if matrix == "A" else np.stack(parts, axis=-1).reshape(len(parts[0]), -1)
