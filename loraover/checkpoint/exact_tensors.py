"""Tensors of an adapter as exactly as its files hold them: contracted from cores if there are any, else as stored."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from loraover.common.arrays import Array, Numbers, as_array, as_tensor, is_floating, widened

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from loraover.checkpoint.metadata import SiteRecord
    from loraover.overparam.decompositions import Decomposition


@dataclass(frozen=True)
class Exact:
    """A tensor in float64 with the bound of its error; a tensor of integers keeps its type.

    Args:
        value: Contraction of the cores, or the stored value, which `tensor` can leave in its type.
        bound: Bound of each element's error: gamma_k(2^-53) |C_1| ... |C_K|, or zero for a stored value.
        site: Record of the matrix if it has cores, else None.
    """

    value: Tensor
    bound: Tensor
    site: SiteRecord | None

    def arrays(self) -> ExactArray:
        """Return the same as NumPy's arrays, which share their memory."""
        is_stored = not self.bound.any()
        return ExactArray(as_array(self.value), None if is_stored else as_array(self.bound), self.site)


@dataclass(frozen=True)
class ExactArray:
    """A tensor as a NumPy array, with the bound of its error.

    Args:
        value: Contraction of the cores in float64, or the stored value in its own type or in float64.
        bound: Bound of each element's error, in float64; None where the value has no error.
        site: Record of the matrix if it has cores, else None.
    """

    value: Array
    bound: Numbers | None
    site: SiteRecord | None

    def widened(self) -> ExactArray:
        """Return the same with floating-point numbers in float64."""
        return replace(self, value=widened(self.value)) if is_floating(self.value) else self

    def tensors(self) -> Exact:
        """Return the same as PyTorch's tensors, which share their memory."""
        value = as_tensor(self.value)
        bound = value.new_zeros(()).expand_as(value) if self.bound is None else as_tensor(self.bound)
        return Exact(value, bound, self.site)


@dataclass(frozen=True)
class Factor:
    """Matrix A or B as training held it.

    Args:
        decomposition: Decomposition of its cores; None if it has none.
        cores: Its cores, or the matrix itself if it has none.
        m: Number of rows.
        n: Number of columns.
    """

    decomposition: Decomposition | None
    cores: tuple[Tensor, ...]
    m: int
    n: int

    def to(self, device: torch.device, dtype: torch.dtype) -> Factor:
        """Return the factor with its cores in another place and type."""
        return replace(self, cores=tuple(core.to(device).to(dtype) for core in self.cores))

    def apply(self, x: Tensor) -> Tensor:
        """Return x M^T (tokens, m) of inputs x (tokens, n), without forming a matrix M that has cores."""
        if self.decomposition is None:
            return x @ self.cores[0].mT
        return self.decomposition.apply(self.cores, x.unsqueeze(0), self.m, self.n)[0]
