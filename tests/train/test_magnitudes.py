"""Bounds of |C_1| ... |C_K| against the oracles: never below it, and hardly above it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from loraover.checkpoint.checkpoint import magnitude
from loraover.common.arrays import as_array
from loraover.overparam.decompositions import DECOMPOSITIONS

from strategies import SEEDS, Case, cases, random_cores
from support.decomposition_cases import at_contraction, cheap, every_decomposition, oracle
from tolerances import UNIT, chain_terms, gamma

LOSS = 2.0**-104
MPO = Case("mpo", {}, 16, 64)


def truth(case: Case, cores: Sequence[Tensor]) -> Tensor:
    return oracle(case, [core.double().abs() for core in cores])


def found(case: Case, cores: Sequence[Tensor]) -> Tensor:
    """The bound of each of a group's matrices, (G, m, n)."""
    each = [[as_array(core[i : i + 1]) for core in cores] for i in range(len(cores[0]))]
    found = [magnitude(case.decomposition, one, case.m, case.n).times(1.0) for one in each]
    return torch.from_numpy(np.stack(found))


def oracles_error(case: Case) -> float:
    return gamma(2 * chain_terms(case.decomposition.core_shapes(case.m, case.n)), UNIT[torch.float64])


def assert_bounds(case: Case, cores: Sequence[Tensor]) -> None:
    """The bound is at least the oracle's magnitude, and above it by no more than rounding and LOSS."""
    bound, exact = found(case, cores), truth(case, cores)
    dtype = cores[0].dtype
    terms = case.decomposition.contraction_terms(case.m, case.n)
    assert bound.dtype == torch.float64
    assert bound.shape == exact.shape
    assert bool((bound >= exact * (1 - oracles_error(case))).all())
    slack = 1 + 3 * gamma(terms + 4, UNIT[dtype]) + oracles_error(case)
    assert bool((bound <= slack * exact + (2 * LOSS if dtype == torch.float32 else 0.0)).all())


@every_decomposition
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@given(data=st.data(), group=st.integers(1, 3), seed=SEEDS)
@cheap
def test_no_element_is_above_its_bound(
    name: str, dtype: torch.dtype, data: st.DataObject, group: int, seed: int
) -> None:
    case = data.draw(cases(name))
    assert_bounds(case, [core.to(dtype) for core in random_cores(case, group, seed)])


@every_decomposition
@given(data=st.data(), seed=SEEDS)
@cheap
def test_cores_of_any_size_are_bounded(name: str, data: st.DataObject, seed: int) -> None:
    """Scales at which products of float32 overflow, become subnormal or vanish; float64 then takes over."""
    case = data.draw(cases(name))
    scales = [2.0 ** data.draw(st.integers(-140, 100)) for _ in case.decomposition.core_shapes(case.m, case.n)]
    cores = random_cores(case, 1, seed)
    assert_bounds(case, [(core * scale).float() for core, scale in zip(cores, scales, strict=True)])


def test_the_bound_covers_roundings_that_all_go_down() -> None:
    """Without its inflation, the contraction in float32 falls below the exact one; with it, nowhere."""
    cores = [core.float() for core in random_cores(MPO, 4, seed=1)]
    plain = MPO.decomposition.contract([core.abs() for core in cores], MPO.m, MPO.n).double()
    assert bool((plain < truth(MPO, cores) * (1 - oracles_error(MPO))).any())
    assert_bounds(MPO, cores)


def test_what_underflows_is_covered() -> None:
    """Products below the smallest subnormal vanish in float32, before a large core would have lifted them."""
    case = Case("mpo", {"modes": {4: (1, 1, 4), 8: (1, 1, 8)}, "bonds": (1, 1)}, 4, 8)
    decomposition = case.decomposition
    shapes = decomposition.core_shapes(4, 8)
    assert decomposition.centre(4, 8) == 2
    for sizes in ((2.0**-80, 2.0**-80, 2.0**100), (2.0**-70, 2.0**-80, 1.0)):
        cores = [torch.full((1, *shape), size) for shape, size in zip(shapes, sizes, strict=True)]
        assert not decomposition.contract(cores, 4, 8).any(), "float32 loses it"
        assert_bounds(case, cores)


def test_flushed_subnormals_are_covered() -> None:
    cores = [core.float() for core in random_cores(MPO, 1, seed=2)]
    cores[0] *= 2.0**-125
    cores[-1] *= 2.0**-10
    torch.set_flush_denormal(True)
    try:
        bound = found(MPO, cores)
    finally:
        torch.set_flush_denormal(False)
    assert bool((bound >= truth(MPO, cores) * (1 - oracles_error(MPO))).all())


@pytest.mark.parametrize("name", DECOMPOSITIONS)
def test_usual_cores_take_the_way_of_float32(name: str) -> None:
    case = Case(name, {}, 16, 1536)
    cores = [core.float() for core in random_cores(case, 1, seed=0)]
    dtypes = set()
    with at_contraction(name, lambda cores: dtypes.add(str(cores[0].dtype))):
        found(case, cores)
        assert dtypes == {"float32"}
        found(case, [core * 2.0**60 for core in cores])
    assert dtypes == {"float32", "float64"}
