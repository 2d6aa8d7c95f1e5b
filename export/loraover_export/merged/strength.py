"""How much of delta_W a merged weight holds, and whether rounding explains the rest; NumPy alone, block by block.

Of one module, W is the base model's weight, M the merged one, both as their files hold them, and D is delta_W:

    s   = <D, M - W> / <D, D>        strength by least squares: 1 if D was added once, 0 if it was not
    P_c = Q(W + c D)                 file of a merge by the factor c: Q rounds to the nearest number of M's format
    s_c = <D, P_c - W> / <D, D>      strength of that file, which differs from c where rounding erases a part of D
    X_c = |M - W - c D|^2 - |P_c - W - c D|^2

P_c is the nearest number to W + c D that M's format has at each place, so X_c is never negative, and it is zero if M is
that file. Where a merge rounds before it adds, its sum differs by some h from W + c D, and

    X_c <= 4 |P_c - W - c D| |h| + 4 |h|^2,

since |M - T| <= |Q(T) - T| + 2 |h| at each place, with T = W + c D. A factor explains a weight if s is near s_c and X_c
within this bound. The interval of s comes from the residuals r = M - W - s D, which rounding leaves: the standard error
is sqrt(sum D^2 r^2) / <D, D> (White 1980, doi:10.2307/1912934), whatever their sizes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.floating[Any]]
Rounding = Callable[[Numbers], Numbers]

STANDARD_ERRORS = 5.0
"""Half the width of the interval of a strength: one of two million normal draws is outside."""

IMPRECISION = 2.0**-7
"""Largest relative error of delta_W in the number formats that mergers compute it in: three roundings to bfloat16."""

ARITHMETIC = 2.0**-23
"""Largest relative error of a sum that a merger computes in float32."""

LOOSE = 0.05
"""Share by which a quantiser's squared error may exceed that of the nearest numbers, such as one with weights."""

FAINT = 0.01
"""Strength of a right merge, after rounding, below which the number format has erased the adapter."""


@dataclass(frozen=True)
class Hypothesis:
    """File that a merger may have written: Q(via(via(W) + factor D)).

    Args:
        factor: Multiple of delta_W that was added.
        via: Name of the coarser number format in which the sum was held before it was stored; None if it was not.
        name: Description of the factor in words; empty for 0 and 1.
    """

    factor: float
    via: str | None = None
    name: str = ""


ABSENT, ONCE = Hypothesis(0.0), Hypothesis(1.0)


@dataclass
class Explained:
    """Sums over the elements of a module, for one hypothesis; T is the sum in the format that was rounded.

    Args:
        excess: X, in squared units of the weight.
        error: Sum of squares of P - T.
        before: Sum of squares of the rounding before storage.
        shift: <D, P - W>.
        different: Number of elements in which M is not P.
    """

    excess: float = 0.0
    error: float = 0.0
    before: float = 0.0
    shift: float = 0.0
    different: int = 0


@dataclass
class Sums:
    """Sums over the elements of a module, from which its strength and verdict follow; the sums of blocks add up.

    Args:
        elements: Number of elements.
        size: Sum of squares of W.
        dd: <D, D>.
        dy: <D, M - W>.
        yy: <M - W, M - W>.
        moments: Sums of D^2 (M - W)^2, of D^3 (M - W), and of D^4.
        erased: Sum of squares of D in elements for which a merge and its absence give one stored number.
        lost: Sum of squares of Q(W + D) - Q(W) - D.
        explained: Sums of each hypothesis.
    """

    elements: int = 0
    size: float = 0.0
    dd: float = 0.0
    dy: float = 0.0
    yy: float = 0.0
    moments: tuple[float, float, float] = (0.0, 0.0, 0.0)
    erased: float = 0.0
    lost: float = 0.0
    explained: dict[Hypothesis, Explained] = field(default_factory=dict)

    def add(self, other: Sums) -> None:
        """Add the sums of other elements."""
        for name in ("elements", "size", "dd", "dy", "yy", "erased", "lost"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        first, second, third = self.moments
        self.moments = (first + other.moments[0], second + other.moments[1], third + other.moments[2])
        for hypothesis, found in other.explained.items():
            mine = self.explained.setdefault(hypothesis, Explained())
            for name, value in vars(found).items():
                setattr(mine, name, getattr(mine, name) + value)

    @property
    def strength(self) -> float:
        """Least-squares multiple of D in M - W; 0 if D is zero."""
        return self.dy / self.dd if self.dd else 0.0

    @property
    def half_width(self) -> float:
        """Half the width of the interval of the strength."""
        if not self.dd:
            return 0.0
        s, (d2y2, d3y, d4) = self.strength, self.moments
        return STANDARD_ERRORS * math.sqrt(max(0.0, d2y2 - 2 * s * d3y + s * s * d4)) / self.dd

    @property
    def residual(self) -> float:
        """Frobenius norm of M - W - s D."""
        return math.sqrt(max(0.0, self.yy - self.strength * self.dy))

    def expected(self, hypothesis: Hypothesis) -> float:
        """Return the strength of the file that a hypothesis writes."""
        return self.explained[hypothesis].shift / self.dd if self.dd else 0.0

    def allowed(self, hypothesis: Hypothesis, *, is_quantised: bool) -> float:
        """Return the largest excess that rounding explains, in squared units of the weight."""
        found = self.explained[hypothesis]
        imprecision = (IMPRECISION * abs(hypothesis.factor)) ** 2 * self.dd
        # Of a number that is rounded before it is stored, an error of D changes the result by a whole spacing, where
        # it does: sum spacing |h| <= sqrt(sum spacing^2) |h|, and the squared error of rounding is spacing^2 / 12.
        h = imprecision + math.sqrt(12 * found.before * imprecision) + ARITHMETIC**2 * self.size
        return LOOSE * is_quantised * found.error + 4 * math.sqrt(found.error * h) + 4 * h

    def fits(self, hypothesis: Hypothesis, *, is_quantised: bool) -> bool:
        """Whether a hypothesis explains the merged weight, by its strength and by its residual."""
        near = self.half_width + IMPRECISION * abs(hypothesis.factor)
        return (
            abs(self.strength - self.expected(hypothesis)) <= near
            and self.explained[hypothesis].excess <= self.allowed(hypothesis, is_quantised=is_quantised)
        )  # fmt: skip


def measure(
    base: Numbers,
    merged: Numbers,
    delta: Numbers,
    nearest: Rounding | None,
    hypotheses: Sequence[Hypothesis],
    formats: Mapping[str, Rounding],
) -> Sums:
    """Return the sums over the elements of one block, of which all arrays have one shape and one dtype.

    Args:
        base: W.
        merged: M, whose elements are numbers that `nearest` can return.
        delta: D.
        nearest: Q, the rounding to the nearest number that the format of M has at each place; None if these numbers
            are not known, so that every residual counts as explained.
        hypotheses: Hypotheses to compute sums for; erasure needs `ABSENT` and `ONCE`.
        formats: Roundings by the names in `Hypothesis.via`.
    """
    change, squares = merged - base, delta * delta
    sums = Sums(base.size, _dot(base, base), float(squares.sum(dtype=np.float64)), _dot(delta, change))
    changes, product = change * change, delta * change
    sums.yy = float(changes.sum(dtype=np.float64))
    sums.moments = _dot(squares, changes), _dot(squares, product), _dot(squares, squares)
    stored: dict[Hypothesis, Numbers] = {}
    for hypothesis in hypotheses:
        found, start = Explained(), base
        if hypothesis.via is not None:
            start = formats[hypothesis.via](base)
        target = start if hypothesis.factor == 0 else start + base.dtype.type(hypothesis.factor) * delta
        if hypothesis.via is not None:
            held = formats[hypothesis.via](target)
            found.before, target = _dot(held - target, held - target), held
        written = target if nearest is None else nearest(target)
        off, error = merged - written, written - target
        found.different = int(np.count_nonzero(off != 0))  # of a mask, which NumPy counts ten times as fast
        found.error = _dot(error, error)
        found.excess = _dot(off, off + 2 * error) if found.different and nearest is not None else 0.0
        found.shift = _dot(delta, written - base)
        sums.explained[hypothesis] = found
        stored[hypothesis] = written
    if ABSENT in stored and ONCE in stored:
        kept = stored[ONCE] - stored[ABSENT]
        sums.erased = float(squares[kept == 0].sum(dtype=np.float64))
        lost = kept - delta
        sums.lost = _dot(lost, lost)
    return sums


def _dot(one: Numbers, other: Numbers) -> float:
    return float(np.dot(one.reshape(-1), other.reshape(-1)))
