"""Cases of every decomposition, with their matrices by the NumPy oracles, and bounds of the difference."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from loraover.overparam.block_bases import Side
from loraover.overparam.decompositions import DECOMPOSITIONS, Eigen, Mpo

from oracles.contraction import Array, chain_matrix, eigen_matrix, mpo_matrix, svd_matrix
from strategies import Case, generators
from support.devices import DEVICE
from support.speed import examples
from tolerances import UNDERFLOW, UNIT, chain_terms, gamma

ORACLES: dict[str, Callable[[Sequence[Array]], Array]] = {
    "mpo": mpo_matrix,
    "svd": svd_matrix,
    "chain": chain_matrix,
    "eigen": eigen_matrix,
}


DTYPES = [torch.float64, torch.float32]


every_decomposition = pytest.mark.parametrize("name", DECOMPOSITIONS)


@contextmanager
def at_contraction(name: str, look: Callable[[Sequence[Tensor]], object]) -> Iterator[None]:
    """In the block, call a function with the cores before each contraction by the decomposition of that name."""
    kind = DECOMPOSITIONS[name]
    contract = kind.contract

    def watched(self: Any, cores: Sequence[Tensor], *sizes: int) -> Tensor:
        look(cores)
        return contract(self, cores, *sizes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "contract", watched)
        yield


cheap = examples(40)


def natural_cores(case: Case, cores: Sequence[Tensor]) -> list[list[Array]]:
    """Each matrix's cores as float64 arrays in the shapes that the oracles want."""
    decomposition = case.decomposition
    shapes: list[tuple[int, ...]] = list(decomposition.core_shapes(case.m, case.n))
    if isinstance(decomposition, Mpo):
        layout = decomposition.layout(case.m, case.n)
        shapes = [layout.core(k) for k in range(len(shapes))]
    if isinstance(decomposition, Eigen):
        cores, shapes = _with_identities(case, decomposition, cores)
    grouped = [core.detach().double().numpy() for core in cores]
    return [[core[g].reshape(shape) for core, shape in zip(grouped, shapes, strict=True)] for g in range(len(cores[0]))]


def _with_identities(case: Case, eigen: Eigen, cores: Sequence[Tensor]) -> tuple[list[Tensor], list[tuple[int, ...]]]:
    """Blocks of U, the centre and blocks of V, with an identity for a side that has no basis."""
    found, shapes = list(cores), [tuple(core.shape[1:]) for core in cores]
    sides: list[tuple[Side, int, int]] = [("rows", case.m, 0), ("columns", case.n, 2)]
    for side, length, at in sides:
        if eigen.bases.core(side, case.m, case.n) is None:
            found.insert(at, torch.eye(length).expand(len(cores[0]), length, length))
            shapes.insert(at, (1, length, length))
    for at in (0, 2):
        if len(shapes[at]) == 2:
            p, q = shapes[at]
            shapes[at] = (p // q, q, q)
    return found, shapes


def entries(case: Case) -> int:
    """Numbers in all cores: more than any sum of an application has terms, core by core."""
    return sum(p * q for p, q in case.decomposition.core_shapes(case.m, case.n))


def oracle(case: Case, cores: Sequence[Tensor]) -> Tensor:
    """The oracle's matrices, (G, m, n) float64."""
    return torch.from_numpy(np.stack([ORACLES[case.name](each) for each in natural_cores(case, cores)]))


def magnitude(case: Case, cores: Sequence[Tensor]) -> Tensor:
    """Contraction of the cores' absolute values, which rounding errors are relative to."""
    return oracle(case, [core.abs() for core in cores])


def contraction_bound(case: Case, cores: Sequence[Tensor]) -> Tensor:
    """How far a contraction in the cores' dtype and the oracle's in float64 may be apart, element by element."""
    terms, dtype = chain_terms(case.decomposition.core_shapes(case.m, case.n)), cores[0].dtype
    relative = gamma(terms, UNIT[dtype]) + gamma(terms, UNIT[torch.float64])
    return 1.01 * relative * magnitude(case, cores) + UNDERFLOW[dtype]


def within(found: Tensor, expected: Tensor, bound: Tensor | float) -> bool:
    """Whether two tensors of one shape agree in every element."""
    return found.shape == expected.shape and bool(((found.double() - expected.double()).abs() <= bound).all())


def contract(case: Case, cores: Sequence[Tensor]) -> Tensor:
    """The decomposition's matrices, computed on `DEVICE`."""
    return case.decomposition.contract([core.to(DEVICE) for core in cores], case.m, case.n).cpu()


def apply(case: Case, cores: Sequence[Tensor], x: Tensor) -> Tensor:
    """The decomposition's application to x, computed on `DEVICE`."""
    return case.decomposition.apply([core.to(DEVICE) for core in cores], x.to(DEVICE), case.m, case.n).cpu()


def init(case: Case, group: Tensor, seed: int) -> tuple[Tensor, ...]:
    return case.decomposition.init(group, generators(seed, len(group)))


def centre(case: Case) -> int:
    return case.decomposition.centre(case.m, case.n)


def replaced(cores: Sequence[Tensor], k: int, core: Tensor) -> list[Tensor]:
    return [*cores[:k], core, *cores[k + 1 :]]
