"""Median ratios of paired measurements."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Ratio(NamedTuple):
    """A median ratio with its 95 % interval."""

    median: float
    low: float
    high: float

    def shown(self, digits: int = 2) -> str:
        """Return the ratio and its interval, such as "1.02 [1.00, 1.03]"."""
        return f"{self.median:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}]"


def median_ratio(numerator: Sequence[float], denominator: Sequence[float], seed: int = 0) -> Ratio:
    """Median of the paired ratios with its 95 % percentile-bootstrap interval."""
    ratios = np.asarray(numerator) / np.asarray(denominator)
    draws = np.random.default_rng(seed).choice(ratios, (10_000, len(ratios)))
    low, high = np.quantile(np.median(draws, axis=1), [0.025, 0.975])
    return Ratio(float(np.median(ratios)), float(low), float(high))


def median_interval(values: Sequence[float]) -> Ratio:
    """Median of measurements with its 95 % percentile-bootstrap interval."""
    return median_ratio(values, [1.0] * len(values))
