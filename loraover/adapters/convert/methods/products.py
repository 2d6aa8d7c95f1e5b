"""Products whose factors the file holds, or parts of them: AdaLoRA, LoHa, LoKr and VB-LoRA.

AdaLoRA: delta_W = alpha / (r_0 + 1e-5) B diag(E) A, where pruned ranks have E = 0, or were cut out of the file. PEFT
divides by the rank r_0 that training began with, not by the rank that is left.

LoHa: delta_W = s (A_1 B_1) * (A_2 B_2), element by element. Its columns and rows are products of columns and rows:
delta_W = s sum_ij (a_1i * a_2j) (b_1i * b_2j)^T, of rank r^2.

LoKr: delta_W = s kron(W_1, W_2), where each W is a matrix or a product of two. With W_1 = P_1 Q_1 and W_2 = P_2 Q_2,
delta_W = s kron(P_1, P_2) kron(Q_1, Q_2), of rank rank(W_1) rank(W_2).

VB-LoRA: delta_W = B A, where A and B are made of short vectors, each a mixture of k vectors of a bank that all modules
share: sum_j softmax(top-k logits)_j bank[i_j]. A file with only the top k (`save_only_topk_weights`) holds their
indices and all but the last of their weights, which sum to 1.

Sources: Zhang et al. 2023, arXiv:2303.10512, and PEFT's `AdaLoraLayer`; Hyeon-Woo et al. 2021, arXiv:2108.06098; Yeh et
al. 2023, arXiv:2309.14859; Li et al. 2024, arXiv:2405.15179.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, final

from pydantic import Field, PositiveInt

from loraover.adapters.convert.methods.base import ConversionMethod, LowRank, rounding
from loraover.adapters.convert.request import ConvertRequest
from loraover.adapters.convert.source import MethodConfig, Module
from loraover.checkpoint.adapter_config import Patterns, first_match
from loraover.common.later import torch

if TYPE_CHECKING:
    from torch import Tensor


class AdaLoraFields(MethodConfig):
    """Fields of AdaLoraConfig that change the delta."""

    init_r: int = Field(12, ge=1)
    lora_alpha: float = 8


@final
class AdaLora(ConversionMethod[AdaLoraFields]):
    """Adaptive ranks: a truncated SVD whose singular values are pruned while it is trained."""

    config = AdaLoraFields
    tensors = ("lora_A", "lora_B", "lora_E")
    inert = frozenset(
        {
            *("target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step"),
            *("r", "rank_pattern", "alpha_pattern", "use_rslora", "init_lora_weights"),
        }
    )
    rank = "number of ranks that pruning left"

    def delta(self, module: Module[AdaLoraFields]) -> LowRank:
        m, n = module.shape
        a = module.tensor("lora_A", None, n)
        b = module.tensor("lora_B", m, len(a))
        e = module.tensor("lora_E", len(a), 1)
        alpha = module.config.lora_alpha
        scaling = alpha if alpha > 0 else float(len(a))
        kept = e[:, 0] != 0
        return LowRank(b[:, kept] * (scaling / (module.config.init_r + 1e-5)), (a * e)[kept])


class LycorisFields(MethodConfig):
    """Fields of LoHaConfig and LoKrConfig that change the delta."""

    r: int = Field(8, ge=1)
    alpha: float = 8
    rank_pattern: Patterns[PositiveInt] = Field(default_factory=dict)
    alpha_pattern: Patterns[float] = Field(default_factory=dict)

    def rank(self, module: str) -> int:
        """Return the rank that the configuration gives one module."""
        return int(first_match(self.rank_pattern, module, self.r))

    def scaling(self, module: str) -> float:
        """Return alpha / r of a module."""
        return first_match(self.alpha_pattern, module, self.alpha) / self.rank(module)


@final
class LoHa(ConversionMethod[LycorisFields]):
    """The Hadamard product of two low-rank matrices."""

    config = LycorisFields
    tensors = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
    inert = frozenset({"use_effective_conv2d"})
    rank = "r^2"

    def delta(self, module: Module[LycorisFields]) -> LowRank:
        (m, n), r = module.shape, module.config.rank(module.path)
        a1, a2 = (module.tensor(f"hada_w{i}_a", m, r) for i in (1, 2))
        b1, b2 = (module.tensor(f"hada_w{i}_b", r, n) for i in (1, 2))
        b = (a1[:, :, None] * a2[:, None, :]).flatten(start_dim=1)
        a = (b1[:, None, :] * b2[None, :, :]).flatten(end_dim=1)
        return LowRank(b * module.config.scaling(module.path), a)


@final
class LoKr(ConversionMethod[LycorisFields]):
    """The Kronecker product of two matrices, each of which may be a low-rank product."""

    config = LycorisFields
    tensors = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
    inert = frozenset({"use_effective_conv2d", "decompose_both", "decompose_factor"})
    rank = "rank(w1) rank(w2), mostly min(shape of w1) r"

    def delta(self, module: Module[LycorisFields]) -> LowRank:
        (p1, q1, apart1), (p2, q2, apart2) = _factors(module, "lokr_w1"), _factors(module, "lokr_w2")
        made = len(p1) * len(p2), q1.shape[1] * q2.shape[1]
        if made != module.shape:
            raise module.refuse(
                f"the Kronecker product has shape {made}, the base model's weight {module.shape}; name "
                f"the model that the adapter was trained on with {ConvertRequest.named('model')}."
            )
        size1, size2 = (float(p.norm()) * float(q.norm()) for p, q in ((p1, q1), (p2, q2)))
        scaling = module.config.scaling(module.path)
        left_out = abs(scaling) * (apart1 * (size2 + apart2) + size1 * apart2)
        return LowRank(torch.kron(p1, p2) * scaling, torch.kron(q1, q2), left_out)


def _factors(module: Module[LycorisFields], name: str) -> tuple[Tensor, Tensor, float]:
    """Return P and Q with W = P Q and as few columns of P as the shape or the file allows, and a bound of their error.

    The bound is of the Frobenius norm, for a W that is a product itself: its terms may cancel.
    """
    apart = 0.0
    if not module.has(name):
        r = module.config.rank(module.path)
        p = module.tensor(f"{name}_a", None, r)
        q = module.tensor(f"{name}_b", r, None)
        if r <= min(len(p), q.shape[1]):
            return p, q, apart
        w, apart = p @ q, rounding(len(p), q.shape[1], r) * float(p.norm()) * float(q.norm())
    else:
        w = module.tensor(name, None, None)
    m, n = w.shape
    eye = torch.eye(min(m, n), dtype=w.dtype)
    return (w, eye, apart) if n <= m else (eye, w, apart)


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
