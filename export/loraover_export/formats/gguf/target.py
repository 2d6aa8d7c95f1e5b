"""The model that an adapter is for: llama.cpp's names of its modules, and the form that llama.cpp keeps them in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loraover.checkpoint.expert_stacks import ExpertStack
from loraover.checkpoint.model_facts import ServedModel, read_served
from loraover.checkpoint.peft_adapter import AdaptedModule, site_key
from loraover.common.errors import ExportError
from loraover.models.load import ModelSource
from loraover.overparam.expert_part import MatrixName
from loraover_export.formats.gguf.families import FAMILIES, Family, find_family, interleave, tensor_name

if TYPE_CHECKING:
    from torch import Tensor

    from loraover.checkpoint.exact_tensors import Exact


@dataclass(frozen=True)
class TargetModule:
    """Module of the base model that llama.cpp can adapt.

    Args:
        tensor: llama.cpp's name of its weight.
        shape: Shape of its weight, (out_features, in_features) or (tokens, dimension).
        is_embedding: Whether it is an embedding.
        heads: Number of heads whose rows llama.cpp reorders; None if it keeps the order.
    """

    tensor: str
    shape: tuple[int, int]
    is_embedding: bool
    heads: int | None


@dataclass(frozen=True)
class GgufTarget:
    """The base model of an export.

    Args:
        served: What its configuration says.
        family: llama.cpp's view of its class.
        modules: Modules that llama.cpp can adapt, by path.
        expert_tensors: llama.cpp's names of the tensors that hold such a parameter, by path. Each holds as many rows.
    """

    served: ServedModel
    family: Family
    modules: Mapping[str, TargetModule]
    expert_tensors: Mapping[str, tuple[str, ...]]

    def pack_experts(self, stack: ExpertStack, matrices: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return one parameter's A (E, r, n) and B (E, m, r) by llama.cpp's names of the tensors that they adapt.

        Where llama.cpp keeps gate and up apart, each has a part of the rows of B, and both have the same A.

        Args:
            stack: The pairs of the experts.
            matrices: A and B of each expert, by their keys.
        """
        from torch import stack as stacked

        a, b = (
            stacked([matrices[site_key(f"{stack.expert(e)}.lora_{matrix}")] for e in range(stack.experts)])
            for matrix in "AB"
        )
        names = self.expert_tensors[stack.path]
        found = {f"{name}.lora_a": a for name in names}
        return found | {f"{name}.lora_b": rows for name, rows in zip(names, b.chunk(len(names), dim=1), strict=True)}

    def tensor_name(self, adapted: AdaptedModule, side: MatrixName) -> str:
        """Return llama.cpp's name of the A or B of a module."""
        return f"{self.modules[adapted.path].tensor}.lora_{side.lower()}"

    def lay_out(self, adapted: AdaptedModule, side: MatrixName, matrix: Exact) -> Exact:
        """Return a matrix of the uniform form as llama.cpp keeps it; the bound moves along with the value."""
        from loraover.checkpoint.exact_tensors import Exact

        module = self.modules[adapted.path]

        def laid_out(values: Tensor) -> Tensor:
            if side == "A":
                return values.mT.contiguous() if module.is_embedding else values
            return values if module.heads is None else interleave(values, module.heads)

        return Exact(laid_out(matrix.value), laid_out(matrix.bound), matrix.site)


def read_target(source: ModelSource) -> GgufTarget:
    """Read the configuration of a base model, and name its modules as llama.cpp does.

    Raises:
        ConfigError: No usable configuration.
        ExportError: A model class that no table entry describes.
    """
    served = read_served(source, FAMILIES)
    family = find_family(served.architecture, source.name)
    modules = _name_modules(served, family)
    tensors = {path: tuple(f"{name}.weight" for name in expert_tensors(family, path)) for path in served.experts}
    for path, weight in served.experts.items():
        owner, _, parameter = path.rpartition(".")
        for expert in range(weight.experts):
            modules[f"{owner}.{expert}.{parameter}"] = TargetModule(tensors[path][0], weight.shape, False, None)
    return GgufTarget(served, family, modules, tensors)


def expert_tensors(family: Family, path: str) -> list[str]:
    """Return llama.cpp's names of the tensors that hold a parameter of experts, in the order of its rows.

    Raises:
        ExportError: llama.cpp has no such tensors.
    """
    owner, _, parameter = path.rpartition(".")
    parts = ("gate_proj", "up_proj") if parameter == "gate_up_proj" else (parameter,)
    found = [tensor_name(family, f"{owner}.{part}") for part in parts]
    if None in found:
        raise ExportError(f"{path}: llama.cpp has no tensors of these experts; the model cannot be written.")
    return [name for name in found if name is not None]


def _name_modules(served: ServedModel, family: Family) -> dict[str, TargetModule]:
    rotated = {"attn_q": served.heads, "attn_k": served.key_value_heads}
    found = {}
    for path, module in served.modules.items():
        name = tensor_name(family, path)
        if name is not None and module.weight is not None:
            heads = rotated.get(name.rpartition(".")[2]) if family.interleaved else None
            found[path] = TargetModule(f"{name}.weight", module.weight, module.kind == "embedding", heads)
    return found
