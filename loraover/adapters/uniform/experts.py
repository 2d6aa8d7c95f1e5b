"""Experts of one parameter in a written adapter: stacked as PEFT has them, or a pair for each projection."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from loraover.checkpoint.expert_stacks import PRESENT_LAYOUT, ExpertStack
from loraover.checkpoint.peft_adapter import AdapterDir, site_key

if TYPE_CHECKING:
    from torch import Tensor

Projections = tuple[str, str, str]
"""Names of a class's gate, up and down projections."""


def stack_fields(stacks: Sequence[ExpertStack]) -> dict[str, Any]:
    """Return the fields of `adapter_config.json` by which PEFT finds stacked pairs, and knows their layout."""
    if not stacks:
        return {}
    return {"target_parameters": [stack.path for stack in stacks], "peft_version": PRESENT_LAYOUT}


def parts_of(parameter: str, projections: Projections) -> tuple[str, ...]:
    """Return the projections that a parameter of all experts holds: gate and up, or down."""
    return projections[:2] if parameter == "gate_up_proj" else projections[2:]


def split_paths(stacks: Sequence[ExpertStack], projections: Projections) -> set[str]:
    """Return the paths by which `split_experts` names the pairs of all experts."""
    return {
        f"{stack.module}.{expert}.{name}"
        for stack in stacks
        for expert in range(stack.experts)
        for name in parts_of(stack.parameter, projections)
    }


def split_experts(adapter: AdapterDir, projections: Projections) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """Return a function that gives every projection of every expert its pair: experts.3.gate_proj.lora_A, and so on.

    Gate and up have the same A, and the upper and the lower half of the rows of B.

    Args:
        adapter: The adapter whose experts the function gets, by their keys.
        projections: Names of the three projections.
    """

    def split(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        found = {key: tensor for key, tensor in tensors.items() if key not in adapter.parts}
        for stack in adapter.stacks:
            names = parts_of(stack.parameter, projections)
            for expert in range(stack.experts):
                a, b = (tensors[site_key(f"{stack.expert(expert)}.lora_{matrix}")] for matrix in "AB")
                for name, rows in zip(names, b.chunk(len(names)), strict=True):
                    path = f"{stack.module}.{expert}.{name}"
                    found[site_key(f"{path}.lora_A")] = a.clone()  # safetensors refuses shared memory
                    found[site_key(f"{path}.lora_B")] = rows.contiguous()
        return found

    return split
