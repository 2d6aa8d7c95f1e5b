"""Rotations of the base weight: OFT, BOFT and RoAd, of full rank, and HRA, of rank r.

OFT: W' = W R^T with R block-diagonal. Each block is the Cayley transform of a skew-symmetric Q: (I - Q)(I + Q)^-1, or
the first terms of the Neumann series of (I + Q)(I - Q)^-1, as PEFT has it. BOFT: W' = diag(s) W R^T with one butterfly
factor. RoAd: pairs of output features are rotated and scaled, W' = R W.

HRA: a product of Householder reflections, W' = W H with H = prod_i (I - 2 u_i u_i^T). H = I - U T U^T with U of r
columns and T upper triangular, built column by column (compact WY form), so that delta_W = W (H - I) = -(W U T) U^T.
With `apply_GS`, the u_i are made orthonormal first, in float32, and T = 2 I: H = I - 2 Q Q^T, which changes by at most
2 (2 + a) a if Q changes by a.

Sources: Qiu et al. 2023, arXiv:2306.07280; Liu et al. 2023, arXiv:2311.06243; Liao and Monz 2024, arXiv:2409.00119;
PEFT's `OFTRotationModule`, `BOFTLayer` and `RoadLayer`; Yuan et al. 2024, arXiv:2405.17484; Schreiber and Van Loan
1989, doi:10.1137/0910005.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, final

from pydantic import Field

from loraover.adapters.convert.methods.base import ConversionMethod, Dense, LowRank, block_diag, rounding
from loraover.adapters.convert.methods.single_precision import determined, orthonormal
from loraover.adapters.convert.source import MethodConfig, Module
from loraover.common.later import torch

if TYPE_CHECKING:
    from torch import Tensor


class OftFields(MethodConfig):
    """Fields of OFTConfig that change the delta."""

    coft: bool = False
    eps: float = 6e-5
    block_share: bool = False
    use_cayley_neumann: bool = True
    num_cayley_neumann_terms: int = Field(5, ge=1, le=1000)


@final
class Oft(ConversionMethod[OftFields]):
    """Orthogonal fine-tuning."""

    config = OftFields
    tensors = ("oft_R.weight",)
    inert = frozenset({"r", "oft_block_size"})
    rank = "full"
    needs_weights = True

    def delta(self, module: Module[OftFields]) -> Dense:
        n = module.shape[1]
        vectors = module.tensor("oft_R.weight", None, None)
        side = int((1 + (1 + 8 * vectors.shape[1]) ** 0.5) / 2)  # of a block, whose upper triangle the vectors hold
        count = n // side
        if side * (side - 1) != 2 * vectors.shape[1] or side * count != n or len(vectors) not in (1, count):
            raise module.refuse(
                f"oft_R.weight has shape {tuple(vectors.shape)}, whose blocks do not fill {n} input features."
            )
        rows, columns = torch.triu_indices(side, side, 1)
        upper = vectors.new_zeros(len(vectors), side, side)
        upper[:, rows, columns] = vectors
        rotation = block_diag(_cayley(upper - upper.mT, module.config).expand(count, -1, -1))
        weight = module.weight()
        return Dense(weight @ rotation.T - weight, float(weight.norm()))


def _cayley(q: Tensor, config: OftFields) -> Tensor:
    """Return the rotation of each block, after PEFT's projection of `coft` and with its Neumann series."""
    if config.coft:
        eps = config.eps / len(q) ** 0.5
        norm = q.norm(dim=(1, 2), keepdim=True)
        q = torch.where(norm <= eps, q, eps * q / norm.clamp_min(1e-300))
    eye = torch.eye(q.shape[-1], dtype=q.dtype)
    if not config.use_cayley_neumann:
        solved: Tensor = torch.linalg.solve(eye + q, (eye - q).expand_as(q), left=False)
        return solved
    rotation, terms = eye.expand_as(q).clone(), config.num_cayley_neumann_terms
    if terms > 1:
        rotation += 2 * q
    if terms > 2:  # as PEFT does it: 3 terms are the same as 4
        power = q @ q
        rotation += 2 * power
        for _ in range(3, terms - 1):
            power = power @ q
            rotation += 2 * power
        rotation += power @ q
    return rotation


@final
class Boft(ConversionMethod[MethodConfig]):
    """Butterfly orthogonal fine-tuning, with one factor, which is all that PEFT runs on a CPU."""

    config = MethodConfig
    tensors = ("boft_R", "boft_s")
    inert = frozenset({"boft_block_size", "boft_block_num", "boft_n_butterfly_factor", "boft_dropout"})
    rank = "full"
    needs_weights = True

    def delta(self, module: Module[MethodConfig]) -> Dense:
        m, n = module.shape
        r = module.tensor("boft_R", None, None, None, None)
        if r.shape[2] != r.shape[3]:
            raise module.refuse(f"boft_R has shape {tuple(r.shape)}, expected square blocks.")
        if len(r) != 1:
            raise module.refuse(
                f"it has {len(r)} butterfly factors; only boft_n_butterfly_factor=1 is converted. Merge the adapter "
                "into the base model with PEFT's merge_and_unload."
            )
        skew = (r[0] - r[0].mT) / 2
        eye = torch.eye(skew.shape[-1], dtype=skew.dtype)
        rotation = block_diag(torch.linalg.solve(eye + skew, (eye - skew).expand_as(skew), left=False))
        if len(rotation) != n:
            raise module.refuse(f"boft_R rotates {len(rotation)} input features, expected {n}.")
        weight = module.weight()
        return Dense(module.tensor("boft_s", m, 1) * (weight @ rotation.T) - weight, float(weight.norm()))


class RoadFields(MethodConfig):
    """Fields of RoadConfig that change the delta."""

    variant: Literal["road_1", "road_2", "road_4"] = "road_1"
    group_size: int = 64


@final
class Road(ConversionMethod[RoadFields]):
    """Rotations of pairs of output features."""

    config = RoadFields
    tensors = ("road_theta", "road_alpha")
    rank = "full"
    needs_weights = True

    def delta(self, module: Module[RoadFields]) -> Dense:
        if module.has_bias:
            raise module.refuse("RoAd rotates the bias of the layer too, which no LoRA can do.")
        m, half = module.shape[0], module.config.group_size // 2
        if half < 1 or m % (2 * half):
            raise module.refuse(f"group_size is {module.config.group_size}, which does not divide {m} output features.")
        variant, weight = module.config.variant, module.weight()
        size = {"road_1": m // 2, "road_2": m, "road_4": 2 * m}[variant]
        theta, alpha = module.tensor("road_theta", size), module.tensor("road_alpha", size)
        if variant == "road_4":
            theta, alpha = (x.reshape(-1, 2, 2 * half).transpose(0, 1).reshape(2, -1) for x in (theta, alpha))
            cosine, sine = alpha[0] * theta[0].cos(), alpha[1] * theta[1].sin()
        else:
            if variant == "road_1":
                theta, alpha = (x.reshape(-1, half).repeat_interleave(2, dim=0).flatten() for x in (theta, alpha))
            cosine, sine = alpha * theta.cos(), alpha * theta.sin()
        halves = weight.reshape(-1, 2, half, weight.shape[1])  # of each group
        turned = torch.stack([-halves[:, 1], halves[:, 0]], dim=1).reshape(weight.shape)
        return Dense(cosine[:, None] * weight + sine[:, None] * turned - weight, float(weight.norm()))


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
            u, t = compact(u)
        # the terms of W U may cancel, so their rounding is not that of the factors
        norm = float(weight.norm())
        turned = 2 * (2 + apart) * apart * norm
        rounded = rounding(m, n, r) * norm * float(u.norm()) * float(t.norm()) * float(u.norm())
        delta = LowRank(-(weight @ u) @ t, u.T.contiguous(), rounded + turned)
        return determined(module, delta, turned, norm, "the columns of hra_u are almost linearly dependent")


def compact(u: Tensor) -> tuple[Tensor, Tensor]:
    """Return unit columns U and T with prod_i (I - 2 u_i u_i^T) = I - U T U^T."""
    u = u / u.norm(dim=0)
    gram = u.T @ u
    t = torch.zeros_like(gram)
    for i in range(len(t)):
        t[:i, i] = -2 * t[:i, :i] @ gram[:i, i]
        t[i, i] = 2
    return u, t
