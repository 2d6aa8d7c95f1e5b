"""Rounding to storage types against rational arithmetic and against the list of all numbers of a type."""

from __future__ import annotations

from fractions import Fraction
from math import copysign, frexp, inf, nan, nextafter
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from loraover.adapters.numerics.matrix_certificate import Underflow, underflow
from loraover.adapters.numerics.tensor_rounding import STORAGE_DTYPES, round_nearest, round_randomly
from loraover.common.arrays import as_array
from loraover.common.errors import FoldError

from oracles.contraction import Array
from strategies import SEEDS
from support.speed import examples
from tolerances import binomial_deviation


class Format(NamedTuple):
    """A binary format as IEEE 754 describes it: significand bits and the range of exponents."""

    precision: int
    least: int
    greatest: int

    @property
    def largest(self) -> float:
        return 2.0**self.greatest * (2 - 2.0 ** (1 - self.precision))

    @property
    def smallest(self) -> float:
        return 2.0 ** (self.least - self.precision + 1)

    @property
    def overflow(self) -> float:
        """The least magnitude that rounds to infinity: half a spacing beyond the largest number."""
        return 2.0**self.greatest * (2 - 2.0**-self.precision)


FORMATS = {"fp32": Format(24, -126, 127), "bf16": Format(8, -126, 127), "fp16": Format(11, -14, 15)}
NARROW = ["bf16", "fp16"]

every_type = pytest.mark.parametrize("name", STORAGE_DTYPES)
narrow_type = pytest.mark.parametrize("name", NARROW)
cheap = examples(60)


def spacing(x: float, form: Format) -> Fraction:
    """Distance of the format's numbers from |x|'s binade, or from zero's."""
    exponent = max(frexp(x)[1] - 1, form.least) if x else form.least
    return Fraction(2) ** (exponent - form.precision + 1)


def correctly_rounded(x: float, form: Format) -> float:
    """The nearest number of the format, ties to the even significand, with x's sign."""
    unit = spacing(x, form)
    return copysign(float(round(abs(Fraction(x)) / unit) * unit), x)  # round() of a Fraction takes ties to even


def neighbours(x: float, form: Format) -> tuple[float, float]:
    """The format's numbers at or next to x, below and above."""
    unit = spacing(x, form)
    count = Fraction(x) / unit
    return float(count.__floor__() * unit), float(count.__ceil__() * unit)


def positive_numbers(name: str) -> Array:
    """Every finite number of a 16-bit type from zero up, decoded by NumPy."""
    if name == "fp16":
        return np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float64)
    return (np.arange(0x7F80, dtype=np.uint32) << 16).view(np.float32).astype(np.float64)


def float64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def same_bits(found: Tensor, expected: list[float]) -> bool:
    """Equality by which -0 differs from 0."""
    wide = found.double()
    return torch.equal(wide.view(torch.int64), float64(*expected).view(torch.int64))


@st.composite
def numbers(draw: st.DrawFn, form: Format) -> float:
    """Floats that `form` holds, floats beside ties, and any others that do not overflow."""
    kind = draw(st.sampled_from(["any", "held", "tie", "beside a tie", "tiny"]))
    if kind == "any":
        bound = nextafter(form.overflow, 0)
        return draw(st.floats(-bound, bound))
    if kind == "tiny":
        return draw(st.floats(-8 * form.smallest, 8 * form.smallest))
    exponent = draw(st.integers(form.least, form.greatest))
    significand = draw(st.integers(0, 2**form.precision - 2))
    unit = 2.0 ** (exponent - form.precision + 1)
    value = significand * unit
    if kind != "held":
        value += unit / 2
    if kind == "beside a tie":
        # At all depths below the tie, down to the last bit of float64.
        value += draw(st.sampled_from([-1, 1])) * unit * 2.0 ** -draw(st.integers(2, 52 - form.precision))
    return value * draw(st.sampled_from([-1, 1]))


# To nearest


@every_type
@given(data=st.data())
@cheap
def test_rounding_is_the_correct_one(name: str, data: st.DataObject) -> None:
    form = FORMATS[name]
    values = data.draw(st.lists(numbers(form), min_size=1, max_size=20))
    found = round_nearest(float64(*values), STORAGE_DTYPES[name])
    assert found.dtype == STORAGE_DTYPES[name]
    assert same_bits(found, [correctly_rounded(x, form) for x in values])


@every_type
@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
def test_a_number_without_dimensions_is_rounded(name: str, wide: torch.dtype) -> None:
    dtype = STORAGE_DTYPES[name]
    assert torch.equal(round_nearest(torch.tensor(1.001, dtype=wide), dtype), torch.tensor(1.001, dtype=dtype))


@narrow_type
@pytest.mark.parametrize("sign", [1, -1])
def test_rounding_is_correct_around_every_tie_of_the_type(name: str, sign: int) -> None:
    """Between all neighbours: at the middle the even one, a float64 step off the middle the nearer one."""
    held = positive_numbers(name)
    below, above = held[:-1], held[1:]
    middle = (below + above) / 2
    even = np.where(np.arange(len(below)) % 2 == 0, below, above)
    for x, expected in (
        (middle, even),
        (np.nextafter(middle, 0), below),
        (np.nextafter(middle, np.inf), above),
        (np.nextafter(above, 0), above),
        (np.nextafter(below, np.inf), below),
        (below, below),
    ):
        found = round_nearest(torch.from_numpy(sign * x), STORAGE_DTYPES[name])
        assert torch.equal(found.double(), torch.from_numpy(sign * expected))


@every_type
@given(data=st.data())
@cheap
def test_numbers_of_the_type_stay_as_they_are(name: str, data: st.DataObject) -> None:
    form, dtype = FORMATS[name], STORAGE_DTYPES[name]
    values = [correctly_rounded(x, form) for x in data.draw(st.lists(numbers(form), min_size=1, max_size=20))]
    values += [0.0, -0.0, form.largest, -form.largest, form.smallest, -form.smallest]
    assert same_bits(round_nearest(float64(*values), dtype), values)
    assert same_bits(round_randomly(float64(*values), dtype, torch.Generator().manual_seed(0)), values)


# Too large


@every_type
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_number_is_kept_and_half_a_step_more_refused(name: str, sign: int) -> None:
    form, dtype = FORMATS[name], STORAGE_DTYPES[name]
    assert form.largest == torch.finfo(dtype).max
    kept = float64(sign * form.largest, sign * nextafter(form.overflow, 0))
    assert same_bits(round_nearest(kept, dtype), [sign * form.largest] * 2)
    generator = torch.Generator().manual_seed(0)
    assert same_bits(round_randomly(kept, dtype, generator), [sign * form.largest] * 2)
    for beyond in (form.overflow, nextafter(form.overflow, inf), 1e300, inf):
        with pytest.raises(FoldError, match=f"exceeds the largest {str(dtype).removeprefix('torch.')} number"):
            round_nearest(float64(0.5, sign * beyond), dtype)
        with pytest.raises(FoldError):
            round_randomly(float64(0.5, sign * beyond), dtype, generator)


@every_type
def test_nan_is_refused(name: str) -> None:
    with pytest.raises(FoldError):
        round_nearest(float64(0.5, nan), STORAGE_DTYPES[name])


# At random


@every_type
@given(data=st.data(), seed=SEEDS)
@cheap
def test_random_rounding_takes_one_of_the_two_neighbours(name: str, data: st.DataObject, seed: int) -> None:
    form = FORMATS[name]
    values = data.draw(st.lists(numbers(form), min_size=1, max_size=20))
    found = round_randomly(float64(*values), STORAGE_DTYPES[name], torch.Generator().manual_seed(seed))
    assert found.dtype == STORAGE_DTYPES[name]
    for x, rounded in zip(values, found.double().tolist(), strict=True):
        assert rounded in [y for y in neighbours(x, form) if abs(y) <= form.largest]


@every_type
@pytest.mark.parametrize("place", ["normal", "subnormal", "below a power of two", "above zero"])
@pytest.mark.parametrize(("sign", "fraction"), [(1, 0.01), (-1, 0.75)])
def test_random_rounding_goes_up_as_often_as_it_should(name: str, fraction: float, place: str, sign: int) -> None:
    form, draws = FORMATS[name], 100_000
    unit = 2.0 ** (1 - form.precision)
    below, step = {
        "normal": (1.0, unit),
        "subnormal": (5 * form.smallest, form.smallest),
        "below a power of two": (2 - unit, unit),
        "above zero": (0.0, form.smallest),
    }[place]
    x = sign * (below + fraction * step)
    exact_fraction = float((abs(Fraction(x)) - Fraction(below)) / Fraction(step))
    found = round_randomly(float64(x).expand(draws), STORAGE_DTYPES[name], torch.Generator().manual_seed(7))
    outwards = int((found.double().abs() > below).sum())
    assert abs(outwards - draws * exact_fraction) <= binomial_deviation(draws, exact_fraction)


@every_type
def test_random_rounding_follows_its_generator(name: str) -> None:
    dtype, before = STORAGE_DTYPES[name], torch.get_rng_state()
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    first, again, other = (round_randomly(x, dtype, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


# Too small


@every_type
@given(data=st.data())
@cheap
def test_underflow_agrees_with_rational_arithmetic(name: str, data: st.DataObject) -> None:
    form = FORMATS[name]
    values = data.draw(st.lists(numbers(form), min_size=1, max_size=20))
    x = float64(*values)
    rounded = [correctly_rounded(value, form) for value in values]
    expected = Underflow(
        to_zero=sum(a != 0 and b == 0 for a, b in zip(values, rounded, strict=True)),
        to_subnormal=sum(0 < abs(b) < 2.0**form.least for b in rounded),
    )
    assert underflow(x.numpy(), as_array(round_nearest(x, STORAGE_DTYPES[name]))) == expected


def test_numbers_that_float64_keeps_are_no_underflow() -> None:
    kept = np.array([1e-50, 1e-46, 1e300])
    assert underflow(kept, kept) == Underflow()
