"""Median ratios of paired measurements."""

from __future__ import annotations

import numpy as np


def median_ratio(numerator: list[float], denominator: list[float], seed: int = 0) -> tuple[float, float, float]:
    """Median of the paired ratios with its 95 % percentile-bootstrap interval."""
    ratios = np.asarray(numerator) / np.asarray(denominator)
    draws = np.random.default_rng(seed).choice(ratios, (10_000, len(ratios)))
    low, high = np.quantile(np.median(draws, axis=1), [0.025, 0.975])
    return float(np.median(ratios)), float(low), float(high)
