"""AdaLoRA: delta_W = alpha / (r_0 + 1e-5) B diag(E) A, where pruned ranks have E = 0, or were cut out of the file.

PEFT divides by the rank r_0 that training began with, not by the rank that is left.

Source: Zhang et al. 2023, arXiv:2303.10512; PEFT's `AdaLoraLayer`.
"""

from __future__ import annotations

from typing import final

from pydantic import Field

from loraover.adapters.convert.methods.base import ConversionMethod, LowRank
from loraover.adapters.convert.source import MethodConfig, Module


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
    rank = "number of ranks that are left"

    def delta(self, module: Module[AdaLoraFields]) -> LowRank:
        m, n = module.shape
        a = module.tensor("lora_A", None, n)
        b = module.tensor("lora_B", m, len(a))
        e = module.tensor("lora_E", len(a), 1)
        alpha = module.config.lora_alpha
        scaling = alpha if alpha > 0 else float(len(a))
        kept = e[:, 0] != 0
        return LowRank(b[:, kept] * (scaling / (module.config.init_r + 1e-5)), (a * e)[kept])
