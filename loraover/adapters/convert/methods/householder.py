"""HRA: the base weight times a product of Householder reflections, W' = W H, H = prod_i (I - 2 u_i u_i^T).

H = I - U T U^T with U of r columns and T upper triangular, built column by column (compact WY form), so that
delta_W = W (H - I) = -(W U T) U^T, of rank r. With `apply_GS`, the u_i are made orthonormal first, in float32, and
T = 2 I: H = I - 2 Q Q^T, which changes by at most 2 (2 + a) a if Q changes by a.

Sources: Yuan et al. 2024, arXiv:2405.17484; Schreiber and Van Loan 1989, doi:10.1137/0910005.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, final

from pydantic import Field

from loraover.adapters.convert.methods.base import ConversionMethod, LowRank, rounding
from loraover.adapters.convert.methods.determined import determined, orthonormal
from loraover.adapters.convert.source import MethodConfig, Module
from loraover.common.later import torch

if TYPE_CHECKING:
    from torch import Tensor


class HraFields(MethodConfig):
    """Fields of HRAConfig that change the delta."""

    r: int = Field(8, ge=1)
    gram_schmidt: bool = Field(False, alias="apply_GS")


@final
class Hra(ConversionMethod[HraFields]):
    """Householder reflection adaptation."""

    config = HraFields
    tensors = ("hra_u",)
    rank = "r"
    needs_weights = True

    def delta(self, module: Module[HraFields]) -> LowRank:
        (m, n), r = module.shape, module.config.r
        u = module.tensor("hra_u", n, r)
        if not bool((u.norm(dim=0) > 0).all()):
            raise module.refuse("a column of hra_u is zero and has no direction; train the adapter again.")
        weight, apart = module.weight(), 0.0
        if module.config.gram_schmidt:
            (u, apart), t = orthonormal(module, "hra_u", u), 2 * torch.eye(r, dtype=u.dtype)
        else:
            u, t = _compact(u)
        # the terms of W U may cancel, so their rounding is not that of the factors
        norm = float(weight.norm())
        turned = 2 * (2 + apart) * apart * norm
        rounded = rounding(m, n, r) * norm * float(u.norm()) * float(t.norm()) * float(u.norm())
        delta = LowRank(-(weight @ u) @ t, u.T.contiguous(), rounded + turned)
        return determined(module, delta, turned, norm, "the columns of hra_u are almost linearly dependent")


def _compact(u: Tensor) -> tuple[Tensor, Tensor]:
    """Return unit columns U and T with prod_i (I - 2 u_i u_i^T) = I - U T U^T."""
    u = u / u.norm(dim=0)
    gram = u.T @ u
    t = torch.zeros_like(gram)
    for i in range(len(t)):
        t[:i, i] = -2 * t[:i, :i] @ gram[:i, i]
        t[i, i] = 2
    return u, t
