"""Median ratios of paired measurements."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

FEWEST = 6
"""Rounds below which the smallest and the largest of them enclose the median with less than 95 % probability."""


class Ratio(NamedTuple):
    """A median ratio with its 95 % interval, or with its range if it has fewer than `FEWEST` rounds."""

    median: float
    low: float
    high: float
    rounds: int

    def shown(self, digits: int = 2, unit: str = "") -> str:
        """Return the ratio with its interval, "1.02 [1.00, 1.03]", or its range, "1.02 (1.00 to 1.03)"; one alone."""
        median, low, high = (f"{number:.{digits}f}" for number in self[:3])
        if self.rounds == 1:
            return median + unit
        return f"{median}{unit} " + (f"({low} to {high})" if self.rounds < FEWEST else f"[{low}, {high}]")


def median_ratio(numerator: Sequence[float], denominator: Sequence[float], seed: int = 0) -> Ratio:
    """Median of the paired ratios with its 95 % percentile-bootstrap interval, or with their range if they are few."""
    ratios = np.asarray(numerator) / np.asarray(denominator)
    if len(ratios) < FEWEST:
        return Ratio(float(np.median(ratios)), float(ratios.min()), float(ratios.max()), len(ratios))
    draws = np.random.default_rng(seed).choice(ratios, (10_000, len(ratios)))
    low, high = np.quantile(np.median(draws, axis=1), [0.025, 0.975])
    return Ratio(float(np.median(ratios)), float(low), float(high), len(ratios))


def median_interval(values: Sequence[float]) -> Ratio:
    """Median of measurements with its 95 % percentile-bootstrap interval."""
    return median_ratio(values, [1.0] * len(values))
