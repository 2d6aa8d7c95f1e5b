"""The model that an adapter is for: llama.cpp's names of its modules, and the form that llama.cpp keeps them in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from loraover.checkpoint.exact_tensors import Exact
from loraover.checkpoint.expert_stacks import ExpertStack, ExpertWeight, find_expert_weights
from loraover.checkpoint.peft_adapter import AdaptedModule, site_key
from loraover.common.errors import ExportError
from loraover.models.load import ModelSource, load_config, load_skeleton
from loraover.overparam.expert_part import MatrixName
from loraover_export.gguf.families import Family, find_family, interleave


@dataclass(frozen=True)
class TargetModule:
    """One module of the base model that llama.cpp can adapt.

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
        source: Where it is read from.
        architecture: Its model class in transformers.
        family: llama.cpp's view of that class.
        tied: Whether its head is its embedding.
        modules: Modules that llama.cpp can adapt, by path.
        others: Paths of its other modules.
        experts: Parameters of its experts, by path.
        expert_tensors: llama.cpp's names of the tensors that hold such a parameter, by path. Each holds as many rows.
    """

    source: ModelSource
    architecture: str
    family: Family
    tied: bool
    modules: Mapping[str, TargetModule]
    others: frozenset[str]
    experts: Mapping[str, ExpertWeight]
    expert_tensors: Mapping[str, tuple[str, ...]]

    def pack_experts(self, stack: ExpertStack, matrices: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return one parameter's A (E, r, n) and B (E, m, r) by llama.cpp's names of the tensors that they adapt.

        Where llama.cpp keeps gate and up apart, each has a part of the rows of B, and both have the same A.

        Args:
            stack: The pairs of the experts.
            matrices: A and B of each expert, by their keys.
        """
        a, b = (
            torch.stack([matrices[site_key(f"{stack.expert(e)}.lora_{matrix}")] for e in range(stack.experts)])
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
    config = load_config(source)
    architecture = config.architectures[0]
    family = find_family(architecture, source.name)
    model, names = load_skeleton(source), tensor_names(family, config)
    modules, others = _name_modules(model, names, family, config)
    experts = find_expert_weights(model)
    tensors = {path: tuple(f"{name}.weight" for name in expert_tensors(names, path)) for path in experts}
    for path, weight in experts.items():
        owner, _, parameter = path.rpartition(".")
        for expert in range(weight.experts):
            modules[f"{owner}.{expert}.{parameter}"] = TargetModule(tensors[path][0], weight.shape, False, None)
    tied = bool(config.tie_word_embeddings)
    return GgufTarget(source, architecture, family, tied, modules, frozenset(others), experts, tensors)


def tensor_names(family: Family, config: Any) -> Any:
    """Return the gguf package's map from names of modules to llama.cpp's."""
    import gguf

    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == family.name)
    return gguf.get_tensor_name_map(kind, config.num_hidden_layers)


def expert_tensors(names: Any, path: str) -> list[str]:
    """Return llama.cpp's names of the tensors that hold a parameter of experts, in the order of its rows.

    Raises:
        ExportError: llama.cpp has no such tensors.
    """
    owner, _, parameter = path.rpartition(".")
    parts = ("gate_proj", "up_proj") if parameter == "gate_up_proj" else (parameter,)
    found = [names.get_name(f"{owner}.{part}") for part in parts]
    if None in found:
        raise ExportError(f"{path}: llama.cpp has no tensors of these experts; the model cannot be written.")
    return found


def _name_modules(model: Any, names: Any, family: Family, config: Any) -> tuple[dict[str, TargetModule], set[str]]:
    import gguf

    rotated = {
        gguf.MODEL_TENSOR.ATTN_Q: config.num_attention_heads,
        gguf.MODEL_TENSOR.ATTN_K: config.num_key_value_heads,
    }
    found, others = {}, set()
    for path, module in model.named_modules():
        name = names.get_type_and_name(path)
        if name is None or getattr(getattr(module, "weight", None), "ndim", 0) != 2:
            others.add(path)
            continue
        m, n = module.weight.shape
        heads = rotated.get(name[0]) if family.interleaved else None
        found[path] = TargetModule(f"{name[1]}.weight", (m, n), isinstance(module, nn.Embedding), heads)
    return found, others
