"""The bounds that certificates rest on, against exact rational arithmetic."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from loraover.checkpoint.error_bounds import gamma, orthogonality_error, smallest_subnormal, unit_roundoff
from loraover.overparam.block_bases import Blocks, eigenvectors

import tolerances
from strategies import normal
from support.speed import examples

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
SMALLEST = {
    torch.float64: 2.0**-1074,
    torch.float32: 2.0**-149,
    torch.float16: 2.0**-24,
    torch.bfloat16: 2.0**-133,
}
UNIT = 2.0**-53


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unit_roundoff_is_half_the_spacing_at_one(dtype: torch.dtype) -> None:
    assert unit_roundoff(dtype) == tolerances.UNIT[dtype]
    unit = torch.tensor(unit_roundoff(dtype), dtype=dtype)
    one = torch.ones((), dtype=dtype)
    assert one + unit == one
    assert one + 2 * unit > one


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_smallest_subnormal_is_the_first_number_above_zero(dtype: torch.dtype) -> None:
    smallest = smallest_subnormal(dtype)
    assert smallest == SMALLEST[dtype]
    zero, one = torch.zeros((), dtype=dtype), torch.ones((), dtype=dtype)
    assert float(torch.nextafter(zero, one)) == smallest


@given(terms=st.integers(0, 2**40), unit=st.sampled_from(sorted(tolerances.UNIT.values())))
@example(terms=0, unit=UNIT)
@example(terms=255, unit=2.0**-8)
@example(terms=256, unit=2.0**-8)
@examples(100)
def test_gamma_is_the_formula(terms: int, unit: float) -> None:
    product = terms * Fraction(unit)
    if product >= 1:
        with pytest.raises(ValueError, match=f"no rounding bound for {terms} operations"):
            gamma(terms, unit)
        return
    exact = product / (1 - product)
    # k u and 1 - k u are multiples of 2^-53 below 1 and so exact; the division rounds once.
    assert abs(Fraction(gamma(terms, unit)) - exact) <= exact * Fraction(UNIT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [1, 2, 8, 64, 256])
def test_the_bound_of_orthogonality_holds_with_room_and_is_not_loose(size: int, dtype: torch.dtype) -> None:
    factor = normal(size, 1, 1, size, size).to(dtype)
    basis = eigenvectors(factor @ factor.mT, Blocks(1, size, 1)).double()
    error = float((basis.mT @ basis - torch.eye(size)).abs().max())
    assert error <= orthogonality_error(size, dtype) / 2
    assert orthogonality_error(size, dtype) < (1e-2 if dtype == torch.float32 else 1e-11)
