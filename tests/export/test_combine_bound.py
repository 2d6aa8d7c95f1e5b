"""The sum of any deltas of one module lies within its bound of NumPy's."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from loraover.checkpoint.exact_tensors import Exact
from loraover_export.combine.combine import add_deltas
from loraover_export.numerics.delta import Delta

from strategies import matrices, sizes
from support.speed import examples
from tolerances import UNIT


@st.composite
def sums(draw: Any) -> list[tuple[Delta, float]]:
    """Deltas of one module; some share their A or their B, or are the same."""
    m, n = draw(sizes()), draw(sizes())
    found: list[tuple[Delta, float]] = []
    for _ in range(draw(st.integers(1, 3))):
        r = draw(sizes())
        a, b = draw(matrices(r, n))[0], draw(matrices(m, r))[0]
        if found and draw(st.sampled_from([True, False])):
            a = found[0][0].a.value
            b = draw(matrices(m, len(a)))[0]
        zeros = [x.new_zeros(()).expand_as(x) for x in (a, b)]
        weight = draw(st.sampled_from([1.0, -1.0, 0.3, 2.0**-20, 1e6]))
        found.append((Delta("m", False, Exact(a, zeros[0], None), Exact(b, zeros[1], None)), weight))
    return found


@examples(80)
@given(weighted=sums())
def test_the_sum_is_within_its_bound_and_has_no_needless_rank(weighted: list[tuple[Delta, float]]) -> None:
    found = add_deltas(weighted)
    pieces = [weight * (delta.b.value.numpy() @ delta.a.value.numpy()) for delta, weight in weighted]
    size = sum(abs(w) * float(d.b.value.norm() * d.a.value.norm()) for d, w in weighted)
    product = found.delta.b.value.double().numpy() @ found.delta.a.value.double().numpy()
    distance = float(np.linalg.norm(product - sum(pieces)))
    assert distance <= found.arithmetic_bound + 200 * UNIT[torch.float64] * size + 1e-300
    assert found.arithmetic_bound <= 1e-11 * size + 1e-300
    if len(weighted) > 1:
        m, n = product.shape
        assert found.delta.rank <= min(m, n, sum(delta.rank for delta, _ in weighted))
