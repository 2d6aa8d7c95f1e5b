"""Changes inside a subspace: DEFT and PEANuT, of rank r, and OSF, of twice the rank that is trained.

DEFT: delta_W = Q (R - P^T W), where Q and P are the trained matrix itself and its positive part, or both its
orthonormal columns. PEANuT: delta_W^T = f(W^T A^T) B^T with a small network f, so delta_W has rank r though f is not
linear: the network reads the weight, not the input. OSF trains the last k singular triplets of W:
delta_W = U S V - U_0 S_0 V_0, of rank 2 k, where PEFT finds U_0 S_0 V_0 in float32.

Sources: PEFT's `DeftLinear`; Zhong et al. 2025, arXiv:2410.01870; Nayak et al. 2025, arXiv:2504.07097.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, final

from pydantic import Field

from loraover.adapters.convert.methods.base import ConversionMethod, LowRank, rounding
from loraover.adapters.convert.methods.single_precision import determined, orthonormal, singular_part
from loraover.adapters.convert.source import MethodConfig, Module
from loraover.checkpoint.error_bounds import unit_roundoff
from loraover.common.later import torch

if TYPE_CHECKING:
    from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": lambda x: torch.nn.functional.relu(x),
    "gelu": lambda x: torch.nn.functional.gelu(x),
    "silu": lambda x: torch.nn.functional.silu(x),
    "swish": lambda x: torch.nn.functional.silu(x),
    "sigmoid": lambda x: torch.sigmoid(x),
    "tanh": lambda x: torch.tanh(x),
    "linear": lambda x: x,
}
"""Activations of transformers' ACT2FN that PEANuT can have here, by name."""

STEEPEST = 1.2
"""Bound of the slope of each activation; the largest is 1.13, of GELU."""


class DeftFields(MethodConfig):
    """Fields of DeftConfig that change the delta."""

    decomposition_method: Literal["relu", "qr"] = "relu"
    alpha: float | None = None
    para: bool = False


@final
class Deft(ConversionMethod[DeftFields]):
    """Adapters that replace a projection of the weight."""

    config = DeftFields
    tensors = ("deft_P", "deft_R")
    inert = frozenset({"r", "init_scale", "deft_dropout"})
    rank = "r"
    needs_weights = True

    def delta(self, module: Module[DeftFields]) -> LowRank:
        m, n = module.shape
        p = module.tensor("deft_P", m, None)
        q, right, apart = p, p.relu(), 0.0
        if module.config.decomposition_method == "qr":
            q, apart = orthonormal(module, "deft_P", p)
            right = q
        weight = module.weight()
        r = p.shape[1]
        a, size = -right.T @ weight, float(right.norm()) * float(weight.norm())
        if not module.config.para:
            scaling = module.config.alpha / r if module.config.alpha else 1.0
            replaced = scaling * module.tensor("deft_R", r, n)
            a, size = a + replaced, size + float(replaced.norm())
        # R and P^T W may cancel, so their rounding is not that of the sum
        rounded = rounding(m, n, r) * float(q.norm()) * size
        norm = float(weight.norm())
        turned = apart * (float(a.norm()) + norm)
        delta = LowRank(q, a, rounded + turned)
        return determined(module, delta, turned, norm, "the columns of deft_P are almost linearly dependent")


class PeanutFields(MethodConfig):
    """Fields of PeanutConfig that change the delta."""

    depth: int = Field(0, ge=0)
    act_fn: str = "relu"
    scaling: float = 1.0


@final
class Peanut(ConversionMethod[PeanutFields]):
    """A small network that reads the weight."""

    config = PeanutFields
    tensors = (
        *("peanut_A.weight", "peanut_B.weight"),
        *(f"peanut_{side}.{i}.weight" for side in ("encoders", "decoders") for i in range(16)),
    )
    inert = frozenset({"r"})
    rank = "r"
    needs_weights = True

    def delta(self, module: Module[PeanutFields]) -> LowRank:
        m, n = module.shape
        f = ACTIVATIONS.get(module.config.act_fn)
        if f is None:
            raise module.refuse(f"act_fn is {module.config.act_fn!r}, expected one of {', '.join(ACTIVATIONS)}.")
        a = module.tensor("peanut_A.weight", None, m)
        r = len(a)
        relative, kept = rounding(m, n, r), []

        def layer(x: Tensor, apart: float, matrix: Tensor) -> tuple[Tensor, float]:
            """Return f(x M^T), and a bound of the Frobenius norm of its rounding, from that of x."""
            found, size = f(x @ matrix.T), float(matrix.norm())
            linear = (apart + relative * float(x.norm())) * size  # the terms of x M^T may cancel
            return found, STEEPEST * linear + relative * float(found.norm())

        hidden, apart = layer(module.weight().T, 0.0, a)
        for i in range(module.config.depth):
            kept.append((hidden, apart))
            hidden, apart = layer(hidden, apart, module.tensor(f"peanut_encoders.{i}.weight", r, r))
        for i in range(module.config.depth):
            hidden, apart = layer(hidden, apart, module.tensor(f"peanut_decoders.{i}.weight", r, r))
            skipped, skipped_apart = kept.pop()
            hidden, apart = hidden + skipped, apart + skipped_apart
        b = module.tensor("peanut_B.weight", m, r) * module.config.scaling
        return LowRank(b, hidden.T.contiguous(), apart * float(b.norm()))


@final
class Osf(ConversionMethod[MethodConfig]):
    """Orthogonal subspace fine-tuning; the shapes of the tensors show how many triplets are trained."""

    config = MethodConfig
    tensors = tuple(f"osf_svd_params.{name}" for name in ("U_low", "S_low", "V_low"))
    inert = frozenset({"effective_rank", "rank_pattern", "target_svd_config"})
    rank = "2 (min(shape) - effective_rank)"
    needs_weights = True
    starts_in_stored = True

    def delta(self, module: Module[MethodConfig]) -> LowRank:
        m, n = module.shape
        s = module.tensor("osf_svd_params.S_low", None)
        u = module.tensor("osf_svd_params.U_low", m, len(s))
        v = module.tensor("osf_svd_params.V_low", len(s), n)
        if len(s) > min(m, n):
            raise module.refuse(f"it trains {len(s)} singular triplets, and its weight has {min(m, n)}.")
        stored = module.stored_weight()
        start = singular_part(stored.float(), min(m, n) - len(s), tail=True)
        # PEFT stores the factors in the data type that it loads the weight in; another machine's round differently
        u0, s0, v0 = (factor.to(stored.dtype).double() for factor in (start.u, start.s, start.vt))
        rounded = 0.0 if stored.dtype == torch.float32 else 8 * unit_roundoff(stored.dtype) * float(start.s.norm())
        delta = LowRank(torch.cat([u * s, -u0 * s0], dim=1), torch.cat([v, v0]), start.apart + rounded)
        return determined(module, delta, start.apart, float(start.s.norm()), start.reason)
