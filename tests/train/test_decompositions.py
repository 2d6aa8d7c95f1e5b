"""Every decomposition's contraction and application against NumPy oracles."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loraover.overparam.decompositions import DECOMPOSITIONS

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


@given(data=st.data(), seed=SEEDS)
@cheap
def test_the_mpo_contraction_equals_tensorly(data: st.DataObject, seed: int) -> None:
    tensorly = pytest.importorskip("tensorly.tt_matrix", reason="tensorly is the second oracle of the MPO")
    case = data.draw(cases("mpo"))
    cores = random_cores(case, 1, seed)
    (natural,) = natural_cores(case, cores)
    foreign = torch.from_numpy(tensorly.tt_matrix_to_tensor(natural).reshape(1, case.m, case.n))
    assert within(contract(case, cores), foreign, contraction_bound(case, cores))
