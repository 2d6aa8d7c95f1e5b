"""Deltas of blocks: GraLoRA, whose blocks are low-rank products, and C3A, whose blocks are circulant.

GraLoRA cuts W into k x k blocks. The block of output piece o and input piece i is a product of rank r / k: with PEFT's
layout, delta_W of output piece o is B_o (A_1o ... A_ko), of rank r, and delta_W of rank k r, plus a LoRA of rank
`hybrid_r` on top.

C3A: block (o, i) is a circulant matrix of a kernel of length b, over the number of input features; full rank.

Sources: Jung et al. 2025, arXiv:2505.20355; Chen et al. 2024, arXiv:2407.19342.
"""

from __future__ import annotations

from typing import final

from pydantic import Field

from loraover.adapters.convert.methods.base import ConversionMethod, Dense, LowRank, block_diag
from loraover.adapters.convert.source import MethodConfig, Module
from loraover.common.later import torch


class GraloraFields(MethodConfig):
    """Fields of GraloraConfig that change the delta."""

    r: int = Field(32, ge=1)
    alpha: float = 64
    hybrid_r: int = Field(0, ge=0)


@final
class Gralora(ConversionMethod[GraloraFields]):
    """Granular LoRA."""

    config = GraloraFields
    tensors = ("gralora_A", "gralora_B", "gralora_A_general.weight", "gralora_B_general.weight")
    inert = frozenset({"gralora_k", "gralora_dropout"})
    rank = "k r + hybrid_r"

    def delta(self, module: Module[GraloraFields]) -> LowRank:
        m, n = module.shape
        r, hybrid = module.config.r, module.config.hybrid_r
        a = module.tensor("gralora_A", None, None, r)
        k = len(a)
        b = module.tensor("gralora_B", k, r, None)
        if a.shape[1] * k != n or b.shape[2] * k != m or r % k:
            raise module.refuse(f"{k} blocks of {tuple(a.shape[1:])} and {tuple(b.shape[1:])} do not make {(m, n)}.")
        pieces = a.reshape(k, -1, k, r // k)  # input piece, input feature, output piece, rank
        right = [block_diag(pieces[:, :, o].mT) for o in range(k)]  # (r, n) each
        left = block_diag(b.mT)  # (m, k r)
        factors = [left], right
        if hybrid:
            factors[0].append(module.tensor("gralora_B_general.weight", m, hybrid))
            factors[1].append(module.tensor("gralora_A_general.weight", hybrid, n))
        return LowRank(torch.cat(factors[0], dim=1) * (module.config.alpha / (r + hybrid)), torch.cat(factors[1]))


@final
class C3a(ConversionMethod[MethodConfig]):
    """Circular convolution adaptation; the shape of a kernel shows its length."""

    config = MethodConfig
    tensors = ("c3a_kernel",)
    inert = frozenset({"block_size", "block_size_pattern"})
    rank = "full"

    def delta(self, module: Module[MethodConfig]) -> Dense:
        m, n = module.shape
        kernel = module.tensor("c3a_kernel", None, None, None)
        outs, ins, b = kernel.shape
        if outs * b != m or ins * b != n:
            raise module.refuse(f"c3a_kernel has shape {tuple(kernel.shape)}, which does not make {(m, n)}.")
        places = torch.arange(b)
        blocks = kernel[:, :, (places[None, :] - places[:, None]) % b]  # (out, in, row, column)
        return Dense(blocks.transpose(1, 2).reshape(m, n) / n)
