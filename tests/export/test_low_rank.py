"""Products of factors, decomposed without being formed, against NumPy's SVD of the dense matrix."""

from __future__ import annotations

from decimal import Decimal, localcontext
from fractions import Fraction
from math import pi

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from loraover.adapters.numerics.low_rank import (
    concatenate,
    decompose,
    dense_svd,
    factor_noise,
    principal_angles,
    product_norm,
    rank_of_energy,
    singular_values,
    sum_norm,
)
from loraover.checkpoint.exact_tensors import Exact

from strategies import matrices, normal, sizes
from support.speed import examples
from tolerances import UNIT

Array = npt.NDArray[np.float64]
U = UNIT[torch.float64]


def dense(b: Tensor, a: Tensor) -> Array:
    product: Array = (b.numpy().astype(np.longdouble) @ a.numpy().astype(np.longdouble)).astype(np.float64)
    return product


def spectrum(matrix: Array) -> Array:
    values: Array = np.linalg.svd(matrix, compute_uv=False).astype(np.float64)
    return values


def oracle_error(m: int, n: int, r: int, b: Tensor, a: Tensor) -> float:
    """NumPy's own error: of the product, rounded to float64, and of its SVD, Higham 2002, chapter 19."""
    return 40 * max(m, n, r) * U * float(b.norm()) * float(a.norm())


@st.composite
def factors(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    m, n, r = draw(sizes()), draw(sizes()), draw(sizes())
    return draw(matrices(m, r))[0], draw(matrices(r, n))[0]


@examples(80)
@given(pair=factors(), rank=st.integers(1, 12))
def test_a_truncation_has_the_error_of_the_smallest_singular_values(pair: tuple[Tensor, Tensor], rank: int) -> None:
    b, a = pair
    (m, r), n = b.shape, a.shape[1]
    product, found = dense(b, a), decompose(b, a).truncate(rank)
    values, allowed = spectrum(product), oracle_error(m, n, r, b, a)
    kept = min(rank, m, n, r)
    assert found.b.shape == (m, kept)
    assert found.a.shape == (kept, n)
    assert abs(found.error - np.linalg.norm(values[kept:])) <= found.bound + allowed
    measured = float(np.linalg.norm(product - dense(found.b, found.a)))
    assert abs(measured - found.error) <= found.bound + allowed
    count = min(len(found.singular_values), len(values))
    assert np.abs(found.singular_values.numpy()[:count] - values[:count]).max() <= found.bound + allowed
    assert np.abs(singular_values(b, a).numpy()[:count] - values[:count]).max() <= 2 * found.bound + allowed
    # the bound is one of rounding: far below what one wrong singular value would be
    assert found.bound <= 1e-12 * float(b.norm() * a.norm()) + 1e-300


def root(square: Fraction) -> Decimal:
    with localcontext() as context:
        context.prec = 60
        return (Decimal(square.numerator) / Decimal(square.denominator)).sqrt()


@pytest.mark.parametrize("form", ["factors", "dense"])
@pytest.mark.parametrize("rank", [1, 2, 3, 4])
def test_the_bound_covers_exact_errors(rank: int, form: str) -> None:
    """Orthogonal columns of ones and minus ones: singular values are known, and errors by fractions, with no slack.

    B = H_8 diag(1, 1/3, 1/7, 1/13) of 8 x 4, A = H_4, so s_i = sqrt(8) sqrt(4) d_i. At rank 4 all is rounding.
    """
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    a, d = torch.kron(two, two), torch.tensor([1, 1 / 3, 1 / 7, 1 / 13], dtype=torch.float64)
    b = torch.kron(two, a)[:, :4] * d
    found = (
        decompose(b, a).truncate(rank) if form == "factors" else dense_svd(torch.from_numpy(dense(b, a))).truncate(rank)
    )
    fractions = np.vectorize(Fraction, otypes=[object])
    exact_b, exact_a, near_b, near_a = (fractions(x.numpy()) for x in (b, a, found.b, found.a))
    matrix = exact_b @ exact_a if form == "factors" else fractions(dense(b, a))
    left = matrix - near_b @ near_a
    error = abs(root((left * left).sum()) - Decimal(found.error))
    assert 0 < error <= Decimal(found.bound)
    assert rank < 4 or Decimal(found.bound) <= 200 * error
    least = root(sum((32 * Fraction(x) ** 2 for x in d[rank:].tolist()), Fraction()))
    assert abs(least - Decimal(found.error)) <= Decimal(found.bound)


@pytest.mark.parametrize("shape", [(40, 31, 8), (7, 90, 13), (5, 4, 9)])
@pytest.mark.parametrize("share", [0.3, 0.9, 0.999, 1 - 1e-9])
def test_the_rank_of_an_energy_is_the_smallest(shape: tuple[int, int, int], share: float) -> None:
    m, n, r = shape
    b, a = normal(1, m, r) * 2.0 ** -torch.arange(r), normal(2, r, n)
    squares = spectrum(dense(b, a)) ** 2
    kept = np.cumsum(squares) / squares.sum()
    rank = rank_of_energy(decompose(b, a).s, share)
    assert kept[rank - 1] >= share - 1e-12
    assert rank == 1 or kept[rank - 2] < share + 1e-12


@pytest.mark.parametrize("noise", [0.0, 1e-6])
@pytest.mark.parametrize("rank", [0, 1, 3])
def test_the_numerical_rank_is_that_of_what_is_more_than_rounding(rank: int, noise: float) -> None:
    b, a = normal(1, 30, max(rank, 1)), normal(2, max(rank, 1), 20)
    signs = torch.tensor([1.0, -1.0] if rank == 0 else [0.1, 0.7], dtype=torch.float64)
    wide_b, wide_a = torch.cat([sign * b for sign in signs], dim=1), torch.cat([a, a])
    more_b, more_a = noise * 1e-4 * normal(3, 30, 1), normal(4, 1, 20)
    svd = decompose(torch.cat([wide_b, more_b], dim=1), torch.cat([wide_a, more_a]))
    assert svd.numerical_rank(noise) == rank
    assert svd.numerical_rank() == rank + (noise > 0)


def test_factors_of_a_sum_and_norms() -> None:
    pairs = [(normal(k, 9, r), normal(10 + k, r, 11)) for k, r in enumerate((1, 4, 2))]
    total = sum(dense(b, a) for b, a in pairs)
    b, a = concatenate(pairs)
    assert np.abs(dense(b, a) - total).max() <= 100 * U * np.abs(total).max()
    for norm in (product_norm(b, a), sum_norm(pairs), decompose(b, a).norm):
        assert norm == pytest.approx(float(np.linalg.norm(total)), rel=1e-13)


def test_the_noise_of_factors_covers_their_errors() -> None:
    b, a, off_b, off_a = (normal(k, *shape).abs() for k, shape in enumerate([(9, 3), (3, 7), (9, 3), (3, 7)]))
    noise = factor_noise(Exact(b, 1e-3 * off_b, None), Exact(a, 1e-2 * off_a, None))
    change = np.linalg.norm(dense(b + 1e-3 * off_b, a + 1e-2 * off_a) - dense(b, a))
    assert change <= noise <= 20 * change


@examples(30)
@given(n=st.sampled_from([5, 13, 40]), p=st.integers(1, 5), q=st.integers(1, 5), seed=st.integers(0, 99))
def test_principal_angles_are_those_of_the_projections(n: int, p: int, q: int, seed: int) -> None:
    """The sine of each angle is a singular value of P - Q, of projections onto spaces of one size."""
    one, other = (np.linalg.qr(normal(seed + k, n, size).numpy())[0] for k, size in ((0, p), (100, q)))
    angles = principal_angles(torch.from_numpy(one), torch.from_numpy(other))
    cosines = np.linalg.svd(one.T @ other, compute_uv=False)
    assert len(angles) == min(p, q)
    assert np.abs(np.cos(angles) - cosines).max() < 1e-14
    assert angles == sorted(angles)


def test_small_and_right_angles_keep_their_digits() -> None:
    one = torch.eye(6, dtype=torch.float64)[:, :3]
    for angle in (0.0, 1e-12, 1e-7, 0.3, pi / 4, 1.2, pi / 2 - 1e-12, pi / 2):
        other = one.clone()
        other[:, 0] = torch.cos(torch.tensor(angle)) * one[:, 0].roll(0)
        other[0, 0], other[4, 0] = np.cos(angle), np.sin(angle)
        assert sorted([0.0, 0.0, angle]) == pytest.approx(principal_angles(one, other), abs=1e-15, rel=1e-10)


def test_a_large_dense_matrix_is_never_formed() -> None:
    """The dense matrix would take 8 TiB."""
    size = 2**20
    b, a = normal(1, size, 2), normal(2, 2, size)
    found = decompose(b, a).truncate(1)
    assert found.error > 0
    assert rank_of_energy(dense_svd(found.singular_values.diag()).s, 0.4) == 1
