"""Deltas of blocks: GraLoRA, whose blocks are low-rank products, C3A, whose blocks are circulant, and MiSS.

GraLoRA cuts W into k x k blocks. The block of output piece o and input piece i is a product of rank r / k: with PEFT's
layout, delta_W of output piece o is B_o (A_1o ... A_ko), of rank r, and delta_W of rank k r, plus a LoRA of rank
`hybrid_r` on top.

C3A: block (o, i) is a circulant matrix of a kernel of length b, over the number of input features; full rank.

MiSS: the input is cut into pieces of length r, which are summed, and the sum meets one small matrix D (r, out):
delta_W = D^T S with S (r, in_features), S_ji = 1 where i mod r = j, of rank r. In the form "mini", D is repeated along
the output features. In the form "bat", each block W_ij (r, r) of the base weight becomes W_ij + W_ij D_i + D_i, of full
rank.

Sources: Jung et al. 2025, arXiv:2505.20355; Chen et al. 2024, arXiv:2407.19342; Kang and Yin 2024, arXiv:2409.15371;
PEFT's `MissLinear`.
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


class MissFields(MethodConfig):
    """Fields of MissConfig that change the delta."""

    r: int = Field(64, ge=1)
    mini_r: int = Field(1, ge=1)
    init_weights: bool | str = True


@final
class Miss(ConversionMethod[MissFields]):
    """Matrix shard sharing."""

    config = MissFields
    tensors = ("miss_block",)
    inert = frozenset({"miss_dropout"})
    rank = "r; init_weights='bat' full"

    def delta(self, module: Module[MissFields]) -> LowRank | Dense:
        m, n = module.shape
        if module.config.init_weights == "bat":
            return self._blocks(module)
        r = module.config.r
        d = module.tensor("miss_block", r, module.config.mini_r if module.config.init_weights == "mini" else m)
        if m % d.shape[1]:
            raise module.refuse(f"mini_r is {d.shape[1]}, which does not divide {m} output features.")
        places = torch.arange(n)
        a = torch.zeros(r, n, dtype=torch.float64)
        a[places % r, places] = 1
        return LowRank(d.repeat(1, m // d.shape[1]).T.contiguous(), a)

    def _blocks(self, module: Module[MissFields]) -> Dense:
        m, n = module.shape
        d = module.tensor("miss_block", None, None, None)
        r = d.shape[-1]
        if m % r or n % r or d.shape != (m // r, r, r):
            raise module.refuse(f"miss_block has shape {tuple(d.shape)}, which does not fit blocks of {module.shape}.")
        blocks = module.weight().reshape(m // r, r, n // r, r).permute(2, 0, 1, 3)  # (n / r, m / r, r, r)
        terms = blocks.abs() @ d.abs() + d.abs()  # which may cancel
        return Dense((blocks @ d + d).permute(1, 2, 0, 3).reshape(m, n), float(terms.norm()))
