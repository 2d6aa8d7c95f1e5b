"""Every decomposition against NumPy oracles, and the properties that each one promises."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import prod
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from loraover.common.errors import ConfigError, ShapeError
from loraover.overparam.decompositions import DECOMPOSITIONS, Mpo, make_decomposition
from loraover.overparam.decompositions.base import random_coisometry

from oracles.contraction import Array, chain_matrix, mpo_left_part, mpo_matrix, mpo_right_part, svd_matrix
from strategies import (
    LORA_SHAPES,
    OPTIONS,
    SEEDS,
    Case,
    cases,
    generators,
    matrices,
    normal,
    random_cores,
)
from support.speed import examples
from tolerances import UNDERFLOW, UNIT, chain_terms, gamma, isometry_error, round_trip_error

ORACLES: dict[str, Callable[[Sequence[Array]], Array]] = {
    "mpo": mpo_matrix,
    "svd": svd_matrix,
    "chain": chain_matrix,
}
ISOMETRIC = ("mpo", "chain")  # decompositions whose auxiliary cores contract to isometries
EDGE_SHAPES = [(1, 1), (1, 7), (13, 1), (7, 5), (31, 576), (97, 2)]
DTYPES = [torch.float64, torch.float32]

every_decomposition = pytest.mark.parametrize("name", DECOMPOSITIONS)
cheap = examples(40)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Use one thread: with tiny matrices, PyTorch's and NumPy's thread pools take turns in spinning (80 s, not 10)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def natural_cores(case: Case, cores: Sequence[Tensor]) -> list[list[Array]]:
    """Each matrix's cores as float64 arrays in the shapes that the oracles want."""
    decomposition = case.decomposition
    shapes: list[tuple[int, ...]] = list(decomposition.core_shapes(case.m, case.n))
    if isinstance(decomposition, Mpo):
        layout = decomposition.layout(case.m, case.n)
        shapes = [layout.core(k) for k in range(len(shapes))]
    grouped = [core.detach().double().numpy() for core in cores]
    return [[core[g].reshape(shape) for core, shape in zip(grouped, shapes, strict=True)] for g in range(len(cores[0]))]


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
    return case.decomposition.contract(cores, case.m, case.n)


def apply(case: Case, cores: Sequence[Tensor], x: Tensor) -> Tensor:
    return case.decomposition.apply(cores, x, case.m, case.n)


def init(case: Case, group: Tensor, seed: int) -> tuple[Tensor, ...]:
    return case.decomposition.init(group, generators(seed, len(group)))


def centre(case: Case) -> int:
    return case.decomposition.centre(case.m, case.n)


def replaced(cores: Sequence[Tensor], k: int, core: Tensor) -> list[Tensor]:
    return [*cores[:k], core, *cores[k + 1 :]]


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
    terms = case.decomposition.num_parameters(case.m, case.n) + case.n
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
@given(data=st.data(), seed=SEEDS)
@cheap
def test_gradients_agree_between_application_and_contraction(name: str, data: st.DataObject, seed: int) -> None:
    case = data.draw(cases(name))
    cores = random_cores(case, 2, seed)
    x, weight = normal(seed + 50, 2, 3, case.n), normal(seed + 51, 2, 3, case.m)

    def gradients(form: bool, absolute: bool) -> tuple[Tensor, ...]:
        leaves = [(core.abs() if absolute else core).clone().requires_grad_() for core in cores]
        inputs, outputs = (x.abs(), weight.abs()) if absolute else (x, weight)
        y = inputs @ contract(case, leaves).mT if form else apply(case, leaves, inputs)
        return torch.autograd.grad((y * outputs).sum(), leaves)

    terms = case.decomposition.num_parameters(case.m, case.n) + 3 + case.m + case.n
    relative = 2 * gamma(terms, UNIT[torch.float64])
    triples = zip(gradients(False, False), gradients(True, False), gradients(True, True), strict=True)
    for applied, formed, bound in triples:
        assert within(applied, formed, 1.01 * relative * bound)


@every_decomposition
@given(data=st.data(), seed=SEEDS)
@cheap
def test_a_group_contracts_and_applies_like_each_alone(name: str, data: st.DataObject, seed: int) -> None:
    case = data.draw(cases(name))
    cores = random_cores(case, 3, seed)
    x = normal(seed + 50, 3, 2, case.n)
    together, applied = contract(case, cores), apply(case, cores, x)
    bound = contraction_bound(case, cores)
    terms = case.decomposition.num_parameters(case.m, case.n) + case.n
    apply_bound = 2.02 * gamma(terms, UNIT[torch.float64]) * (x.abs() @ magnitude(case, cores).mT)
    for g in range(3):
        alone = [core[g : g + 1] for core in cores]
        assert within(contract(case, alone)[0], together[g], bound[g])
        assert within(apply(case, alone, x[g : g + 1])[0], applied[g], apply_bound[g])


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


# Initialisation


@every_decomposition
@given(data=st.data(), seed=SEEDS)
@cheap
def test_initial_cores_contract_to_the_matrix(name: str, data: st.DataObject, seed: int) -> None:
    case = data.draw(cases(name))
    check_round_trip(case, data.draw(matrices(case.m, case.n)), seed)


@every_decomposition
@pytest.mark.parametrize("shape", EDGE_SHAPES + LORA_SHAPES, ids=str)
def test_initial_cores_contract_to_a_matrix_of_a_real_size(name: str, shape: tuple[int, int]) -> None:
    check_round_trip(Case(name, {}, *shape), normal(3, 1, *shape), seed=4)


@every_decomposition
def test_a_tiny_matrix_is_not_taken_for_zero(name: str) -> None:
    check_round_trip(Case(name, {}, 4, 6), normal(3, 2, 4, 6) * 2.0**-200, seed=4)


def check_round_trip(case: Case, group: Tensor, seed: int) -> None:
    cores = init(case, group, seed)
    shapes = case.decomposition.core_shapes(case.m, case.n)
    error = round_trip_error(shapes, centre(case)) * group.norm(dim=(1, 2), keepdim=True)
    assert within((contract(case, cores) - group).norm(dim=(1, 2), keepdim=True), torch.zeros_like(error), error)
    assert within(oracle(case, cores), contract(case, cores), contraction_bound(case, cores))
    narrow = [core.float() for core in cores]
    # Storing K cores in float32 is one more rounding each.
    relative = gamma(chain_terms(shapes) + len(cores), UNIT[torch.float32])
    bound = 1.01 * relative * magnitude(case, cores) + error + UNDERFLOW[torch.float32]
    assert within(contract(case, narrow), group, bound)


@every_decomposition
@given(data=st.data(), seed=SEEDS)
@cheap
def test_cores_are_the_unfoldings_that_are_declared(name: str, data: st.DataObject, seed: int) -> None:
    case = data.draw(cases(name))
    group = data.draw(matrices(case.m, case.n))
    cores = init(case, group, seed)
    shapes = case.decomposition.core_shapes(case.m, case.n)
    assert [core.shape for core in cores] == [(len(group), *shape) for shape in shapes]
    assert all(core.dtype == torch.float64 and core.is_contiguous() for core in cores)
    assert 0 <= centre(case) < len(cores)
    sizes_of_cores = sum(core[0].numel() for core in cores)
    assert case.decomposition.num_parameters(case.m, case.n) == sizes_of_cores


@every_decomposition
@given(data=st.data(), seed=SEEDS)
@cheap
def test_a_zero_matrix_has_a_zero_centre_among_isometries(name: str, data: st.DataObject, seed: int) -> None:
    case = data.draw(cases(name))
    cores, k = init(case, torch.zeros(1, case.m, case.n, dtype=torch.float64), seed), centre(case)
    assert not cores[k].any()
    assert not contract(case, cores).any()
    for core in [*cores[:k], *cores[k + 1 :]]:
        # Isometries: no row, or no column, is zero, whichever side is the shorter.
        assert core.any(dim=-1 if core.shape[-2] <= core.shape[-1] else -2).all()


@every_decomposition
@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (5, 1), (2, 3), (4, 6), (6, 4), (5, 5)], ids=str)
@pytest.mark.parametrize("value", ["zero", "dense"])
def test_the_gradient_of_the_centre_is_alive_and_right(name: str, shape: tuple[int, int], value: str) -> None:
    """d<G, M>/dC, entry by entry: M is linear in the centre, so the oracle's answer is <G, M(unit core)>."""
    case = Case(name, {}, *shape)
    matrix = normal(1, 1, *shape) * (0.0 if value == "zero" else 1.0)
    cores, k = init(case, matrix, seed=2), centre(case)
    leaves = [core.clone().requires_grad_() for core in cores]
    weight = normal(3, 1, *shape)
    gradients = torch.autograd.grad((contract(case, leaves) * weight).sum(), leaves)

    expected, bound = torch.zeros_like(cores[k]), torch.zeros_like(cores[k])
    for i in range(cores[k].numel()):
        unit = torch.zeros_like(cores[k])
        unit.view(-1)[i] = 1
        expected.view(-1)[i] = (oracle(case, replaced(cores, k, unit)) * weight).sum()
        bound.view(-1)[i] = (magnitude(case, replaced(cores, k, unit)) * weight.abs()).sum()
    terms = chain_terms(case.decomposition.core_shapes(*shape)) + prod(shape)
    assert within(gradients[k], expected, 2.02 * gamma(terms, UNIT[torch.float64]) * bound)
    assert gradients[k].norm() > 1e-3 * weight.norm()
    if value == "zero":
        assert not any(gradient.any() for j, gradient in enumerate(gradients) if j != k)


@pytest.mark.parametrize("name", ISOMETRIC)
@given(data=st.data(), seed=SEEDS, rate=st.sampled_from([1.0, 0.1, 2.0**-10]))
@cheap
def test_the_first_step_on_the_centre_moves_the_matrix_by_the_step(
    name: str, data: st.DataObject, seed: int, rate: float
) -> None:
    case = data.draw(cases(name))
    matrix = data.draw(matrices(case.m, case.n))
    cores, k = init(case, matrix, seed), centre(case)
    before = contract(case, cores).clone()  # a lone core would be stepped under its view
    weight, leaf = normal(seed, *before.shape), cores[k].clone().requires_grad_()
    (leaf.grad,) = torch.autograd.grad((contract(case, replaced(cores, k, leaf)) * weight).sum(), leaf)
    torch.optim.SGD([leaf], lr=rate).step()
    after = contract(case, replaced(cores, k, leaf.detach()))
    # The gradient's way out and back is the round trip of `weight`; the rest is two contractions' rounding.
    error = round_trip_error(case.decomposition.core_shapes(case.m, case.n), k)
    bound = error * (rate * weight.norm() + 2 * before.norm())
    assert float((before - after - rate * weight).norm()) <= bound


@given(data=st.data(), seed=SEEDS)
@cheap
def test_the_mpo_is_in_mixed_canonical_gauge(data: st.DataObject, seed: int) -> None:
    """P P^T = I left of the centre, Q Q^T = I right of it, and the centre is P^T M Q."""
    case = data.draw(cases("mpo"))
    matrix, k = normal(seed, 1, case.m, case.n), centre(case)
    (cores,) = natural_cores(case, init(case, matrix, seed))
    error = sum(isometry_error(*shape) for shape in case.decomposition.core_shapes(case.m, case.n))
    left, right = np.ones((1, 1, 1)), mpo_right_part(cores[k + 1 :])
    if k > 0:
        left = mpo_left_part(cores[:k])
        p = left.reshape(-1, left.shape[-1])
        assert np.linalg.norm(p @ p.T - np.eye(len(p))) <= error
    q = right.reshape(len(right), -1).T
    assert np.linalg.norm(q @ q.T - np.eye(len(q))) <= error
    tensor = (
        matrix[0].numpy().reshape(left.shape[0], -1, right.shape[1], left.shape[1], cores[k].shape[2], right.shape[2])
    )
    expected = np.einsum("abp,acdbef,qdf->pceq", left, tensor, right, optimize=True)
    difference = float(np.linalg.norm(cores[k] - expected))
    assert difference <= round_trip_error(case.decomposition.core_shapes(case.m, case.n), k) * float(matrix.norm())


@given(data=st.data(), seed=SEEDS)
@cheap
def test_the_chain_is_an_isometry_beside_the_centre(data: st.DataObject, seed: int) -> None:
    """P P^T = I for the auxiliary product on the shorter side, and C = P^T M or M P."""
    case = data.draw(cases("chain"))
    matrix, k = normal(seed, 1, case.m, case.n), centre(case)
    (cores,) = natural_cores(case, init(case, matrix, seed))
    shapes = case.decomposition.core_shapes(case.m, case.n)
    p = chain_matrix(cores[:-1]) if case.m <= case.n else chain_matrix(cores[1:]).T
    error = sum(isometry_error(*shape) for shape in shapes)
    assert np.linalg.norm(p @ p.T - np.eye(min(case.m, case.n))) <= error
    expected = p.T @ matrix[0].numpy() if case.m <= case.n else matrix[0].numpy() @ p
    assert np.linalg.norm(cores[k] - expected) <= round_trip_error(shapes, k) * float(matrix.norm())


@given(data=st.data(), seed=SEEDS)
@cheap
def test_the_svd_holds_singular_values(data: st.DataObject, seed: int) -> None:
    case = data.draw(cases("svd"))
    group = data.draw(matrices(case.m, case.n))
    u, s, v = init(case, group, seed)
    k = min(case.m, case.n)
    error = isometry_error(case.m, k) + isometry_error(k, case.n)
    assert within(u.mT @ u, torch.eye(k).expand(len(group), k, k), error)
    assert within(v @ v.mT, torch.eye(k).expand(len(group), k, k), error)
    # Weyl: computed singular values are those of a matrix within the round-trip error.
    expected = torch.from_numpy(np.linalg.svd(group.numpy(), compute_uv=False)).unsqueeze(1)
    bound = 2 * round_trip_error(case.decomposition.core_shapes(case.m, case.n), 1)
    assert within(s, expected, bound * group.norm(dim=(1, 2), keepdim=True))


# Random draws


@every_decomposition
@given(data=st.data(), seed=SEEDS)
@cheap
def test_cores_do_not_depend_on_the_grouping(name: str, data: st.DataObject, seed: int) -> None:
    case = data.draw(cases(name))
    group = normal(seed, 3, case.m, case.n)
    group[1] = 0
    together = case.decomposition.init(group, generators(seed, 3))
    order = [2, 0, 1]
    shuffled = case.decomposition.init(group[order], [generators(seed, 3)[g] for g in order])
    for position, g in enumerate(order):
        alone = case.decomposition.init(group[g : g + 1], [generators(seed, 3)[g]])
        for k in range(len(together)):
            # Half the digits: other draws differ in the first one, the same draws in the last few. Signs may be
            # swapped in pairs by a rounding; the next test is about that.
            assert within(together[k][g].abs(), alone[k][0].abs(), 2.0**-26)
            assert within(shuffled[k][position].abs(), alone[k][0].abs(), 2.0**-26)


@every_decomposition
@pytest.mark.parametrize("shape", [(7, 5), (9, 9), (13, 13), (24, 36), (8, 576)], ids=str)
def test_cores_are_bitwise_the_same_in_every_grouping(name: str, shape: tuple[int, int]) -> None:
    """LAPACK rounds an odd-sized matrix by where it lies in memory, and an SVD may even swap its signs by that."""
    decomposition, group = make_decomposition(name), normal(456, 3, *shape)
    together = decomposition.init(group, generators(456, 3))
    for g in range(3):
        alone = decomposition.init(group[g : g + 1], [generators(456, 3)[g]])
        assert [torch.equal(a[g], b[0]) for a, b in zip(together, alone, strict=True)] == [True] * len(alone)


@every_decomposition
def test_another_seed_gives_other_cores_and_the_same_seed_the_same(name: str) -> None:
    case = Case(name, {"gauge": "random"} if name == "mpo" else {}, 6, 8)
    zero = torch.zeros(1, 6, 8, dtype=torch.float64)
    first, again, other = init(case, zero, 1), init(case, zero, 1), init(case, zero, 2)
    for k in range(len(first)):
        assert torch.equal(first[k], again[k])
        assert k == centre(case) or not within(first[k], other[k], 0.01)


@every_decomposition
def test_initialisation_leaves_the_global_generator_alone(name: str) -> None:
    case, before = Case(name, {}, 6, 8), torch.get_rng_state()
    init(case, torch.zeros(1, 6, 8, dtype=torch.float64), 1)
    assert torch.equal(torch.get_rng_state(), before)


@given(rows=st.integers(1, 20), extra=st.integers(0, 20), seed=SEEDS)
@cheap
def test_random_coisometries_have_orthonormal_rows(rows: int, extra: int, seed: int) -> None:
    p = random_coisometry(generators(seed, 1)[0], rows, rows + extra)
    assert p.shape == (rows, rows + extra)
    assert within(p @ p.mT, torch.eye(rows), isometry_error(rows, rows + extra))


def test_random_coisometries_have_no_preferred_sign() -> None:
    """A Householder QR without its sign fix gives a diagonal of one sign; Haar draws have mean 0, variance 1/n."""
    draws = torch.stack([random_coisometry(generator, 4, 4) for generator in generators(0, 400)])
    # Five standard errors; E q^4 = 3 / (n (n + 2)) makes q^2's variance 1/16.
    assert draws.mean(dim=0).abs().max() <= 5 * (1 / 4 / 400) ** 0.5
    assert (draws.square().mean(dim=0) - 1 / 4).abs().max() <= 5 * (1 / 16 / 400) ** 0.5


# Faults


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


@every_decomposition
def test_an_unknown_option_is_refused_by_name(name: str) -> None:
    for option in ("width", "name"):
        with pytest.raises(ConfigError, match=rf"{name}: '{option}' is not an option"):
            make_decomposition(name, {option: name})


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("mpo", {}, "Mpo(num_cores=3, modes={}, bonds=None, expansion=None, gauge='identity')"),
        ("mpo", {"expansion": 2}, "Mpo(num_cores=3, modes={}, bonds=None, expansion=2, gauge='identity')"),
        (
            "mpo",
            {"num_cores": 2, "modes": {"4": [2, 2], 3: (1, 3)}, "bonds": [5], "gauge": "random"},
            "Mpo(num_cores=2, modes={4: (2, 2), 3: (1, 3)}, bonds=(5,), expansion=None, gauge='random')",
        ),
        ("svd", {}, "Svd()"),
        ("chain", {}, "Chain(depth=2, expansion=2.0)"),
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
        ("mpo", {"num_cores": 0, "expansion": float("nan")}, ["num_cores is 0", "expansion is nan"]),
        ("mpo", {"gauge": "qr"}, ["gauge is 'qr' and should be 'identity' or 'random'"]),
        ("mpo", {"num_cores": 1, "expansion": 2.0}, ["expansion needs num_cores of at least 2"]),
        ("mpo", {"expansion": float("inf")}, ["expansion is inf"]),
        ("mpo", {"modes": {8: (-2, -2, 2)}}, ["modes[8] is (-2, -2, 2)"]),
        ("mpo", {"modes": {8: ()}}, ["modes[8] is ()"]),
        ("chain", {"depth": 1, "expansion": 0.5}, ["depth is 1", "expansion is 0.5"]),
        ("chain", {"depth": 0, "expansion": 2000}, ["depth is 0", "expansion is 2000"]),
        ("chain", {"expansion": float("nan")}, ["expansion is nan"]),
    ],
)
def test_every_fault_of_the_options_is_listed(name: str, options: dict[str, Any], faults: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        make_decomposition(name, options)
    message = str(error.value)
    assert message.startswith(f"{name}: ")
    assert [fault for fault in faults if fault not in message] == []


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mpo", {"num_cores": 2.5}),
        ("mpo", {"num_cores": "3"}),
        ("mpo", {"num_cores": 0, "modes": {1: ()}}),
        ("mpo", {"modes": {"eight": (2, 2, 2)}}),
        ("mpo", {"modes": {8: (2.0, 2.0, 2.0)}}),
        ("mpo", {"bonds": ("a", "b")}),
        ("mpo", {"bonds": (16.5, 16)}),
        ("mpo", {"bonds": "ab"}),
        ("mpo", {"expansion": "2"}),
        ("mpo", {"expansion": True}),
        ("mpo", {"gauge": ["random"]}),
        ("chain", {"depth": 2.5}),
        ("chain", {"expansion": "2"}),
    ],
    ids=str,
)
def test_an_option_of_the_wrong_type_is_refused_when_it_is_given(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        make_decomposition(name, options)


# The comparison with the oracle can fail


def mutants(case: Case, cores: list[Array]) -> dict[str, Array]:
    """Wrong matrices from the right cores of a square matrix: what plausible mistakes would give."""
    wrong = {}
    matrix = ORACLES[case.name]
    for k, core in enumerate(cores):
        transposed = core.swapaxes(1, 2) if core.ndim == 4 else core.T
        if transposed.shape == core.shape and not np.array_equal(transposed, core):
            wrong[f"core {k} transposed"] = matrix([*cores[:k], transposed, *cores[k + 1 :]])
        wrong[f"core {k} scaled"] = matrix([*cores[:k], core * (1 + 2.0**-20), *cores[k + 1 :]])
    wrong["transposed"] = matrix(cores).T
    if case.name == "svd":
        wrong["without its scaling"] = matrix([cores[0], np.ones_like(cores[1]), cores[2]])
    if case.name == "chain":
        wrong["in reverse order"] = matrix(cores[::-1])
    if case.name == "mpo":
        modes = [size for core in cores for size in core.shape[1:3]]
        interleaved = matrix(cores).reshape([*modes[::2], *modes[1::2]])
        count = len(cores)
        wrong["with modes interleaved"] = interleaved.transpose(
            [axis for k in range(count) for axis in (k, count + k)]
        ).reshape(case.m, case.n)
    return wrong


@every_decomposition
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_oracle_comparison_rejects_mutants(name: str, dtype: torch.dtype) -> None:
    options = {"chain": {"depth": 3, "expansion": 1.0}}.get(name, {})
    case = Case(name, options, 8, 8)
    cores = [core.to(dtype) for core in random_cores(case, 1, seed=0)]
    found, bound = contract(case, cores), contraction_bound(case, cores)
    assert within(found, oracle(case, cores), bound)
    (natural,) = natural_cores(case, cores)
    rejected = mutants(case, natural)
    if dtype == torch.float32:  # there a factor 1 + 2^-20 is within rounding
        rejected = {mutant: matrix for mutant, matrix in rejected.items() if "scaled" not in mutant}
    assert len(rejected) >= 4
    for mutant, matrix in rejected.items():
        assert not within(found, torch.from_numpy(matrix.copy()).unsqueeze(0), bound), mutant


@given(data=st.data(), seed=SEEDS)
@cheap
def test_the_mpo_contraction_equals_tensorly(data: st.DataObject, seed: int) -> None:
    tensorly = pytest.importorskip("tensorly.tt_matrix", reason="tensorly is the second oracle of the MPO")
    case = data.draw(cases("mpo"))
    cores = random_cores(case, 1, seed)
    (natural,) = natural_cores(case, cores)
    foreign = torch.from_numpy(tensorly.tt_matrix_to_tensor(natural).reshape(1, case.m, case.n))
    assert within(contract(case, cores), foreign, contraction_bound(case, cores))


def test_given_bonds_may_be_wider_than_full() -> None:
    case = Case("mpo", {"modes": {4: (2, 2, 1), 6: (1, 2, 3)}, "bonds": (5, 4)}, 4, 6)
    mpo = case.decomposition
    assert isinstance(mpo, Mpo)
    layout = mpo.layout(4, 6)
    assert [layout.core(k) for k in range(3)] == [(1, 2, 1, 5), (5, 2, 2, 4), (4, 1, 3, 1)]
    check_round_trip(case, normal(0, 2, 4, 6), seed=1)
