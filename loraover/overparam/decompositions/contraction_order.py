"""A chain of cores applied to activations, in the order that costs least by count.

The activations x[t, j_1 .. j_K] meet the chain at its ends: a step takes the first or the last of the cores that remain
and contracts them with the state so far. It takes one core, or several neighbours that are multiplied with one another
beforehand, which costs the same for one token as for a thousand. No step takes all cores, since their product would be
the matrix itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING, NamedTuple

from loraover.common.later import torch

if TYPE_CHECKING:
    from torch import Tensor

PASS = 32
"""Cost of a number of the state that is written and read again, in multiplications; about what a processor needs."""

STATE_AT_ONCE = {"cpu": 2**18, "cuda": 2**27, "mps": 2**27}
"""Numbers of a state that are held at once: what fits into a processor's cache, and 1 GiB in float64 on a GPU."""


class Step(NamedTuple):
    """The cores `first` to `last - 1`, which stand at the left or at the right end of those that remain."""

    first: int
    last: int
    from_left: bool


class CoreShapes(NamedTuple):
    """Shapes of K cores; core k is (bonds[k], rows[k], columns[k], bonds[k + 1]), and one of them the centre core."""

    rows: tuple[int, ...]
    columns: tuple[int, ...]
    bonds: tuple[int, ...]
    centre: int

    def core(self, k: int) -> tuple[int, int, int, int]:
        """Return the 4-D shape of core k."""
        return self.bonds[k], self.rows[k], self.columns[k], self.bonds[k + 1]

    def num_parameters(self) -> int:
        """Number of parameters of all cores."""
        return sum(prod(self.core(k)) for k in range(len(self.rows)))

    def steps(self, start: int, end: int) -> Iterator[tuple[Step, tuple[int, int]]]:
        """Possible steps while the cores `start` to `end - 1` remain, each with the range that remains after it."""
        whole = end - start if end - start == len(self.rows) > 1 else None
        for cut in range(start + 1, end + 1):
            if cut - start != whole:
                yield Step(start, cut, True), (cut, end)
        for cut in range(start + 1, end):
            yield Step(cut, end, False), (start, cut)

    def state(self, start: int, end: int) -> int:
        """Numbers of the state for one token while the cores `start` to `end - 1` remain."""
        bonds = self.bonds[start] * self.bonds[end] if start < end else 1
        return prod(self.rows[:start]) * prod(self.columns[start:end]) * prod(self.rows[end:]) * bonds

    def product(self, step: Step) -> int:
        """Multiplications that make the product of a step's cores."""
        size, total = self.bonds[step.first], 0
        for k in range(step.first, step.last):
            size = size * self.rows[k] * self.columns[k] * self.bonds[k + 1]
            total += size if k > step.first else 0
            size //= self.bonds[k] if k > step.first else 1
        return total

    def contraction(self, step: Step, rest: tuple[int, int]) -> int:
        """Multiplications for one token that contract a step's cores with the state, after which `rest` remains."""
        summed = prod(self.columns[step.first : step.last]) * self.bonds[step.first if step.from_left else step.last]
        return self.state(*rest) * summed * (self.bonds[step.last] if rest[0] == rest[1] else 1)


class Order(NamedTuple):
    """Steps that apply all cores.

    Args:
        steps: The steps; the last one is from the left.
        multiplications: Multiplications of two numbers in all.
        cost: The multiplications and the passes over the states, by which orders are compared.
        largest: Numbers of the largest state of one token.
    """

    steps: tuple[Step, ...]
    multiplications: int
    cost: int
    largest: int


def cheapest_order(chain: CoreShapes, tokens: int) -> Order:
    """Return the order that costs least; tokens are rounded up to a power of two, so that few orders are searched."""
    return _searched(chain, 1 << max(0, tokens - 1).bit_length())


@lru_cache(maxsize=4096)
def _searched(chain: CoreShapes, tokens: int) -> Order:
    """Search by dynamic programming over the range of cores that remain, from none to all of them."""
    count = len(chain.rows)
    best = {(at, at): Order((), 0, 0, prod(chain.rows)) for at in range(count + 1)}
    for length in range(1, count + 1):
        for start in range(count - length + 1):
            here, orders = (start, start + length), []
            for step, rest in chain.steps(*here):
                after = best[rest]
                count_here = chain.product(step) + tokens * chain.contraction(step, rest)
                cost = count_here + PASS * tokens * chain.state(*rest) + after.cost
                largest = max(chain.state(*here), after.largest)
                orders.append(Order((step, *after.steps), count_here + after.multiplications, cost, largest))
            best[here] = min(orders, key=lambda order: (order.cost, len(order.steps)))
    return best[0, count]


def apply_chain(chain: CoreShapes, cores: Sequence[Tensor], x: Tensor) -> Tensor:
    """Return activations (G, tokens, columns) times the matrix that the cores represent, without forming it.

    Core k is (G, bonds[k], rows[k], columns[k], bonds[k + 1]).
    """
    order = cheapest_order(chain, x.shape[1])
    taken = []
    for step in order.steps:  # the product of neighbouring cores: (G, bond, rows, columns, bond)
        product = cores[step.first]
        for core in cores[step.first + 1 : step.last]:
            product = torch.einsum("gamcb,gbndk->gamncdk", product, core).flatten(4, 5).flatten(2, 3)
        taken.append(product)
    at_once = max(1, STATE_AT_ONCE.get(x.device.type, STATE_AT_ONCE["cpu"]) // order.largest)
    pieces = [_apply_steps(order.steps, taken, piece) for piece in torch.split(x, at_once, dim=1)]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)


def _apply_steps(steps: Sequence[Step], taken: Sequence[Tensor], x: Tensor) -> Tensor:
    """Apply the products of the steps' cores to activations that are few enough."""
    # (G, rows done, tokens, left bond, remaining columns, right bond). The rows that a step adds come first, and so
    # each step is one batched product of matrices, of which the state is not copied.
    state = x[:, None, :, None, :, None]
    for step, core in zip(steps[:-1], taken[:-1], strict=True):
        *outer, bond, columns, last_bond = state.shape
        mine = core.shape[3]
        if step.from_left:
            split = state.reshape(*outer, bond, mine, columns // mine, last_bond).permute(0, 1, 2, 5, 6, 3, 4)
            state = _contract(split, core.transpose(1, 2)).permute(0, 1, 2, 5, 3, 4)
        else:
            split = state.reshape(*outer, bond, columns // mine, mine, last_bond)
            state = _contract(split, core.permute(0, 2, 3, 4, 1))
    legs, core = state, taken[-1].permute(0, 1, 3, 4, 2)
    if len(steps) > 1 and steps[-2].from_left:  # the left bond is the last in memory
        legs, core = state.movedim(3, 5), core.movedim(1, 3)
    out = legs.flatten(3).flatten(1, 2) @ core.flatten(1, 3)

    before = range(len(steps) - 1)
    place = [len(steps) - 1 - i for i in before]  # axis of the rows that step i added; a later step's come earlier
    out = out.reshape(len(x), *(taken[i].shape[2] for i in reversed(before)), x.shape[1], out.shape[-1])
    left = [place[i] for i in before if steps[i].from_left]
    right = [place[i] for i in reversed(before) if not steps[i].from_left]
    return out.permute(0, len(steps), *left, len(steps) + 1, *right).flatten(2)


def _contract(state: Tensor, core: Tensor) -> Tensor:
    """Contract legs of (G, rows, tokens, ..., c, d) and (G, m, c, d, k) to (G, m * rows, tokens, ..., k)."""
    group, rows, *kept = state.shape[:-2]
    found = state.flatten(-2).flatten(1, -2).unsqueeze(1) @ core.flatten(2, 3)
    return found.reshape(group, core.shape[1] * rows, *kept, found.shape[-1])
