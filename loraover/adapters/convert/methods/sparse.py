"""Deltas with few elements that are not zero, in the weight (SHiRA, SuperTuning) or in its Fourier transform.

FourierFT: delta_W = s Re(IFFT2(E)) with a real spectrum E, zero except at random places, which PEFT draws again from a
seed. All have full rank in general.

Sources: Bhardwaj et al. 2024, arXiv:2406.13175; Gao et al. 2024, arXiv:2405.03003; PEFT's `SupertuningLayer`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

from pydantic import Field, PositiveInt

from loraover.adapters.convert.methods.base import ConversionMethod, Dense
from loraover.adapters.convert.source import MethodConfig, Module
from loraover.checkpoint.adapter_config import Patterns, first_match
from loraover.common.later import torch

if TYPE_CHECKING:
    from torch import Tensor


@final
class Shira(ConversionMethod[MethodConfig]):
    """Sparse high-rank adapters, whose places the file of tensors holds."""

    config = MethodConfig
    tensors = ("shira_weight", "shira_indices")
    inert = frozenset({"r", "mask_type"})
    rank = "full"

    def delta(self, module: Module[MethodConfig]) -> Dense:
        values = module.tensor("shira_weight", None)
        rows, columns = module.tensor("shira_indices", 2, len(values)).long()
        return Dense(_scattered(module, rows, columns, values))


class SupertuningFields(MethodConfig):
    """Fields of SupertuningConfig that change the delta."""

    r: int | None = Field(None, ge=1)
    lora_alpha: float | None = None


@final
class Supertuning(ConversionMethod[SupertuningFields]):
    """Trained elements of the weight, with a LoRA beside them if asked for."""

    config = SupertuningFields
    tensors = (
        *("supertuning_values", "supertuning_indices"),
        *("supertuning_lora_A.weight", "supertuning_lora_B.weight"),
    )
    inert = frozenset({"sparsity", "select_top", "save_precomputed_indices"})
    rank = "full"

    def delta(self, module: Module[SupertuningFields]) -> Dense:
        m, n = module.shape
        values = module.tensor("supertuning_values", None)
        places = module.tensor("supertuning_indices", len(values)).long()
        delta, terms = _scattered(module, places // n, places % n, values), 0.0
        r, alpha = module.config.r, module.config.lora_alpha
        if r is not None and alpha is not None:
            b = module.tensor("supertuning_lora_B.weight", m, r)
            b, a = alpha / r * b, module.tensor("supertuning_lora_A.weight", r, n)
            delta, terms = delta + b @ a, float(delta.norm()) + float(b.norm()) * float(a.norm())  # which may cancel
        return Dense(delta, terms)


class FourierFields(MethodConfig):
    """Fields of FourierFTConfig that change the delta."""

    n_frequency: int = Field(1000, ge=1)
    n_frequency_pattern: Patterns[PositiveInt] = Field(default_factory=dict)
    scaling: float = 150.0
    random_loc_seed: int | None = 777


@final
class FourierFt(ConversionMethod[FourierFields]):
    """Spectral fine-tuning."""

    config = FourierFields
    tensors = ("fourierft_spectrum",)
    rank = "full"

    def delta(self, module: Module[FourierFields]) -> Dense:
        m, n = module.shape
        seed = module.config.random_loc_seed
        if seed is None:
            raise module.refuse("random_loc_seed is null, so neither file says where its frequencies are.")
        count = int(first_match(module.config.n_frequency_pattern, module.path, module.config.n_frequency))
        if count > m * n:
            raise module.refuse(f"n_frequency is {count}, more than the weight of {(m, n)} has elements.")
        places = torch.randperm(m * n, generator=torch.Generator().manual_seed(seed))[:count]
        spectrum = _scattered(module, places // n, places % n, module.tensor("fourierft_spectrum", count))
        matrix = torch.fft.ifft2(spectrum) * module.config.scaling
        return Dense(matrix.real, float(matrix.norm()))  # which is rounded where the real part is zero


def _scattered(module: Module[Any], rows: Tensor, columns: Tensor, values: Tensor) -> Tensor:
    """Return a matrix of zeros, with values added at some places."""
    m, n = module.shape
    if len(rows) and (int(rows.max()) >= m or int(columns.max()) >= n or int(min(rows.min(), columns.min())) < 0):
        raise module.refuse(f"a place lies outside the weight of shape {(m, n)}; the adapter is of another model.")
    return torch.zeros(m, n, dtype=torch.float64).index_put_((rows, columns), values, accumulate=True)
