"""The base weight times numbers, element by element: IA3, HiRA and GLoRA, of full rank; and DeLoRA, of rank r.

IA3: W' = W diag(l) in feed-forward modules, and diag(l) W elsewhere. HiRA: W' = W + W * (B A). GLoRA:
W' = W + W * A + B, where A and B are products of two matrices, columns or numbers. DeLoRA, whose factors are scaled to
length 1: delta_W = lambda / r sum_i b_i a_i^T / (|b_i| |a_i|) diag(w), with w the norms of the base weight's columns,
which the file holds.

Sources: Liu et al. 2022, arXiv:2205.05638; Huang et al. 2025 (HiRA, ICLR); Chavan et al. 2023, arXiv:2306.07967; Bini
et al. 2025, arXiv:2503.18225.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, final

from loraover.adapters.convert.methods.base import ConversionMethod, Dense, LowRank
from loraover.adapters.convert.source import MethodConfig, Module

if TYPE_CHECKING:
    from torch import Tensor

SMALLEST = 1e-4
"""Smallest norm that DeLoRA divides by, in PEFT."""


@final
class Ia3(ConversionMethod[MethodConfig]):
    """Infused adapter by inhibiting and amplifying inner activations; a vector's shape shows which side it scales."""

    config = MethodConfig
    tensors = ("ia3_l",)
    inert = frozenset({"feedforward_modules", "init_ia3_weights"})
    rank = "full"
    needs_weights = True

    def delta(self, module: Module[MethodConfig]) -> Dense:
        m, n = module.shape
        scale = module.tensor("ia3_l", None, None)
        if scale.shape not in ((1, n), (m, 1)):
            raise module.refuse(f"ia3_l has shape {tuple(scale.shape)}, expected {(1, n)} or {(m, 1)}.")
        if scale.shape == (m, 1) and module.has_bias:
            raise module.refuse("IA3 scales the bias of the layer too, which no LoRA can do.")
        return Dense(module.weight() * (scale - 1))


@final
class Hira(ConversionMethod[MethodConfig]):
    """Hadamard high-rank adaptation; the shapes of the tensors show the rank."""

    config = MethodConfig
    tensors = ("hira_A", "hira_B")
    inert = frozenset({"r", "rank_pattern", "hira_dropout"})
    rank = "full"
    needs_weights = True

    def delta(self, module: Module[MethodConfig]) -> Dense:
        m, n = module.shape
        a = module.tensor("hira_A", None, n)
        b, weight = module.tensor("hira_B", m, len(a)), module.weight()
        terms = weight.abs() * (b.abs() @ a.abs())  # those of B A may cancel
        return Dense(weight * (b @ a), float(terms.norm()))


@final
class Glora(ConversionMethod[MethodConfig]):
    """Generalised LoRA, on layers without a bias; the tensors show the form of each path."""

    config = MethodConfig
    tensors = tuple(f"glora_{path}.{name}" for path in "ABCDE" for name in ("Xd", "Xu", "X", "zeros"))
    inert = frozenset({"r", "config_A_B", "config_C", "config_D_E"})
    rank = "full"
    needs_weights = True

    def delta(self, module: Module[MethodConfig]) -> Dense:
        if module.has_bias:
            raise module.refuse("GLoRA changes the bias of the layer too, which no LoRA can do.")
        weight = module.weight()
        return Dense(weight * self._path(module, "A") + self._path(module, "B") * weight.new_ones(weight.shape))

    def _path(self, module: Module[MethodConfig], path: str) -> Tensor:
        """Return a number, a column, or a matrix."""
        m, n = module.shape
        if module.has(f"glora_{path}.X"):
            found = module.tensor(f"glora_{path}.X")
            return found if found.shape in ((1,), (m, 1)) else module.tensor(f"glora_{path}.X", m, 1)
        if module.has(f"glora_{path}.zeros"):
            return module.tensor(f"glora_{path}.zeros", m, n)
        xd = module.tensor(f"glora_{path}.Xd", m, None)
        return xd @ module.tensor(f"glora_{path}.Xu", xd.shape[1], n)


@final
class Delora(ConversionMethod[MethodConfig]):
    """LoRA whose strength, which the file of tensors holds, is decoupled from the directions of its factors."""

    config = MethodConfig
    tensors = ("delora_A", "delora_B", "delora_lambda", "delora_w_norm")
    inert = frozenset({"r", "rank_pattern", "delora_lambda", "lambda_pattern"})
    rank = "r"

    def delta(self, module: Module[MethodConfig]) -> LowRank:
        m, n = module.shape
        a = module.tensor("delora_A", None, n)
        b = module.tensor("delora_B", m, len(a))
        sizes = a.norm(dim=1).clamp_min(SMALLEST) * b.norm(dim=0).clamp_min(SMALLEST)
        strength = module.tensor("delora_lambda", 1) / len(a)
        return LowRank(b * (strength / sizes), a * module.tensor("delora_w_norm", n))
