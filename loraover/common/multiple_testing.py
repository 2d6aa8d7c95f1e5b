"""Corrections of p-values for several comparisons."""

from __future__ import annotations

from collections.abc import Sequence


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values: the k-th smallest of n is multiplied by n - k + 1; then they are made monotone and at most 1.

    Source:
        Holm 1979, Scandinavian Journal of Statistics 6.
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for position, i in enumerate(order):
        largest = max(largest, (len(p_values) - position) * p_values[i])
        adjusted[i] = min(1.0, largest)
    return adjusted
