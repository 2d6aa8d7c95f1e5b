"""Random projections that all modules share: VeRA, PVeRA, RandLoRA and Uni-LoRA.

VeRA: delta_W = diag(b) B diag(d) A, where A (r, largest in_features) and B (largest out_features, r) are random, frozen
and cut to the module's size. PVeRA answers with the mean of a distribution, whose A has 2 r rows: the first r count.

RandLoRA: delta_W = s sum_i B_i diag(lambda_i) A diag(gamma_i), so many terms that it has full rank.

Uni-LoRA: every element of A and B is an element of one vector theta, chosen by a random index, over the root of how
often it is chosen; delta_W = B A.

A VeRA or PVeRA file that does not hold the projections (`save_projection`) holds their seed. They are then drawn again
as PEFT draws them, with PyTorch's generator on the CPU; the bound covers that PEFT rounds them to the base model's data
type. RandLoRA's are drawn in a data type that depends on the machine, and a Uni-LoRA file without `save_indices` does
not name its modules: both are refused.

Sources: Kopiczko et al. 2023, arXiv:2310.11454; Albert et al. 2025, arXiv:2502.00987; Li et al. 2025, arXiv:2506.00799;
PEFT 0.21's `_init_vera_A_vera_B` and `_init_pvera_A_pvera_B`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, final

from pydantic import Field

from loraover.adapters.convert.methods.base import ConversionMethod, Dense, LowRank
from loraover.adapters.convert.request import ConvertRequest
from loraover.adapters.convert.source import Adapter, MethodConfig, Module
from loraover.checkpoint.error_bounds import unit_roundoff
from loraover.common.errors import CheckpointError
from loraover.common.later import torch

if TYPE_CHECKING:
    from torch import Tensor


class VeraFields(MethodConfig):
    """Fields of VeraConfig and PveraConfig that change the delta."""

    r: int = Field(256, ge=1)
    projection_prng_key: int = Field(0, ge=0)
    sample_at_inference: bool = False


@final
class Vera(ConversionMethod[VeraFields]):
    """Vector-based random matrix adaptation."""

    config = VeraFields
    tensors = ("vera_lambda_b", "vera_lambda_d")
    shared = ("vera_A", "vera_B")
    inert = frozenset({"save_projection", "d_initial", "vera_dropout"})
    rank = "r"

    def delta(self, module: Module[VeraFields]) -> LowRank:
        r = module.config.r
        inner = module.tensor("vera_lambda_d", r)  # before anything of a size that only the configuration gives
        a, b = _projections(module.adapter, *self.shared, rows=r)
        return _between(module, a[:r], b, inner, "vera")


@final
class Pvera(ConversionMethod[VeraFields]):
    """VeRA whose inner vector has a distribution; at inference its mean is used."""

    config = VeraFields
    tensors = ("pvera_lambda_b", "pvera_lambda_d")
    shared = ("pvera_A", "pvera_B")
    inert = frozenset({"save_projection", "d_initial", "pvera_dropout", "generator_seed"})
    rank = "r"

    def delta(self, module: Module[VeraFields]) -> LowRank:
        if module.config.sample_at_inference:
            raise module.refuse("sample_at_inference draws at random in every answer, which no LoRA can do.")
        r = module.config.r
        inner = module.tensor("pvera_lambda_d", 2 * r)[:r]
        a, b = _projections(module.adapter, *self.shared, rows=2 * r)
        return _between(module, a[:r], b, inner, "pvera")


def _projections(adapter: Adapter[VeraFields], name_a: str, name_b: str, rows: int) -> tuple[Tensor, Tensor]:
    a, b = adapter.shared(name_a), adapter.shared(name_b)
    m, n = adapter.largest
    if a is None and b is None:
        generator = torch.Generator().manual_seed(adapter.config.projection_prng_key)
        a = _kaiming((rows, n), n, generator).double()
        return a, _kaiming((m, adapter.config.r), adapter.config.r, generator).double()
    if a is None or b is None or not _covers(a, (rows, n)) or not _covers(b, (m, adapter.config.r)):
        raise CheckpointError(
            f"{adapter.layout.tensors_path}: {name_a} and {name_b} must both be there and have at least shapes "
            f"({rows}, {n}) and ({m}, {adapter.config.r}); the file is incomplete, or of another base model."
        )
    return a, b


def _covers(tensor: Tensor, shape: tuple[int, ...]) -> bool:
    return tensor.ndim == len(shape) and all(found >= least for found, least in zip(tensor.shape, shape, strict=True))


def _between(module: Module[VeraFields], a: Tensor, b: Tensor, inner: Tensor, kind: str) -> LowRank:
    """Return the cut projections with a scale on each side; `inner` has one for each row of `a`."""
    m, n = module.shape
    left, right = module.tensor(f"{kind}_lambda_b", m)[:, None] * b[:m, : len(a)], inner[:, None] * a[:, :n]
    if f"{kind}_A" in module.adapter.layout.shared:
        return LowRank(left, right)
    # PEFT rounds projections that it draws to the data type that it loads the base model in
    unit = unit_roundoff(module.stored_weight().dtype)
    apart = 0.0 if unit <= unit_roundoff(torch.float32) else unit * (2 + unit)
    return LowRank(left, right, apart * float(left.norm()) * float(right.norm()))


class RandLoraFields(MethodConfig):
    """Fields of RandLoraConfig that change the delta."""

    r: int = Field(32, ge=1)
    randlora_alpha: float = 640


@final
class RandLora(ConversionMethod[RandLoraFields]):
    """A sum of products of random bases, of full rank."""

    config = RandLoraFields
    tensors = ("randlora_lambda", "randlora_gamma", "randlora_A", "randlora_B")
    shared = ("randlora_A", "randlora_B")
    inert = frozenset({"save_projection", "randlora_dropout", "projection_prng_key", "sparse", "very_sparse"})
    rank = "full"

    def delta(self, module: Module[RandLoraFields]) -> Dense:
        m, n = module.shape
        lam = module.tensor("randlora_lambda", module.config.r, None)
        bases = lam.shape[1]
        gamma = module.tensor("randlora_gamma", bases, min(m, n))
        a, b = (module.adapter.shared(name) for name in self.shared)
        if a is None or b is None:
            raise CheckpointError(
                f"{module.adapter.layout.tensors_path}: the random bases are not in the file, and PEFT draws them in a "
                "data type that depends on the machine; save the adapter again with save_projection=True, where it was "
                "trained."
            )
        if not _covers(a, (module.config.r, 1, min(m, n))) or not _covers(b, (max(m, n), bases, module.config.r)):
            raise module.refuse(
                f"its random bases have shapes {tuple(a.shape)} and {tuple(b.shape)}, which are too small for it; name "
                f"the model that the adapter was trained on with {ConvertRequest.named('model')}."
            )
        r = module.config.r
        inner = (lam[:, :, None] * a[:r, :1, : min(m, n)] * gamma).flatten(end_dim=1)  # (r bases, smaller)
        outer = b[: max(m, n), :bases, :r].flatten(start_dim=1)  # (larger, bases r), in another order, as in PEFT
        product = outer @ inner  # (larger, smaller)
        scaling = module.config.randlora_alpha / r
        terms = abs(scaling) * float(outer.norm()) * float(inner.norm())  # which may cancel
        return Dense(scaling * (product if n <= m else product.T), terms)


class UniLoraFields(MethodConfig):
    """Fields of UniLoraConfig that change the delta."""

    r: int = Field(4, ge=1)


@final
class UniLora(ConversionMethod[UniLoraFields]):
    """A and B whose elements are elements of one vector."""

    config = UniLoraFields
    tensors = ("unilora_indices_A", "unilora_indices_B", "unilora_scales_A", "unilora_scales_B")
    shared = ("unilora_theta_d",)
    inert = frozenset({"save_indices", "unilora_dropout", "init_theta_d_bound", "theta_d_length", "proj_seed"})
    rank = "r"

    def delta(self, module: Module[UniLoraFields]) -> LowRank:
        m, n = module.shape
        r = module.config.r
        theta = module.adapter.shared("unilora_theta_d")
        if theta is None:
            raise module.refuse("unilora_theta_d is missing; the file is incomplete.")
        chosen = [
            module.tensor(f"unilora_indices_{side}", *shape).long() for side, shape in (("A", (r, n)), ("B", (m, r)))
        ]
        scales = [module.tensor(f"unilora_scales_{side}", *shape) for side, shape in (("A", (r, n)), ("B", (m, r)))]
        if theta.ndim != 1 or any(int(x.min()) < 0 or int(x.max()) >= len(theta) for x in chosen):
            raise module.refuse("an index lies outside unilora_theta_d; the file is damaged.")
        a, b = (theta[places] * scale for places, scale in zip(chosen, scales, strict=True))
        return LowRank(b, a)


def _kaiming(shape: tuple[int, ...], fan: int, generator: torch.Generator) -> Tensor:
    """Return the draws of He et al. 2015, arXiv:1502.01852, in float32 as PEFT makes them for VeRA."""
    bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(fan))
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)
