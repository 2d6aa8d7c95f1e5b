"""Every decomposition's contraction and application against NumPy oracles, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loraover.common.errors import ConfigError, ShapeError
from loraover.overparam.decompositions import DECOMPOSITIONS, make_decomposition

from strategies import OPTIONS, SEEDS, Case, cases, normal, random_cores
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


# Refused


@every_decomposition
@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (1, 5)], ids=str)
def test_cores_of_a_wrong_shape_are_refused(name: str, shape: tuple[int, int]) -> None:
    case = Case(name, {}, *shape)
    cores = random_cores(case, 2, seed=0)
    x = normal(0, 2, 3, case.n)
    expected = str(list(case.decomposition.core_shapes(*shape)))
    wrong = [cores[:-1], [*cores, cores[-1]], [core[0] for core in cores]]
    for k, core in enumerate(cores):
        wrong.append(replaced(cores, k, torch.cat([core, core[:, :, :1]], dim=2)))
        wrong.append(replaced(cores, k, torch.cat([core, core[:, :1]], dim=1)))
        if core.shape[1] != core.shape[2]:
            wrong.append(replaced(cores, k, core.mT))
    for each in wrong:
        with pytest.raises(ShapeError, match=f"cores of a {case.m} x {case.n} matrix") as error:
            contract(case, each)
        assert expected in str(error.value)
        with pytest.raises(ShapeError, match=f"cores of a {case.m} x {case.n} matrix"):
            apply(case, each, x)


def test_an_unknown_decomposition_is_refused_with_the_choices() -> None:
    with pytest.raises(ConfigError, match=r"'tucker'.*mpo, svd, chain"):
        make_decomposition("tucker")


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("mpo", {}, "Mpo(num_cores=3, modes={}, bonds=None, expansion=None, gauge='identity')"),
        (
            "mpo",
            {"num_cores": 2, "modes": {"4": [2, 2], 3: (1, 3)}, "bonds": [5], "gauge": "random"},
            "Mpo(num_cores=2, modes={4: (2, 2), 3: (1, 3)}, bonds=(5,), expansion=None, gauge='random')",
        ),
        ("svd", {}, "Svd()"),
        ("chain", {"depth": 3, "expansion": 2}, "Chain(depth=3, expansion=2)"),
    ],
    ids=str,
)
def test_the_text_by_which_studies_know_a_decomposition_stays(
    name: str, options: dict[str, Any], expected: str
) -> None:
    assert repr(make_decomposition(name, options)) == expected


def test_a_thousand_faults_are_one_short_message() -> None:
    with pytest.raises(ConfigError, match="and 992 more") as error:
        make_decomposition("mpo", {"bonds": ["x"] * 1000})
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize(
    ("name", "options", "faults"),
    [
        (
            "mpo",
            {"num_cores": 3, "modes": {8: (3, 3, 1), 6: (2, 3)}, "bonds": (2,), "expansion": 0.5},
            ["modes[8] is (3, 3, 1)", "modes[6] is (2, 3)", "bonds is (2,)", "expansion is 0.5"],
        ),
        ("mpo", {"bonds": (16, 16), "expansion": 2}, ["bonds and expansion exclude each other"]),
        ("mpo", {"gauge": "qr"}, ["gauge is 'qr', but should be 'identity' or 'random'"]),
        ("mpo", {"num_cores": 1, "expansion": 2.0}, ["expansion needs num_cores of at least 2"]),
        ("mpo", {"num_cores": 2.5}, ["num_cores is 2.5"]),
        ("mpo", {"modes": {8: (2.0, 2.0, 2.0)}}, ["modes[8][0] is 2.0", "modes[8][2] is 2.0"]),
        ("mpo", {"bonds": (16.5, 16)}, ["bonds[0] is 16.5"]),
        ("mpo", {"expansion": True}, ["expansion is True"]),
        ("mpo", {"width": 2}, ["'width' is not an option; the options are num_cores, modes,"]),
        ("svd", {"width": 2}, ["'width' is not an option; there are none"]),
        ("svd", {"name": "svd"}, ["'name' is not an option"]),
        ("chain", {"depth": 1, "expansion": 0.5}, ["depth is 1", "expansion is 0.5"]),
        ("chain", {"depth": 2.5}, ["depth is 2.5"]),
        (
            "eigen",
            {"refresh": 0, "block": 5000},
            ["refresh is 0, but should be", "block is 5000, but should be"],
        ),
        ("eigen", {"growth": 0.5, "decay": 1.0}, ["growth is 0.5, but should be", "decay is 1.0, but should be less"]),
        ("eigen", {"short": "both"}, ["short is 'both', but should be 'gradient', 'calibration' or 'none'"]),
        ("eigen", {"second_moments": "squared"}, ["second_moments is 'squared', but should be 'kept' or 'carried'"]),
        ("eigen", {"train_auxiliary": True}, ["train_auxiliary needs bases that do not follow gradients"]),
    ],
    ids=str,
)
def test_every_fault_of_the_options_is_listed(name: str, options: dict[str, Any], faults: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        make_decomposition(name, options)
    message = str(error.value)
    assert message.startswith(f"{name}: ")
    assert [fault for fault in faults if fault not in message] == []
