"""Strengths, distances and their errors, as verify/strength.py and verify/report.py compute them with NumPy."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from statistics import fmean, median, stdev
from typing import NamedTuple

CLIP, BY_CHANCE, STEPS, TO_SIGMA = 2.5, 1e-4, 20, 1.4826  # see verify/strength.py


class Estimate(NamedTuple):
    """An estimate, and half the width of the interval in which the truth lies but for BY_CHANCE of the cases."""

    value: float
    half: float

    def __str__(self) -> str:
        low, high = self.value - self.half, self.value + self.half
        return f"{self.value:.3g} [{low:.3g}, {high:.3g}]" if math.isfinite(self.half) else f"{self.value:.3g}"


class Distance(NamedTuple):
    """RMS difference of logprobs in nats, its standard error over prompts, and the largest difference."""

    rms: float
    error: float
    largest: float
    positions: int
    prompts: int


def t_quantile(freedom: float, probability: float = BY_CHANCE / 2) -> float:
    """Value that Student's t exceeds with a probability; more than 200 degrees of freedom count as 200.

    With t = sqrt(freedom) / tan(angle), the density is that of sin(angle)^(freedom - 1). Simpson's rule in s, where
    angle = end * s^4, is exact enough at its singular end.
    """
    freedom, parts = min(freedom, 200.0), 400
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi)
    weights = [
        (1 if k in (0, parts) else 4 if k % 2 else 2) * 4 * (k / parts) ** 3 / 3 / parts for k in range(parts + 1)
    ]
    low, high = 0.0, math.pi / 2
    for _ in range(50):
        end = (low + high) / 2
        curve = (w * math.sin(end * (k / parts) ** 4) ** (freedom - 1) for k, w in enumerate(weights) if k)
        low, high = (end, high) if scale * end * sum(curve) < probability else (low, end)
    return math.sqrt(freedom) / math.tan(low)


def strength(points: Sequence[tuple[int, float, float]]) -> Estimate:
    """The robust factor s of a direction in a change, x = s w, as verify/strength.py derives it.

    Args:
        points: Prompt, product x of change and direction, and square w of the direction, at each position.
    """
    points = [point for point in points if point[2] > 0]
    if not points:
        return Estimate(0.0, math.inf)
    value, phi, inside = median(x / w for _, x, w in points), [1.0], [True]
    for step in range(STEPS + 1):
        residuals = [(x - value * w) / math.sqrt(w) for _, x, w in points]
        limit = CLIP * TO_SIGMA * median(map(abs, residuals))
        inside = [abs(r) <= limit or limit == 0 for r in residuals]
        phi = [1.0 if within else limit / abs(r) for r, within in zip(residuals, inside, strict=True)]
        if step < STEPS:
            below = sum(f * w for f, (_, _, w) in zip(phi, points, strict=True))
            value = sum(f * x for f, (_, x, _) in zip(phi, points, strict=True)) / below if below > 0 else 0.0
    sums, weights = defaultdict[int, float](float), defaultdict[int, float](float)
    for (prompt, _, w), f, r in zip(points, phi, residuals, strict=True):
        sums[prompt] += f * math.sqrt(w) * r
        weights[prompt] += w
    bread = sum(w for (_, _, w), within in zip(points, inside, strict=True) if within)
    if len(sums) < 2 or bread == 0:
        return Estimate(value, math.inf)
    even = sum(weights.values()) ** 2 / sum(w * w for w in weights.values())
    error = math.sqrt(len(sums) / (len(sums) - 1) * sum(each * each for each in sums.values())) / bread
    return Estimate(value, error * t_quantile(max(even - 1, 1)))


def distance(places: Sequence[int], differences: Sequence[Sequence[float]]) -> Distance:
    """Summarise differences of logprobs at positions, each of a prompt."""
    squares = [fmean(d * d for d in each) for each in differences]
    by_prompt = defaultdict[int, float](float)
    for prompt, square in zip(places, squares, strict=True):
        by_prompt[prompt] += square
    sums = [each * len(by_prompt) / len(squares) for each in by_prompt.values()]
    rms = math.sqrt(fmean(squares))
    spread = stdev(sums) if len(sums) > 1 else 2 * rms**2
    error = spread / math.sqrt(len(sums)) / (2 * rms) if rms else 0.0
    return Distance(rms, error, max(abs(d) for each in differences for d in each), len(squares), len(sums))


def dot(one: Sequence[float], other: Sequence[float]) -> float:
    """Product of two vectors."""
    return sum(a * b for a, b in zip(one, other, strict=True))
