"""Every decomposition's contraction and application against NumPy oracles."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from loraover.overparam.decompositions import DECOMPOSITIONS

from oracles.contraction import Array
from strategies import (
    OPTIONS,
    SEEDS,
    Case,
    cases,
    normal,
    random_cores,
)
from support.decomposition_cases import (
    DTYPES,
    ISOMETRIC,
    ORACLES,
    apply,
    centre,
    cheap,
    contract,
    contraction_bound,
    entries,
    every_decomposition,
    magnitude,
    natural_cores,
    oracle,
    replaced,
    within,
)
from tolerances import UNDERFLOW, UNIT, chain_terms, gamma


def test_every_decomposition_has_an_oracle_and_a_strategy() -> None:
    assert set(DECOMPOSITIONS) == set(ORACLES) == set(OPTIONS)


# Contraction and application


@every_decomposition
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(data=st.data(), group=st.integers(1, 3), seed=SEEDS)
@cheap
def test_contraction_equals_the_oracle(
    name: str, dtype: torch.dtype, data: st.DataObject, group: int, seed: int
) -> None:
    case = data.draw(cases(name))
    cores = [core.to(dtype) for core in random_cores(case, group, seed)]
    found = contract(case, cores)
    assert found.dtype == dtype
    assert within(found, oracle(case, cores), contraction_bound(case, cores))


@every_decomposition
@given(data=st.data(), seed=SEEDS)
@cheap
def test_float32_contraction_keeps_the_promised_bound(name: str, data: st.DataObject, seed: int) -> None:
    """gamma_k |C_1| ... |C_K| with the k that certificates use."""
    case = data.draw(cases(name))
    cores = [core.float() for core in random_cores(case, 2, seed)]
    shapes = case.decomposition.core_shapes(case.m, case.n)
    terms = case.decomposition.contraction_terms(case.m, case.n)
    # The last term is the oracle's own error.
    bound = gamma(terms, UNIT[torch.float32]) + gamma(2 * chain_terms(shapes), UNIT[torch.float64])
    assert within(contract(case, cores), oracle(case, cores), bound * magnitude(case, cores))


@every_decomposition
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(data=st.data(), group=st.integers(1, 3), tokens=st.integers(1, 4), seed=SEEDS, strided=st.booleans())
@cheap
def test_application_equals_the_product_with_the_oracle(
    name: str, dtype: torch.dtype, data: st.DataObject, group: int, tokens: int, seed: int, strided: bool
) -> None:
    case = data.draw(cases(name))
    cores = [core.to(dtype) for core in random_cores(case, group, seed)]
    x = normal(seed + 99, group, tokens, case.n).to(dtype)
    x = x.mT.contiguous().mT if strided else x
    found = apply(case, cores, x)
    # Applied core by core, a sum runs over a bond and a mode at once: no longer than the core has entries.
    terms = entries(case) + case.n
    relative = gamma(terms, UNIT[dtype]) + gamma(terms, UNIT[torch.float64])
    bound = 1.01 * relative * (x.double().abs() @ magnitude(case, cores).mT) + UNDERFLOW[dtype]
    assert found.dtype == dtype
    assert within(found, x.double() @ oracle(case, cores).mT, bound)


@every_decomposition
@pytest.mark.parametrize("shape", [(24, 36), (36, 24), (8, 576), (576, 8)], ids=str)
def test_application_does_not_form_the_matrix(name: str, shape: tuple[int, int]) -> None:
    case = Case(name, {}, *shape)
    cores = random_cores(case, 1, seed=0)
    with FlopCounterMode(display=False) as forming:
        contract(case, cores)
    with FlopCounterMode(display=False) as applying:
        apply(case, cores, normal(1, 1, 1, case.n))
    assert 0 < applying.get_total_flops() < forming.get_total_flops()


@every_decomposition
def test_application_to_no_token_gives_none(name: str) -> None:
    case = Case(name, {}, 4, 6)
    assert apply(case, random_cores(case, 2, seed=0), torch.zeros(2, 0, 6, dtype=torch.float64)).shape == (2, 0, 4)


@every_decomposition
@given(data=st.data(), seed=SEEDS, power=st.integers(-60, 60))
@cheap
def test_a_power_of_two_in_the_centre_scales_the_product_exactly(
    name: str, data: st.DataObject, seed: int, power: int
) -> None:
    case = data.draw(cases(name))
    cores, k = random_cores(case, 2, seed), centre(case)
    scaled = replaced(cores, k, cores[k] * 2.0**power)
    x = normal(seed + 50, 2, 3, case.n)
    assert torch.equal(contract(case, scaled), contract(case, cores) * 2.0**power)
    assert torch.equal(apply(case, scaled, x), apply(case, cores, x) * 2.0**power)


@every_decomposition
@given(data=st.data(), seed=SEEDS)
@cheap
def test_one_zero_core_gives_zero(name: str, data: st.DataObject, seed: int) -> None:
    case = data.draw(cases(name))
    cores = random_cores(case, 2, seed)
    for k, core in enumerate(cores):
        zeroed = replaced(cores, k, torch.zeros_like(core))
        assert not contract(case, zeroed).any()
        assert not apply(case, zeroed, normal(seed, 2, 3, case.n)).any()


def gauge(bond: int, rng: np.random.Generator) -> tuple[Array, Array]:
    """A random change of basis and its inverse, both exact: shears, a permutation and powers of two."""
    shear = np.eye(bond) + np.diag(rng.integers(-1, 2, size=bond - 1), k=-1)
    inverse = np.eye(bond)
    for i in range(1, bond):
        inverse[i] -= shear[i, i - 1] * inverse[i - 1]
    order, powers = rng.permutation(bond), 2.0 ** rng.integers(-2, 3, size=bond)
    change, back = shear[:, order] * powers, inverse[order] / powers[:, None]
    assert np.array_equal(change @ back, np.eye(bond))
    return change, back


def moved(cores: Sequence[Array], k: int, change: Array, back: Array) -> list[Array]:
    """Cores with a gauge change on the bond between k and k + 1."""
    left, right = cores[k] @ change, np.tensordot(back, cores[k + 1], axes=1)
    return [*cores[:k], left, right, *cores[k + 2 :]]


@pytest.mark.parametrize("name", ISOMETRIC)
@given(data=st.data(), seed=SEEDS)
@cheap
def test_a_gauge_change_on_any_bond_keeps_the_product(name: str, data: st.DataObject, seed: int) -> None:
    case = data.draw(cases(name))
    shapes = case.decomposition.core_shapes(case.m, case.n)
    cores = random_cores(case, 1, seed)
    (natural,) = natural_cores(case, cores)
    before = contract(case, cores)
    for k in range(len(cores) - 1):
        bond = natural[k].shape[-1]
        change, back = gauge(bond, np.random.default_rng(seed))
        after = moved(natural, k, change, back)
        unfolded = [torch.from_numpy(core.reshape(1, *shape)) for core, shape in zip(after, shapes, strict=True)]
        # |C_k| |T| |T^-1| |C_{k+1}| bounds both contractions and the two products with the gauge.
        largest = moved([np.abs(core) for core in natural], k, np.abs(change), np.abs(back))
        relative = 2 * gamma(chain_terms(shapes) + 2 * bond, UNIT[torch.float64])
        bound = torch.from_numpy(1.01 * relative * ORACLES[name](largest))
        assert within(contract(case, unfolded), before, bound)


@given(data=st.data(), seed=SEEDS)
@cheap
def test_a_diagonal_gauge_change_keeps_the_svd_product(data: st.DataObject, seed: int) -> None:
    """The bond of an SVD may be permuted and scaled; its centre has no room for more."""
    case = data.draw(cases("svd"))
    cores = random_cores(case, 1, seed)
    u, s, v = cores
    rng = np.random.default_rng(seed)
    order = torch.from_numpy(rng.permutation(s.shape[-1]))
    signs = torch.from_numpy(rng.choice([-1.0, 1.0], size=s.shape[-1]) * 2.0 ** rng.integers(-2, 3, size=s.shape[-1]))
    changed = [(u * signs)[:, :, order], (s / signs)[:, :, order], v[:, order]]
    assert within(contract(case, changed), contract(case, cores), contraction_bound(case, cores))


@given(data=st.data(), seed=SEEDS)
@cheap
def test_the_mpo_contraction_equals_tensorly(data: st.DataObject, seed: int) -> None:
    tensorly = pytest.importorskip("tensorly.tt_matrix", reason="tensorly is the second oracle of the MPO")
    case = data.draw(cases("mpo"))
    cores = random_cores(case, 1, seed)
    (natural,) = natural_cores(case, cores)
    foreign = torch.from_numpy(tensorly.tt_matrix_to_tensor(natural).reshape(1, case.m, case.n))
    assert within(contract(case, cores), foreign, contraction_bound(case, cores))
