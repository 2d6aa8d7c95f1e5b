"""Bounds of how far two machines' float32 factorisations are apart, on matrices whose factors are known."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraover.adapters.convert.methods.single_precision import basis_error, part_error

from tolerances import UNIT

Array = npt.NDArray[np.float64]
U = UNIT[torch.float32]


def part(matrix: Array, cut: int, tail: bool) -> Array:
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    kept = slice(cut, None) if tail else slice(cut)
    found: Array = (u[:, kept] * s[kept]) @ vt[kept]
    return found


ELEMENT = 20 * U
"""Largest element of E in the singular vectors, relative to the largest singular value."""


@pytest.mark.parametrize("tail", [False, True])
@pytest.mark.parametrize("gap", [1e-4, 1e-3, 1e-2, 0.1])
def test_the_bound_is_attained(gap: float, tail: bool) -> None:
    """Elements of E that all have the largest size turn the singular vectors of diag(1, 1 - gap) the most."""
    before, change = np.diag([1, 1 - gap]), ELEMENT * np.ones((2, 2))
    truth = float(np.linalg.norm(part(before + change, 1, tail) - part(before, 1, tail)))
    bound = part_error(torch.tensor([1, 1 - gap], dtype=torch.float64), (2, 2), 1, tail=tail)
    assert truth <= bound <= (1 + 8 * ELEMENT / gap) * truth


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(0, 3), st.booleans(), st.booleans(), st.integers(0, 2**32 - 1), st.data())
def test_no_matrix_of_such_elements_moves_the_part_farther(
    size: int, wider: int, transposed: bool, tail: bool, seed: int, data: st.DataObject
) -> None:
    """E has elements up to `ELEMENT` in the singular vectors; gaps are from none to wide, and parts of all sizes."""
    gaps = data.draw(st.lists(st.sampled_from([0.0, 1e-6, 1e-5, 1e-4, 1e-2]), min_size=size - 1, max_size=size - 1))
    cut = data.draw(st.integers(0, size))
    s = 1 - np.cumsum([0.0, *gaps])
    before = np.zeros((size, size + wider))
    before[:, :size] = np.diag(s)
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], before.shape)
    moved = part(before + ELEMENT * signs, cut, tail) - part(before, cut, tail)
    shape = before.T.shape if transposed else before.shape
    assert np.linalg.norm(moved) <= part_error(torch.from_numpy(s), shape, cut, tail=tail) + 1e-14


@pytest.mark.parametrize("tail", [False, True])
def test_where_singular_values_coincide_only_what_turns_is_lost(tail: bool) -> None:
    """Turned by a quarter, s u v^T of two equal singular values s moves by sqrt(2) s, and no farther."""
    s = torch.tensor([1.0, 0.1, 0.1, 0.01], dtype=torch.float64)
    assert part_error(s, (4, 4), 2, tail=tail) == pytest.approx(math.sqrt(2) * 0.1, rel=1e-3)
    assert part_error(s, (4, 4), 1, tail=tail) < 1e-5
    assert part_error(torch.ones(4), (4, 4), 4) < 1e-5  # nothing is cut
    assert part_error(torch.ones(4), (4, 4), 0, tail=True) < 1e-5
    assert part_error(torch.zeros(4), (4, 4), 2) == 0


@pytest.mark.parametrize("height", [1e-3, 0.1])
def test_a_basis_turns_as_its_columns_become_dependent(height: float) -> None:
    """The second column of [[1, 1], [0, h], [0, e]] is that of Q turned by e / h; sigma_2 is about h / sqrt(2)."""
    e = 4 * math.sqrt(2) * U * math.sqrt(2 + height**2)
    before = np.array([[1.0, 1.0], [0.0, height], [0.0, 0.0]])
    after = before + np.array([[0.0, 0.0], [0.0, 0.0], [0.0, e]])
    bases = [(found.Q * np.sign(np.diag(found.R))) for found in map(np.linalg.qr, (before, after))]
    truth = float(np.linalg.norm(bases[1] - bases[0]))
    assert truth <= basis_error(torch.from_numpy(np.linalg.qr(before).R)) <= 2.1 * truth
    assert basis_error(torch.tensor([[1.0, 1.0], [0.0, 1e-7]])) == math.inf
