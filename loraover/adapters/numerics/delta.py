"""The delta_W that an adapter adds to each module, in float64 and with a bound of its error."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from loraover.adapters.numerics.rounding import narrowed
from loraover.checkpoint.error_bounds import U64, gamma, smallest_subnormal
from loraover.checkpoint.exact_tensors import Exact, ExactArray
from loraover.checkpoint.peft_adapter import AdapterDir, ExactAdapter
from loraover.common.arrays import is_finite, widened
from loraover.common.errors import ExportError
from loraover.common.later import torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Delta:
    """delta_W = B @ A of one module, with the scaling in B.

    Args:
        module: Path of the module in the base model.
        embedding: Whether the module is an embedding, whose A has one column for each token.
        a: A with its error bound, (r, in_features).
        b: Scaling * B with its error bound, (out_features, r).
    """

    module: str
    embedding: bool
    a: Exact
    b: Exact

    @classmethod
    def of_factors(cls, module: str, embedding: bool, b: Tensor, a: Tensor) -> Delta:
        """Return a delta whose factors have no error: B (out_features, r) and A (r, in_features)."""
        exact_a, exact_b = (Exact(x.contiguous(), x.new_zeros(()).expand_as(x), None) for x in (a, b))
        return cls(module, embedding, exact_a, exact_b)

    @property
    def rank(self) -> int:
        """Number of rows of A."""
        return self.a.value.shape[0]

    def rows(self, rows: slice) -> Delta:
        """Return the delta of some output features."""
        return replace(self, b=Exact(self.b.value[rows], self.b.bound[rows], self.b.site))

    def product(self) -> Exact:
        """Return delta_W (out_features, in_features), with the bound |dB| (|A| + |dA|) + |B| (|dA| + gamma_r |A|)."""
        a, b = self.a, self.b
        size = a.value.abs()
        left = torch.cat([b.bound, b.value.abs()], dim=1)
        right = torch.cat([size + a.bound, a.bound + gamma(self.rank, U64) * size])
        return Exact(b.value @ a.value, left @ right, a.site or b.site)


def read_deltas(adapter: AdapterDir) -> Iterator[Delta]:
    """Yield the delta of every adapted module of an adapter, one at a time."""
    check_no_bias(adapter)
    with adapter.open() as exact:
        for module in adapter.modules:
            yield read_delta(exact, module)


def check_no_bias(adapter: AdapterDir) -> None:
    """Raise ExportError if a LoRA has a bias, which B @ A cannot express."""
    biases = [key for key in adapter.shapes if key.endswith(".lora_B.bias")]
    if biases:
        raise ExportError(
            f"{adapter.tensors_path}: {biases[0]} is a bias of a LoRA, which no exported format can hold; "
            "train with lora_bias=False."
        )


def read_delta(exact: ExactAdapter, path: str) -> Delta:
    """Return the delta of one module from open files; several threads may call it."""
    module = exact.adapter.modules[path]
    a, b = (exact.array(key).widened() for key in module.keys)
    return Delta(path, module.is_embedding, a.tensors(), scale(b, module.scaling).tensors())


def is_power_of_two(number: float) -> bool:
    """Whether a product with the number is exact in any binary format, within its range."""
    return math.frexp(abs(number))[0] == 0.5


def scale(exact: ExactArray, scaling: float) -> ExactArray:
    """Multiply by the scaling, in float64 unless the products of stored values are exact in their own type.

    |error| <= |scaling| bound + gamma_1 |result|, plus half a subnormal for underflow.
    """
    value = exact.value
    if value.dtype != np.float64:
        if scaling == 1:
            return exact
        if is_power_of_two(scaling):  # products beyond the range, or below it, were rounded
            wide = widened(value, np.float32)
            with np.errstate(all="ignore"):
                scaled = narrowed(wide * np.float32(scaling), value.dtype)
                is_exact = np.array_equal(widened(scaled, np.float32) / np.float32(scaling), wide)
            if is_exact and is_finite(scaled):
                return ExactArray(scaled, exact.bound, exact.site)
    value = widened(value) * scaling
    bound = gamma(1, U64) * np.abs(value)
    if exact.bound is not None:
        bound += abs(scaling) * exact.bound
    if scaling not in (0.0, 1.0):
        bound += smallest_subnormal(np.dtype(np.float64)) / 2
    return ExactArray(value, bound, exact.site)
