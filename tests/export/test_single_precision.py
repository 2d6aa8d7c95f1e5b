"""Bounds of how far two machines' float32 factorizations are apart, on matrices whose factors are known."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from loraover_export.numerics.single_precision import basis_error, part_error, smallest_gap

from strategies import normal
from tolerances import UNIT

Array = npt.NDArray[np.float64]
U = UNIT[torch.float32]


def part(matrix: Array, cut: int, tail: bool) -> Array:
    u, s, vt = np.linalg.svd(matrix)
    kept = slice(cut, None) if tail else slice(cut)
    found: Array = (u[:, kept] * s[kept]) @ vt[kept]
    return found


@pytest.mark.parametrize("tail", [False, True])
@pytest.mark.parametrize("gap", [1e-3, 1e-2, 0.1])
def test_the_bound_is_attained(gap: float, tail: bool) -> None:
    """diag(1, 1 - gap) + e [[0, 1], [1, 0]] turns both singular vectors as far as any E of norm e can."""
    e = 20 * math.sqrt(2) * U
    before, change = np.diag([1, 1 - gap]), e * np.array([[0.0, 1.0], [1.0, 0.0]])
    truth = float(np.linalg.norm(part(before + change, 1, tail) - part(before, 1, tail)))
    bound = part_error(torch.tensor([1, 1 - gap], dtype=torch.float64), 1, tail=tail)
    assert truth <= bound <= (1 + 8 * e / gap) * truth


def known(m: int, n: int, cut: int, gap: float) -> Tensor:
    """A float32 matrix with singular values from 1 to 0.05, of which two neighbours differ by `gap`."""
    p = min(m, n)
    left, right = (torch.linalg.qr(normal(seed, size, p)).Q for seed, size in ((1, m), (2, n)))
    s = torch.linspace(1, 0.05, p, dtype=torch.float64)
    s[cut:] -= s[cut] - s[cut - 1] + gap
    found: Tensor = (left * s) @ right.mT
    return found.float()


def elsewhere(matrix: Tensor, cut: int, tail: bool, seed: int) -> tuple[Tensor, Tensor]:
    """The part, and all singular values, from rows and columns in another order, so that all sums round otherwise."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = (torch.randperm(size, generator=generator) for size in matrix.shape)
    u, s, vt = torch.linalg.svd(matrix[rows][:, columns], full_matrices=False)
    kept = slice(cut, None) if tail else slice(cut)
    found = torch.empty(matrix.shape, dtype=torch.float64)
    found[rows[:, None], columns] = (u[:, kept].double() * s[kept].double()) @ vt[kept].double()
    return found, s


@pytest.mark.parametrize("tail", [False, True])
@pytest.mark.parametrize(("shape", "cut"), [((34, 34), 3), ((53, 34), 17), ((96, 160), 8)])
@pytest.mark.parametrize("gap", [2e-4, 1e-2])
def test_no_order_of_sums_is_farther(shape: tuple[int, int], cut: int, gap: float, tail: bool) -> None:
    matrix = known(*shape, cut, gap)
    first, s = elsewhere(matrix, cut, tail, 0)
    apart = max(float((elsewhere(matrix, cut, tail, seed)[0] - first).norm()) for seed in range(1, 5))
    assert 0 < apart <= part_error(s, cut, tail=tail) <= 2000 * apart


def test_no_part_is_determined_where_singular_values_coincide() -> None:
    s = torch.linspace(1, 0.1, 16, dtype=torch.float64)
    for gap, expected in ((0.99, math.inf), (1.01, None)):
        s[8:] = s[7] - gap * smallest_gap(16)
        assert (part_error(s, 8) == expected) == (expected is not None)
        assert (part_error(s, 8, tail=True) == expected) == (expected is not None)
    assert part_error(torch.ones(4), 4) < 1e-4  # nothing is cut
    assert part_error(torch.ones(4), 0, tail=True) < 1e-4
    assert part_error(torch.zeros(4), 2) == 0


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
