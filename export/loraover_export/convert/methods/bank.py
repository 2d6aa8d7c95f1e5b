"""VB-LoRA: A and B are made of short vectors, each a mixture of k vectors of a bank that all modules share.

Each piece of A and B is sum_j softmax(top-k logits)_j bank[i_j], and delta_W = B A. A file with only the top k
(`save_only_topk_weights`) holds their indices and all but the last of their weights, which sum to 1.

Source: Li et al. 2024, arXiv:2405.15179.
"""

from __future__ import annotations

from typing import ClassVar, final

import torch
from pydantic import Field
from torch import Tensor

from loraover_export.convert.methods.base import LowRank, Method
from loraover_export.convert.source import MethodConfig, Module


class VbLoraFields(MethodConfig):
    """Fields of VBLoRAConfig that change the delta."""

    topk: int = Field(2, ge=1)


@final
class VbLora(Method[VbLoraFields]):
    """Vector bank LoRA."""

    config = VbLoraFields
    tensors = tuple(
        f"vblora_logits_{side}{ending}" for side in "AB" for ending in ("", "_topk_indices", "_topk_weights")
    )
    shared = ("vblora_vector_bank",)
    inert: ClassVar[frozenset[str]] = frozenset(
        {
            *("r", "num_vectors", "vector_length", "save_only_topk_weights", "vblora_dropout"),
            *("init_vector_bank_bound", "init_logits_std"),
        }
    )
    rank: ClassVar[str] = "r"

    def delta(self, module: Module[VbLoraFields]) -> LowRank:
        m, n = module.shape
        a, b = self._mixed(module, "vblora_logits_A"), self._mixed(module, "vblora_logits_B")
        a = a.reshape(len(a), -1)
        b = b.transpose(1, 2).reshape(-1, len(a))
        if a.shape[1] != n or len(b) != m:
            raise module.refuse(
                f"A has {a.shape[1]} columns and B {len(b)} rows, expected {n} and {m}; name the model that the "
                "adapter was trained on with --model."
            )
        return LowRank(b, a)

    def _mixed(self, module: Module[VbLoraFields], name: str) -> Tensor:
        """Return the vectors in the places of the logits, (p, q, length)."""
        bank = module.adapter.shared("vblora_vector_bank")
        if bank is None:
            raise module.refuse("vblora_vector_bank is missing; the file is incomplete.")
        if module.has(f"{name}_topk_indices"):
            indices = module.tensor(f"{name}_topk_indices").long()
            weights = module.tensor(f"{name}_topk_weights")
            weights = torch.cat([weights, 1 - weights.sum(-1, keepdim=True)], dim=-1)
        else:
            top, indices = module.tensor(name, None, None, len(bank)).topk(module.config.topk, dim=-1)
            weights = top.softmax(-1)
        mixed: Tensor = (weights.unsqueeze(-1) * bank[indices]).sum(-2)
        return mixed
