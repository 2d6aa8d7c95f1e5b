"""Shapes of cores, the order in which they are contracted, and the operations of a step."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from math import ceil, prod
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from loraover.checkpoint.error_bounds import gamma, unit_roundoff
from loraover.common.errors import ShapeError
from loraover.overparam.decompositions import (
    DECOMPOSITIONS,
    Chain,
    Decomposition,
    Mpo,
    contraction_order,
    make_decomposition,
)
from loraover.overparam.decompositions.contraction_order import PASS, CoreShapes, Step, cheapest_order
from loraover.overparam.decompositions.mpo import balanced_factors
from loraover.overparam.fingerprint import LateAnswer

from benchmarks.step_overhead import ARMS, EIGEN, make_step
from strategies import LORA_SHAPES, expansions, full_bonds, sizes
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


SHAPES = [(16, 2048), (2048, 16), (576, 8), (12, 30), (7, 13), (1, 64)]
CORES = [1, 2, 3, 4]


def every_order(chain: CoreShapes, start: int, end: int) -> Iterator[tuple[Step, ...]]:
    """All sequences of steps, written apart from the search."""
    if start == end:
        yield ()
        return
    for cut in range(start + 1, end + 1):
        if (start, cut) != (0, len(chain.rows)) or len(chain.rows) == 1:
            yield from ((Step(start, cut, True), *rest) for rest in every_order(chain, cut, end))
    for cut in range(start + 1, end):
        yield from ((Step(cut, end, False), *rest) for rest in every_order(chain, start, cut))


def cost(chain: CoreShapes, steps: tuple[Step, ...], tokens: int) -> int:
    """Multiplications and passes, by multiplying the sizes of the legs that each step touches."""
    start, end, total = 0, len(chain.rows), 0
    for first, last, from_left in steps:
        made = prod(chain.bonds[first : first + 1]) * chain.rows[first] * chain.columns[first]
        for k in range(first + 1, last):
            made *= chain.rows[k] * chain.columns[k]
            total += made * chain.bonds[k] * chain.bonds[k + 1]
        before = prod(chain.rows[:start]) * prod(chain.rows[end:]) * prod(chain.columns[start:end])
        before *= chain.bonds[start] * chain.bonds[end]  # legs of the state
        beside = chain.bonds[last if from_left else first] if last - first < end - start else 1
        total += tokens * before * prod(chain.rows[first:last]) * beside
        start, end = (last, end) if from_left else (start, first)
        after = prod(chain.rows[:start]) * prod(chain.rows[end:]) * prod(chain.columns[start:end])
        total += PASS * tokens * after * (chain.bonds[start] * chain.bonds[end] if start < end else 1)
    return total


@pytest.mark.parametrize("tokens", [1, 16, 1024])
@pytest.mark.parametrize("num_cores", CORES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_order_is_cheaper(shape: tuple[int, int], num_cores: int, tokens: int) -> None:
    chain = Mpo(num_cores).layout(*shape)
    found = cheapest_order(chain, tokens)
    everything = [cost(chain, steps, tokens) for steps in every_order(chain, 0, num_cores)]
    assert found.cost == min(everything) == cost(chain, found.steps, tokens)


@pytest.mark.parametrize("name", DECOMPOSITIONS)
@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
def test_the_count_is_that_of_the_products_that_run(shape: tuple[int, int], name: str) -> None:
    """PyTorch counts two operations for a multiplication and an addition; it does not see svd's scaling."""
    kind, (m, n), tokens = make_decomposition(name), shape, 64
    cores = kind.init(torch.ones(1, m, n, dtype=torch.float64), [torch.Generator().manual_seed(0)])
    with FlopCounterMode(display=False) as counter:
        kind.apply(cores, torch.ones(1, tokens, n, dtype=torch.float64), m, n)
    unseen = tokens * min(m, n) if name == "svd" else 0
    assert kind.multiplications(m, n, tokens) == counter.get_total_flops() // 2 + unseen


def test_many_cores_take_a_moment() -> None:
    chain = Mpo(64).layout(2**12, 2**12)
    assert len(cheapest_order(chain, 256).steps) > 1


@pytest.mark.parametrize("at_once", [1, 5000, 10**9])
def test_pieces_give_what_all_tokens_give(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(contraction_order.STATE_AT_ONCE, "cpu", at_once)
    m, n, tokens, kind = 16, 2048, 40, Mpo(gauge="random")
    generator = torch.Generator().manual_seed(0)
    cores = kind.init(torch.randn(1, m, n, dtype=torch.float64, generator=generator), [generator])
    x = torch.randn(1, tokens, n, dtype=torch.float64, generator=generator)
    magnitude = x.abs() @ kind.contract([core.abs() for core in cores], m, n).mT
    terms = n + kind.contraction_terms(m, n)
    error = (kind.apply(cores, x, m, n) - x @ kind.contract(cores, m, n).mT).abs()
    assert bool((error <= 2 * gamma(terms, unit_roundoff(torch.float64)) * magnitude).all())


AT_MOST = {"mpo": 120, EIGEN: 200, "eigen, bases at rest": 120}


@pytest.mark.parametrize("arm", AT_MOST)
def test_operations_are_few_and_the_same_for_every_number_of_layers(arm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for layers in (2, 3):
        step = make_step(ARMS[arm], layers, torch.device("cpu"))
        for _ in range(3):
            step.timed()
        counted = step.counted()
        assert counted.readings() == 1  # whether A or B were changed outside the step, which a CPU answers at once
        found.append(counted.operations())
    assert found[0] == found[1] <= AT_MOST[arm]
    monkeypatch.setattr(LateAnswer, "ask", _without_an_answer)
    assert step.counted().readings() == 0


def _without_an_answer(self: LateAnswer, differs: Any) -> None:
    pass
