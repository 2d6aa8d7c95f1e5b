"""MiSS: the input is cut into pieces of length r, which are summed, and the sum meets one small matrix D (r, out).

delta_W = D^T S with S (r, in_features), S_ji = 1 where i mod r = j, of rank r. In the form "mini", D is repeated along
the output features. In the form "bat", each block W_ij (r, r) of the base weight becomes W_ij + W_ij D_i + D_i, of full
rank.

Source: Kang and Yin 2024, arXiv:2409.15371; PEFT's `MissLinear`.
"""

from __future__ import annotations

from typing import final

from pydantic import Field

from loraover.adapters.convert.methods.base import ConversionMethod, Dense, LowRank
from loraover.adapters.convert.source import MethodConfig, Module
from loraover.common.later import torch


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
