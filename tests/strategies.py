"""Hypothesis strategies: shapes, decompositions with their options, and float64 matrices."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from loraover.overparam.decompositions import Decomposition, make_decomposition

SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 16, 18, 24, 31)
"""Rank 1, primes, prime powers and sizes with many factors."""

LORA_SHAPES = [(8, 576), (576, 8), (16, 1536), (1536, 16), (16, 49152), (49152, 16)]
"""Of A and B in a small model, its vocabulary included."""

SEEDS = st.integers(0, 2**32 - 1)


class Case(NamedTuple):
    """A decomposition with options, for an m x n matrix."""

    name: str
    options: Mapping[str, Any]
    m: int
    n: int

    @property
    def decomposition(self) -> Decomposition:
        return make_decomposition(self.name, self.options)


def sizes() -> st.SearchStrategy[int]:
    return st.sampled_from(SIZES)


@st.composite
def factorisations(draw: st.DrawFn, size: int, count: int) -> tuple[int, ...]:
    """`count` ordered factors of `size`, ones among them."""
    factors = [1] * count
    divisor = 2
    while size > 1:
        if size % divisor == 0:
            factors[draw(st.integers(0, count - 1))] *= divisor
            size //= divisor
        else:
            divisor += 1
    return tuple(factors)


def full_bonds(rows: tuple[int, ...], columns: tuple[int, ...]) -> tuple[int, ...]:
    """Inner bonds that represent every matrix: at each cut, the smaller of the two sides' sizes."""
    cuts = range(1, len(rows))
    return tuple(min(prod(rows[:k] + columns[:k]), prod(rows[k:] + columns[k:])) for k in cuts)


@st.composite
def mpo_options(draw: st.DrawFn, m: int, n: int) -> dict[str, Any]:
    num_cores = draw(st.integers(1, 4))
    options: dict[str, Any] = {"num_cores": num_cores, "gauge": draw(st.sampled_from(["identity", "random"]))}
    kind = draw(st.sampled_from(["full", "modes", "expansion", "bonds"]))
    if kind in ("modes", "bonds"):
        options["modes"] = {size: draw(factorisations(size, num_cores)) for size in sorted({m, n})}
    if kind == "bonds":
        full = full_bonds(options["modes"][m], options["modes"][n])
        options["bonds"] = tuple(bond + draw(st.integers(0, 3)) for bond in full)
    if kind == "expansion" and num_cores > 1:
        options["expansion"] = draw(expansions())
    return options


def svd_options(m: int, n: int) -> st.SearchStrategy[dict[str, Any]]:
    return st.just({})


@st.composite
def chain_options(draw: st.DrawFn, m: int, n: int) -> dict[str, Any]:
    return {"depth": draw(st.integers(2, 4)), "expansion": draw(expansions())}


def eigen_options(m: int, n: int) -> st.SearchStrategy[dict[str, Any]]:
    """Sides with a basis and without, in blocks that divide them and that do not."""
    sources = st.sampled_from(["gradient", "calibration", "none"])
    return st.fixed_dictionaries({"short": sources, "long": sources, "block": st.sampled_from([1, 2, 3, 4, 7, 64])})


def expansions() -> st.SearchStrategy[float]:
    return st.sampled_from([1.0, 1.25, 2.0, 2.5, 3.0])


OPTIONS: dict[str, Callable[[int, int], st.SearchStrategy[dict[str, Any]]]] = {
    "mpo": mpo_options,
    "svd": svd_options,
    "chain": chain_options,
    "eigen": eigen_options,
}


@st.composite
def cases(draw: st.DrawFn, name: str) -> Case:
    """The decomposition of that name with drawn options, for a drawn shape."""
    m, n = draw(sizes()), draw(sizes())
    return Case(name, draw(OPTIONS[name](m, n)), m, n)


@st.composite
def matrices(draw: st.DrawFn, m: int, n: int) -> Tensor:
    """One to three m x n matrices, (G, m, n) float64: dense, of rank one, sparse or zero, contiguous or not."""
    kinds = draw(st.lists(st.sampled_from(["dense", "rank one", "sparse", "zero"]), min_size=1, max_size=3))
    rng = np.random.default_rng(draw(SEEDS))
    scale = 2.0 ** draw(st.integers(-40, 20))
    group = torch.zeros(len(kinds), m, n, dtype=torch.float64)
    for matrix, kind in zip(group, kinds, strict=True):
        values = rng.standard_normal((m, n))
        if kind == "rank one":
            values = np.outer(values[:, 0], values[0])
        elif kind == "sparse":
            values *= rng.random((m, n)) < 0.3
        elif kind == "zero":
            values *= 0
        matrix.copy_(torch.from_numpy(values * scale))
    return group.mT.contiguous().mT if draw(st.booleans()) else group


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal draws; two calls with one seed give the same."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def generators(seed: int, count: int) -> list[torch.Generator]:
    """`count` fresh generators with seeds of their own."""
    return [torch.Generator().manual_seed(seed + k) for k in range(count)]


def random_cores(case: Case, group: int, seed: int) -> tuple[Tensor, ...]:
    """Standard normal cores of the case's shapes, in no gauge: (group, p_k, q_k) float64."""
    shapes = case.decomposition.core_shapes(case.m, case.n)
    return tuple(normal(seed + k, group, *shape) for k, shape in enumerate(shapes))
