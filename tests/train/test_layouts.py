"""Shapes of the cores: how many there are, how large, and which is the centre."""

from __future__ import annotations

from itertools import pairwise
from math import ceil, prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraover.common.errors import ShapeError
from loraover.overparam.decompositions import Chain, Decomposition, Mpo, make_decomposition
from loraover.overparam.decompositions.mpo import balanced_factors

from strategies import (
    LORA_SHAPES,
    expansions,
    full_bonds,
    sizes,
)
from support.speed import examples

cheap = examples(40)


@given(m=sizes(), n=sizes(), data=st.data())
@cheap
def test_mpo_layouts_are_full_and_centred_on_the_largest_core(m: int, n: int, data: st.DataObject) -> None:
    num_cores = data.draw(st.integers(1, 5))
    layout = Mpo(num_cores=num_cores).layout(m, n)
    assert (prod(layout.rows), prod(layout.columns)) == (m, n)
    assert len(layout.rows) == len(layout.columns) == num_cores
    assert layout.bonds == (1, *full_bonds(layout.rows, layout.columns), 1)
    core_sizes = [prod(layout.core(k)) for k in range(num_cores)]
    assert core_sizes[layout.centre] == max(core_sizes) >= m * n
    shapes = Mpo(num_cores=num_cores).core_shapes(m, n)
    assert [p * q for p, q in shapes] == core_sizes


def test_an_mpo_has_the_cores_of_the_paper() -> None:
    mpo = Mpo(modes={8: (2, 2, 2), 576: (8, 9, 8)})
    layout = mpo.layout(8, 576)
    assert [layout.core(k) for k in range(3)] == [(1, 2, 8, 16), (16, 2, 9, 16), (16, 2, 8, 1)]
    assert mpo.core_shapes(8, 576) == ((16, 16), (32, 144), (16, 16))
    assert mpo.centre(8, 576) == 1
    assert mpo.num_parameters(8, 576) == 16 * 16 + 16 * 2 * 9 * 16 + 16 * 16


@given(size=sizes(), count=st.integers(1, 5))
@cheap
def test_balanced_factors_multiply_to_the_size_with_the_largest_in_the_middle(size: int, count: int) -> None:
    factors = balanced_factors(size, count)
    assert len(factors) == count
    assert prod(factors) == size
    distance = sorted(range(count), key=lambda k: abs(2 * k + 1 - count))
    assert all(factors[a] >= factors[b] for a, b in pairwise(distance))


@pytest.mark.parametrize("m", [8, 12])
def test_given_modes_are_used_for_the_dimension_that_has_that_size(m: int) -> None:
    layout = Mpo(modes={8: (4, 1, 2), 5: (1, 1, 5)}).layout(m, 5)
    assert layout.rows == ((4, 1, 2) if m == 8 else balanced_factors(12, 3))
    assert layout.columns == (1, 1, 5)


def test_modes_and_bonds_of_a_json_file_make_the_same_mpo() -> None:
    from_json = make_decomposition("mpo", {"modes": {"8": [2, 2, 2], "5": [1, 5, 1]}, "bonds": [4, 5]})
    in_python = Mpo(modes={5: (1, 5, 1), 8: (2, 2, 2)}, bonds=(4, 5))
    assert from_json == in_python
    assert hash(from_json) == hash(in_python)
    assert in_python != Mpo(modes={5: (1, 5, 1), 8: (2, 2, 2)})


@pytest.mark.parametrize(
    ("bonds", "narrow"),
    [((1, 3), ["bond 1"]), ((2, 2), ["bond 2"]), ((1, 2), ["bond 1", "bond 2"]), ((0, 3), ["bond 1"])],
)
def test_bonds_that_would_truncate_are_refused(bonds: tuple[int, int], narrow: list[str]) -> None:
    mpo = Mpo(modes={4: (2, 2, 1), 6: (1, 2, 3)}, bonds=bonds)
    for use in (mpo.layout, mpo.core_shapes, mpo.centre, mpo.num_parameters):
        with pytest.raises(ShapeError, match="truncate") as error:
            use(4, 6)
        assert [f"bond {k}" for k in (1, 2) if f"bond {k} is" in str(error.value)] == narrow


def test_exactly_full_bonds_are_accepted() -> None:
    modes = {4: (2, 2, 1), 6: (1, 2, 3)}
    assert Mpo(modes=modes, bonds=(2, 3)).layout(4, 6) == Mpo(modes=modes).layout(4, 6)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
def test_an_mpo_of_an_empty_matrix_is_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(ShapeError, match=f"{shape[0]} x {shape[1]}"):
        Mpo().layout(*shape)


@given(m=sizes(), n=sizes(), num_cores=st.integers(2, 4), expansion=expansions() | st.floats(1, 30))
@cheap
def test_mpo_expansion_is_reached_with_bonds_at_least_full(m: int, n: int, num_cores: int, expansion: float) -> None:
    layout = Mpo(num_cores=num_cores, expansion=expansion).layout(m, n)
    full = Mpo(num_cores=num_cores).layout(m, n)
    assert layout.num_parameters() >= expansion * m * n
    assert all(wide >= narrow for wide, narrow in zip(layout.bonds, full.bonds, strict=True))


@pytest.mark.parametrize("shape", LORA_SHAPES, ids=str)
@pytest.mark.parametrize("expansion", [1.0, 1.5, 2.0, 3.0, 4.0, 8.0, 16.0])
def test_mpo_expansion_is_not_overshot(shape: tuple[int, int], expansion: float) -> None:
    ratio = Mpo(expansion=expansion).num_parameters(*shape) / prod(shape)
    assert expansion <= ratio <= 1.15 * expansion


@pytest.mark.parametrize("shape", LORA_SHAPES, ids=str)
def test_full_bonds_cost_between_two_and_fifty_percent_more(shape: tuple[int, int]) -> None:
    assert 1 < Mpo().num_parameters(*shape) / prod(shape) <= 1.5


@given(m=sizes(), n=sizes(), depth=st.integers(2, 5), expansion=expansions())
@cheap
def test_chain_cores_are_wide_inside_and_mirrored(m: int, n: int, depth: int, expansion: float) -> None:
    chain: Decomposition = Chain(depth=depth, expansion=expansion)
    shapes, width = chain.core_shapes(m, n), ceil(expansion * min(m, n))
    sides = [m, *[width] * (depth - 1), n]
    assert shapes == tuple(pairwise(sides))
    assert chain.centre(m, n) == (depth - 1 if m <= n else 0)
