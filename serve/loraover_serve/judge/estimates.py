"""Intervals over prompts, with their errors: a robust strength, the mean of log ratios, and root mean squares.

A robust regression through the origin finds how much of a change is in an engine's answers. Let y be the engine's
change of the logprobs at a position, and d a direction: the change in PyTorch. The strength s is 1 if the engine makes
the change as it should, 0 if it does not. With x = y.d and w = d.d at each position, s solves

    sum of phi(r) (x - s w) = 0,    r = (x - s w) / sqrt(w),    phi(r) = min(1, CLIP sigma / |r|),

where sigma is the scale of r by its median. So a position that is far off, such as one whose tokens went to another
expert, has a bounded weight. Positions of one prompt share their noise: the standard error is that of the prompts'
sums (the sandwich of generalised estimating equations), and the interval has the quantile of Student's t for as many
prompts as share the weight evenly.

A few prompts have a wide interval. Where the noise n of an engine is known to be small, it bounds the error as well,
since x = s w + n.d, phi is 1 at most, and by Cauchy and Schwarz

    |sum of phi n.d| / sum of phi w <= sqrt(sum of phi n.n / sum of phi w) <= sqrt(sum of n.n / sum of phi w).

The sum of phi w takes the place of that of w: positions with a bounded weight carry less of the estimate.

Source: Huber 1964, doi:10.1214/aoms/1177703732; Liang and Zeger 1986, doi:10.1093/biomet/73.1.13.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import fmean, median
from typing import Final, NamedTuple

from loraover_serve.judge.limits import BY_CHANCE, CONFIDENCE, FEW_AS_BASE

CLIP = 2.5
"""Multiple of the noise's scale at which the residual of a position is clipped."""

STEPS = 20
TO_SIGMA = 1.4826  # from the median of |r| to the standard deviation, for normal noise
LONGEST, EPSILON = 10_000, 2**-52  # terms of a continued fraction, and what the last one changes

IN_FILES: Final = {"extra": "forbid", "use_attribute_docstrings": True}
"""Rules by which pydantic reads the judge's results: files have no other fields, and docstrings describe the fields."""


@dataclass(frozen=True)
class Interval:
    """An estimate with its interval. A strength is 1 if the engine applies the adapter as it was trained, 0 if not."""

    __pydantic_config__ = IN_FILES

    value: float
    """The estimate"""
    low: float
    """Lower end of the interval over prompts, which misses the truth in one case of 10,000"""
    high: float
    """Upper end of the interval over prompts"""

    @classmethod
    def around(cls, value: float, half: float) -> Interval:
        """The interval whose width is twice `half`."""
        return cls(value, value - half, value + half)

    @property
    def half(self) -> float:
        """Half the width of the interval."""
        return (self.high - self.low) / 2

    def __str__(self) -> str:
        ends = f" [{self.low:.3g}, {self.high:.3g}]" if math.isfinite(self.half) else ""
        return f"{self.value:.3g}{ends}"

    @property
    def plainly(self) -> str:
        """A strength in plain words."""
        return self._in_words(1)

    def _in_words(self, digits: int) -> str:
        ends = f" ({in_percent(self.low, self.high, digits=digits)})" if math.isfinite(self.half) else ""
        return f"{in_percent(self.value, digits=digits)} of the adapter is applied{ends}"

    def beside(self, allowed: tuple[float, float], where: str = "") -> str:
        """A strength and the right ones in plain words, with so many digits that they differ where none is right.

        Args:
            allowed: Smallest and largest right strength.
            where: Words that follow the strength.
        """
        digits = 1
        while digits < MOST_DIGITS:
            low, high, least, most = (round(100 * each, digits) for each in (self.low, self.high, *allowed))
            if high < least or low > most or (self.high >= allowed[0] and self.low <= allowed[1]):
                break
            digits += 1
        return f"{self._in_words(digits)}{where}, where {in_percent(*allowed, digits=digits)} is right"


MOST_DIGITS = 6
"""Most decimals of a strength in percent."""


def in_percent(*shares: float, digits: int = 1) -> str:
    """A share, or the ends of an interval of shares, in percent, with so many decimals at most."""
    shown = (f"{round(100 * each, digits) + 0.0:.{digits}f}".rstrip("0").rstrip(".") for each in shares)
    return " to ".join(shown) + " %"


def share_in_percent(share: float) -> str:
    """A share of many answers in percent, which is not shown as 0 because it is small."""
    return f"{100 * share:.3g} %"


class Fit(NamedTuple):
    """A fitted strength, with the sum that bounds its error.

    Args:
        interval: The strength, with the interval over prompts.
        weight: The sum of phi w, in square nats.
    """

    interval: Interval
    weight: float

    def certain(self, most: float) -> float:
        """Largest error of the strength if the squares of all noise, in square nats, sum up to at most most**2."""
        return most / math.sqrt(self.weight) if self.weight else math.inf

    def within(self, most: float) -> Interval:
        """The strength, with an interval that is no wider than twice the error that is certain."""
        return Interval.around(self.interval.value, min(self.interval.half, self.certain(most)))


def fit_strength(points: Sequence[tuple[int, float, float]]) -> Fit:
    """The factor s of a direction in a change; see the head of this module.

    Args:
        points: Prompt, x in square nats, and w in square nats, of each position; those with w = 0 show nothing.
    """
    points = [point for point in points if point[2] > 0]
    if not points:
        return Fit(Interval.around(0.0, math.inf), 0.0)
    value = median(x / w for _, x, w in points)
    for _ in range(STEPS):
        phi, _, _ = _weighted(points, value)
        below = math.fsum(f * w for f, (_, _, w) in zip(phi, points, strict=True))
        value = math.fsum(f * x for f, (_, x, _) in zip(phi, points, strict=True)) / below
    phi, inside, residuals = _weighted(points, value)
    weight = math.fsum(f * w for f, (_, _, w) in zip(phi, points, strict=True))
    sums, weights = defaultdict[int, float](float), defaultdict[int, float](float)
    for (prompt, _, w), f, r in zip(points, phi, residuals, strict=True):
        sums[prompt] += f * math.sqrt(w) * r
        weights[prompt] += w
    if len(sums) < 2:
        return Fit(Interval.around(value, math.inf), weight)
    bread = math.fsum(w for (_, _, w), within in zip(points, inside, strict=True) if within)  # of half of them, or more
    even = sum(weights.values()) ** 2 / sum(w * w for w in weights.values())
    error = math.sqrt(len(sums) / (len(sums) - 1) * sum(each * each for each in sums.values())) / bread
    return Fit(Interval.around(value, error * t_quantile(max(even - 1, 1))), weight)


def _weighted(points: Sequence[tuple[int, float, float]], value: float) -> tuple[list[float], list[bool], list[float]]:
    """The weights phi, whether each residual is within CLIP scales, and the residuals."""
    residuals = [(x - value * w) / math.sqrt(w) for _, x, w in points]
    limit = CLIP * TO_SIGMA * median(map(abs, residuals))
    inside = [abs(r) <= limit or limit == 0 for r in residuals]
    return [1.0 if i else limit / abs(r) for r, i in zip(residuals, inside, strict=True)], inside, residuals


def log_ratio(one: Sequence[float], other: Sequence[float]) -> Interval:
    """Mean over prompts of the logarithm of a ratio, with its interval by Student's t.

    The logarithm bounds the weight of a prompt that is far off, and the size of a prompt's noise cancels in the ratio.

    Args:
        one: Positive numbers, one for each prompt.
        other: Numbers for the same prompts.
    """
    logs = [math.log(here / there) for here, there in zip(one, other, strict=True)]
    if len(logs) < 2:
        return Interval.around(fmean(logs) if logs else 0.0, math.inf)
    return Interval.around(fmean(logs), t_quantile(len(logs) - 1) * _deviation(logs) / math.sqrt(len(logs)))


def root_mean(squares: Sequence[float]) -> tuple[float, float]:
    """Root of a mean of squares, and its standard error.

    The error of the root is that of the mean, divided by 2 rms. A single square shows no error, so the root itself is
    taken for it.

    Args:
        squares: At least one square.
    """
    rms = math.sqrt(fmean(squares))
    spread = _deviation(squares) if len(squares) > 1 else 2 * rms**2
    return rms, spread / math.sqrt(len(squares)) / (2 * rms) if rms else 0.0


def _deviation(values: Sequence[float]) -> float:
    """Standard deviation of a sample; `statistics.stdev` computes with fractions, and is 100 times as slow."""
    mean = fmean(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))


@lru_cache(maxsize=1024)
def t_quantile(freedom: float, probability: float = BY_CHANCE / 2) -> float:
    """Value that Student's t exceeds with a probability.

    With t = sqrt(freedom) / tan(angle), half of the regularised incomplete beta function of sin(angle)^2 is that
    probability. Bisection ends at two neighbouring floating-point angles.

    Args:
        freedom: Degrees of freedom, at least 1; any number.
        probability: The probability, below a half.
    """
    low, high = 0.0, math.pi / 2
    while low < (angle := (low + high) / 2) < high:
        tail = incomplete_beta(freedom / 2, 0.5, math.sin(angle) ** 2, math.cos(angle) ** 2) / 2
        low, high = (angle, high) if tail < probability else (low, angle)
    return math.sqrt(freedom) / math.tan(high)


def incomplete_beta(a: float, b: float, x: float, rest: float) -> float:
    """The regularised incomplete beta function I_x(a, b), by its continued fraction.

    Args:
        a: Above 0.
        b: Above 0.
        x: From 0 to 1.
        rest: 1 - x, which is exact where x is near 1.

    Source: DLMF 8.17.22, with 8.17.4 where that converges slowly; Lentz 1976, doi:10.1364/AO.15.000668.
    """
    if x <= 0 or rest <= 0:
        return float(rest <= 0)
    if x > (a + 1) / (a + b + 2):
        return 1 - incomplete_beta(b, a, rest, x)
    head = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log(rest)
    fraction, above, below = 1.0, 1.0, 0.0
    for step in range(1, LONGEST):
        k = step // 2
        if step % 2:
            term = -(a + k) * (a + b + k) * x / (a + 2 * k) / (a + 2 * k + 1)
        else:
            term = k * (b - k) * x / (a + 2 * k - 1) / (a + 2 * k)
        above, below = 1 + term / above, 1 / (1 + term * below)
        fraction *= above * below
        if abs(above * below - 1) < EPSILON:
            break
    return math.exp(head) / a / fraction


def share_found(answers: int) -> float:
    """Smallest share of answers without the adapter that so many answers show in 99 of 100 cases, at most 1."""
    if answers <= FEW_AS_BASE:
        return 1.0
    low, high = 0.0, 1.0
    while low < (share := (low + high) / 2) < high:
        few = (math.comb(answers, k) * share**k * (1 - share) ** (answers - k) for k in range(FEW_AS_BASE))
        low, high = (share, high) if sum(few) > 1 - CONFIDENCE else (low, share)  # the probability of fewer
    return high


def share_interval(found: int, answers: int) -> Interval:
    """Share of answers of a kind, with an interval that misses the true share in at most one case of 100.

    Args:
        found: Number of answers of that kind.
        answers: Number of answers.

    Source: Clopper and Pearson 1934, doi:10.1093/biomet/26.4.404.
    """
    if not answers:
        return Interval(0.0, 0.0, 1.0)

    def share(below: float, above: float, probability: float) -> float:
        low, high = 0.0, 1.0
        while low < (middle := (low + high) / 2) < high:
            is_below = incomplete_beta(below, above, middle, 1 - middle) < probability
            low, high = (middle, high) if is_below else (low, middle)
        return high

    tail, others = (1 - CONFIDENCE) / 2, answers - found
    low = share(found, others + 1, tail) if found else 0.0
    return Interval(found / answers, low, share(found + 1, others, 1 - tail) if others else 1.0)


def requests_that_reach(share: float) -> int:
    """Number of requests that reach a share of the servers at least once in 99 of 100 cases."""
    return math.ceil(math.log(1 - CONFIDENCE) / math.log1p(-share)) if share < 1 else 1
