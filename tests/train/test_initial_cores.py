"""Initial cores of every decomposition: they contract to the matrix, in a gauge that is promised, from a seed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from loraover.overparam.decompositions import make_decomposition
from loraover.overparam.decompositions.base import random_coisometry

from oracles.contraction import chain_matrix, mpo_left_part, mpo_right_part
from strategies import LORA_SHAPES, SEEDS, Case, cases, generators, matrices, normal
from support.decomposition_cases import (
    centre,
    cheap,
    contract,
    contraction_bound,
    every_decomposition,
    init,
    magnitude,
    natural_cores,
    oracle,
    within,
)
from tolerances import UNDERFLOW, UNIT, chain_terms, gamma, isometry_error, round_trip_error

EDGE_SHAPES = [(1, 1), (1, 7), (13, 1), (7, 5), (31, 576), (97, 2)]


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
    trained = case.decomposition.trained(case.m, case.n)
    sizes_of_cores = [core[0].numel() for core in cores]
    assert case.decomposition.num_parameters(case.m, case.n) == sum(sizes_of_cores[k] for k in trained)


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
    """But for eigen, which begins with identities."""
    case = Case(name, {"gauge": "random"} if name == "mpo" else {}, 6, 8)
    zero = torch.zeros(1, 6, 8, dtype=torch.float64)
    first, again, other = init(case, zero, 1), init(case, zero, 1), init(case, zero, 2)
    for k in range(len(first)):
        assert torch.equal(first[k], again[k])
        assert k == centre(case) or name == "eigen" or not within(first[k], other[k], 0.01)


@every_decomposition
def test_initialisation_leaves_the_global_generator_alone(name: str) -> None:
    case, before = Case(name, {}, 6, 8), torch.get_rng_state()
    init(case, torch.zeros(1, 6, 8, dtype=torch.float64), 1)
    assert torch.equal(torch.get_rng_state(), before)


def test_random_coisometries_have_no_preferred_sign() -> None:
    """A Householder QR without its sign fix gives a diagonal of one sign; Haar draws have mean 0, variance 1/n."""
    draws = torch.stack([random_coisometry(generator, 4, 4) for generator in generators(0, 400)])
    # Five standard errors; E q^4 = 3 / (n (n + 2)) makes q^2's variance 1/16.
    assert draws.mean(dim=0).abs().max() <= 5 * (1 / 4 / 400) ** 0.5
    assert (draws.square().mean(dim=0) - 1 / 4).abs().max() <= 5 * (1 / 16 / 400) ** 0.5
