"""Model families that adapters are written for, and the order in which llama.cpp keeps the rows of queries and keys.

transformers rotates element j of a head together with element j + d/2, and llama.cpp does so in most families. In the
others it rotates neighbours, and the rows of each head of W_q and W_k are reordered when a model becomes GGUF. The rows
of B must be reordered alike.

Source: the classes of llama.cpp's conversion/ folder, by the architecture that they register. Every family here is run
in llama.cpp by tests/export/test_gguf_families.py.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loraover.common.errors import ExportError

if TYPE_CHECKING:
    from torch import Tensor


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
    """Return llama.cpp's name of a module's matrix; None of a module that has none in these families."""
    inside = _IN_LAYER.fullmatch(path)
    if inside is None:
        return OUTER.get(path) if family.has_head or path != HEAD else None
    return f"blk.{inside[1]}.{TENSORS[inside[2]]}" if inside[2] in TENSORS else None


def find_family(architecture: str, model: str) -> Family:
    """Look up the family of a model class.

    Args:
        architecture: Model class in transformers.
        model: Name of the model, for the message.

    Raises:
        ExportError: A model class that no table entry describes.
    """
    family = FAMILIES.get(architecture)
    if family is None:
        known = ", ".join(name.removesuffix("ForCausalLM") for name in FAMILIES)
        raise ExportError(
            f"{model} is a {architecture}. In which order llama.cpp keeps the rows of its queries and keys is "
            f"not known here, and a wrong order would give wrong answers silently; known are {known}. Merge the "
            "adapter into the base model with PEFT, and convert that with llama.cpp."
        )
    return family


def interleave(rows: Tensor, heads: int) -> Tensor:
    """Reorder the rows of each head from x_1 ... x_n y_1 ... y_n to x_1 y_1 ... x_n y_n.

    Args:
        rows: Shape (heads * d, k), with an even d.
        heads: Number of heads.

    Returns:
        Shape (heads * d, k).
    """
    from torch import arange

    order = arange(len(rows)).reshape(heads, 2, -1).mT.reshape(-1)
    return rows[order]
