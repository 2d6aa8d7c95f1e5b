"""Base models as llama.cpp names and keeps them, and what it would refuse or ignore in an adapter for one.

transformers rotates element j of a head together with element j + d/2, and llama.cpp does so in most families. In the
others it rotates neighbours, and the rows of each head of W_q and W_k are reordered when a model becomes GGUF. The rows
of B must be reordered alike.

Source: the classes of llama.cpp's conversion/ folder, by the architecture that they register. Every family here is run
in llama.cpp by tests/export/test_gguf_families.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from loraover.adapters.base_weights import check_base_weights
from loraover.adapters.uniform.refusals import OTHERS, check_fields, check_shape, check_tensors, written_parameters
from loraover.checkpoint.exact_tensors import ExactArray
from loraover.checkpoint.expert_stacks import ExpertStack
from loraover.checkpoint.model_facts import ServedModel, read_served
from loraover.checkpoint.peft_adapter import AdaptedModule, AdapterDir, site_key
from loraover.checkpoint.target_modules import if_missing
from loraover.common.arrays import Array
from loraover.common.errors import ExportError
from loraover.models.load import ModelSource
from loraover.overparam.expert_part import MatrixName

if TYPE_CHECKING:
    from torch import Tensor

Rows = TypeVar("Rows", "Tensor", Array)


@dataclass(frozen=True)
class Family:
    """Treatment of a model class of transformers by llama.cpp.

    Args:
        name: llama.cpp's name of the architecture.
        interleaved: Whether the rows of queries and keys are reordered, so that pairs that are rotated are neighbours.
        gelu: Whether its activation function is GELU, which llama.cpp looks up in a table of float16.
        has_head: Whether llama.cpp has a tensor of the output head, apart from the embedding.
    """

    name: str
    interleaved: bool = False
    gelu: bool = False
    has_head: bool = True


FAMILIES = {
    "Gemma2ForCausalLM": Family("gemma2", gelu=True, has_head=False),
    "Gemma3ForCausalLM": Family("gemma3", gelu=True),
    "GemmaForCausalLM": Family("gemma", gelu=True, has_head=False),
    "GraniteForCausalLM": Family("granite", interleaved=True),
    "LlamaForCausalLM": Family("llama", interleaved=True),
    "MistralForCausalLM": Family("llama", interleaved=True),
    "Phi3ForCausalLM": Family("phi3"),
    "Qwen2ForCausalLM": Family("qwen2"),
    "Qwen3ForCausalLM": Family("qwen3"),
    "Qwen3MoeForCausalLM": Family("qwen3moe"),
    "SmolLM3ForCausalLM": Family("smollm3", interleaved=True),
}
"""Families by the model class that `config.json` names."""

TENSORS = {
    **{"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"},
    **{"self_attn.o_proj": "attn_output", "self_attn.qkv_proj": "attn_qkv"},
    **{"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.gate_up_proj": "ffn_up", "mlp.down_proj": "ffn_down"},
    **{"mlp.gate": "ffn_gate_inp", "mlp.experts.gate_proj": "ffn_gate_exps", "mlp.experts.up_proj": "ffn_up_exps"},
    "mlp.experts.down_proj": "ffn_down_exps",
}
"""llama.cpp's names of the matrices in a layer of these families, by transformers' names."""
HEAD = "lm_head"
OUTER = {"model.embed_tokens": "token_embd", HEAD: "output"}
_IN_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")


def tensor_name(family: Family, path: str) -> str | None:
    """Return llama.cpp's name of a module's matrix; None if these families have no name for it."""
    inside = _IN_LAYER.fullmatch(path)
    if inside is None:
        return OUTER.get(path) if family.has_head or path != HEAD else None
    return f"blk.{inside[1]}.{TENSORS[inside[2]]}" if inside[2] in TENSORS else None


def find_family(architecture: str, model: str) -> Family:
    """Look up the family of a model class."""
    family = FAMILIES.get(architecture)
    if family is None:
        known = ", ".join(name.removesuffix("ForCausalLM") for name in FAMILIES)
        raise ExportError(
            f"{model} is a {architecture}. The order in which llama.cpp keeps the rows of its queries and keys is "
            f"not known here, and a wrong order would give wrong answers silently; known are {known}. Merge the "
            "adapter into the base model with PEFT, and convert the merged model with llama.cpp."
        )
    return family


def interleave(rows: Rows, heads: int) -> Rows:
    """Reorder the rows of each head of (heads * 2 n, k) from x_1 ... x_n y_1 ... y_n to x_1 y_1 ... x_n y_n."""
    order = np.arange(len(rows)).reshape(heads, 2, -1).mT.reshape(-1)
    return rows[order]


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
        served: Facts of its configuration.
        family: llama.cpp's view of its class.
        modules: Modules that llama.cpp can adapt, by path.
        expert_tensors: llama.cpp's names of the tensors that hold a parameter of all experts, by the parameter's path.
            These tensors have equally many rows.
    """

    served: ServedModel
    family: Family
    modules: Mapping[str, TargetModule]
    expert_tensors: Mapping[str, tuple[str, ...]]

    def pack_experts(self, stack: ExpertStack, matrices: Mapping[str, Array]) -> dict[str, Array]:
        """Return one parameter's A (E, r, n) and B (E, m, r) by llama.cpp's names of the tensors that they adapt.

        Where llama.cpp keeps gate and up apart, each has a part of the rows of B, and both have the same A.
        """
        a, b = (
            np.stack([matrices[site_key(f"{stack.expert(e)}.lora_{matrix}")] for e in range(stack.experts)])
            for matrix in "AB"
        )
        names = self.expert_tensors[stack.path]
        found = {f"{name}.lora_a": a for name in names}
        parts = np.split(b, len(names), axis=1)
        return found | {f"{name}.lora_b": rows for name, rows in zip(names, parts, strict=True)}

    def tensor_name(self, adapted: AdaptedModule, side: MatrixName) -> str:
        """Return llama.cpp's name of the A or B of a module."""
        return f"{self.modules[adapted.path].tensor}.lora_{side.lower()}"

    def lay_out(self, adapted: AdaptedModule, side: MatrixName, matrix: ExactArray) -> ExactArray:
        """Return a matrix of the uniform form as llama.cpp keeps it, with its error bounds in the same order."""
        module = self.modules[adapted.path]

        def laid_out(values: Array) -> Array:
            if side == "A":
                return values.T if module.is_embedding else values
            return values if module.heads is None else interleave(values, module.heads)

        bound = None if matrix.bound is None else laid_out(matrix.bound)
        return ExactArray(laid_out(matrix.value), bound, matrix.site)


def read_target(source: ModelSource) -> GgufTarget:
    """Read the configuration of a base model, and name its modules as llama.cpp does.

    Raises:
        ConfigError: No usable configuration.
        ExportError: A model class that no table entry describes.
    """
    served = read_served(source, FAMILIES)
    family = find_family(served.architecture, source.name)
    rotated = {"attn_q": served.heads, "attn_k": served.key_value_heads}
    modules: dict[str, TargetModule] = {}
    for path, module in served.modules.items():
        name = tensor_name(family, path)
        if name is not None and module.weight is not None:
            heads = rotated.get(name.rpartition(".")[2]) if family.interleaved else None
            modules[path] = TargetModule(f"{name}.weight", module.weight, module.kind == "embedding", heads)
    tensors = {path: tuple(f"{name}.weight" for name in expert_tensors(family, path)) for path in served.experts}
    for path, weight in served.experts.items():
        owner, _, parameter = path.rpartition(".")
        for expert in range(weight.experts):
            modules[f"{owner}.{expert}.{parameter}"] = TargetModule(tensors[path][0], weight.shape, False, None)
    return GgufTarget(served, family, modules, tensors)


def expert_tensors(family: Family, path: str) -> list[str]:
    """Return llama.cpp's names of the tensors that hold a parameter of experts, in the order of its rows."""
    owner, _, parameter = path.rpartition(".")
    parts = ("gate_proj", "up_proj") if parameter == "gate_up_proj" else (parameter,)
    found = [tensor_name(family, f"{owner}.{part}") for part in parts]
    if None in found:
        raise ExportError(f"{path}: llama.cpp has no tensors of these experts; the model cannot be written.")
    return [name for name in found if name is not None]


MERGE = "merge the adapter into the base model with PEFT, and convert the merged model with llama.cpp"
NORM = {"norm": "a norm, and llama.cpp loads the norms of an adapter but never applies them"}


def refuse_or_leave_out(adapter: AdapterDir, target: GgufTarget) -> list[str]:
    """Check that llama.cpp can run an adapter on its base model.

    Returns:
        Keys of tensors that are left out, because they are copies of the base model's frozen weights.

    Raises:
        LoraOverError: An adapter that llama.cpp would refuse, or apply wrongly or in part.
    """
    adapter.check_keeps_base()
    adapter.check_complete(target.served.modules, target.served.model_type, target.served.experts)
    check_fields(adapter, MERGE, allowed=written_parameters(adapter))
    where, base = adapter.tensors_path, target.served.source.name
    names = target.served.modules
    for path in adapter.modules:
        if path in names and path not in target.modules:
            raise ExportError(
                f"{where}: adapts {path}, for which llama.cpp's {target.family.name} has no weight; {MERGE}."
            )
        module = target.modules.get(path)
        if module is None:
            raise ExportError(f"{where}: adapts {path}, which {base} does not have; {if_missing(path, names)}.")
        if names[path].kind == "expert" and path not in adapter.experts:
            raise ExportError(
                f"{where}: adapts the single expert {path}, but llama.cpp's {module.tensor} holds all experts. Adapt "
                f"all experts by target_parameters, or {MERGE}."
            )
        check_shape(adapter, path, module.shape, is_embedding=module.is_embedding, base=base)
        is_head = path == "lm_head"
        if target.served.is_tied and (module.is_embedding or is_head):
            reason = (
                "llama.cpp keeps no weight of the head to adapt"
                if is_head
                else "llama.cpp would apply the embedding's adapter to the head as well, and would abort at most ranks"
            )
            raise ExportError(
                f"{where}: adapts {path}, but the embedding and the head of {base} are one matrix: {reason}. Train "
                f"without {path.rpartition('.')[2]}, or {MERGE}."
            )
    weights = {path: module.shape for path, module in target.modules.items()}
    copies = check_tensors(adapter, weights, MERGE, OTHERS | NORM)
    check_base_weights(adapter, copies, target.served.source, MERGE)
    return copies
