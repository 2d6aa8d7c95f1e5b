"""The order in which a matrix product operator's cores are applied: the cheapest, and as expensive as counted."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from loraover.checkpoint.error_bounds import gamma, unit_roundoff
from loraover.overparam.decompositions import DECOMPOSITIONS, Mpo, contraction_order, make_decomposition
from loraover.overparam.decompositions.contraction_order import PASS, CoreShapes, Step, cheapest_order

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
