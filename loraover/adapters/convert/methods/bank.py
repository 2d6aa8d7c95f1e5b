"""VB-LoRA: A and B are made of short vectors, each a mixture of k vectors of a bank that all modules share.

Each piece of A and B is sum_j softmax(top-k logits)_j bank[i_j], and delta_W = B A. A file with only the top k
(`save_only_topk_weights`) holds their indices and all but the last of their weights, which sum to 1.

Source: Li et al. 2024, arXiv:2405.15179.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, final

from pydantic import Field

from loraover.adapters.convert.methods.base import ConversionMethod, LowRank, rounding
from loraover.adapters.convert.source import MethodConfig, Module
from loraover.common.later import torch

if TYPE_CHECKING:
    from torch import Tensor


class VbLoraFields(MethodConfig):
    """Fields of VBLoRAConfig that change the delta."""

    topk: int = Field(2, ge=1)


@final
class VbLora(ConversionMethod[VbLoraFields]):
    """Vector bank LoRA."""

    config = VbLoraFields
    tensors = tuple(
        f"vblora_logits_{side}{ending}" for side in "AB" for ending in ("", "_topk_indices", "_topk_weights")
    )
    shared = ("vblora_vector_bank",)
    inert = frozenset(
        {
            *("r", "num_vectors", "vector_length", "save_only_topk_weights", "vblora_dropout"),
            *("init_vector_bank_bound", "init_logits_std"),
        }
    )
    rank = "r"

    def delta(self, module: Module[VbLoraFields]) -> LowRank:
        m, n = module.shape
        bank = module.adapter.shared("vblora_vector_bank")
        if bank is None or bank.ndim != 2 or 0 in bank.shape or m % bank.shape[1] or n % bank.shape[1]:
            found = None if bank is None else tuple(bank.shape)
            raise module.refuse(
                f"vblora_vector_bank has shape {found}, whose vectors do not make a weight of {(m, n)}."
            )
        length = bank.shape[1]
        a, a_size = _mixed(module, bank, "vblora_logits_A", None, n // length)
        a = a.flatten(start_dim=1)
        b, b_size = _mixed(module, bank, "vblora_logits_B", m // length, len(a))
        b = b.transpose(1, 2).reshape(m, len(a))
        return LowRank(b, a, rounding(m, n, len(a)) * b_size * a_size)


def _mixed(
    module: Module[VbLoraFields], bank: Tensor, name: str, rows: int | None, columns: int
) -> tuple[Tensor, float]:
    """Return the vectors in the places of the logits, (rows, columns, length), and their norm if no terms cancelled."""
    k = module.config.topk
    if module.has(f"{name}_topk_indices"):
        indices = module.tensor(f"{name}_topk_indices", rows, columns, k).long()
        weights = module.tensor(f"{name}_topk_weights", *indices.shape[:2], k - 1)
        last, sizes = 1 - weights.sum(-1, keepdim=True), weights.abs()
        weights, sizes = torch.cat([weights, last], dim=-1), torch.cat([sizes, 1 + sizes.sum(-1, keepdim=True)], dim=-1)
    else:
        if k > len(bank):
            raise module.refuse(f"topk is {k}, and the bank has {len(bank)} vectors.")
        top, indices = module.tensor(name, rows, columns, len(bank)).topk(k, dim=-1)
        weights = sizes = top.softmax(-1)
    if int(indices.min()) < 0 or int(indices.max()) >= len(bank):
        raise module.refuse(f"{name}_topk_indices names a vector that the bank does not have; the file is damaged.")
    vectors = bank[indices]
    mixed: Tensor = (weights.unsqueeze(-1) * vectors).sum(-2)
    return mixed, float((sizes.unsqueeze(-1) * vectors.abs()).sum(-2).norm())
