"""The multiple of delta_W in a merged weight, and whether rounding explains the rest; NumPy alone, block by block.

Of a module, W is the base model's weight, M the merged one, both as their files hold them, and D is delta_W:

    s   = <D, M - W> / <D, D>        strength by least squares: 1 if D was added once, 0 if it was not
    P_c = Q(W + c D)                 file of a merge by the factor c: Q rounds to the nearest number of M's format
    s_c = <D, P_c - W> / <D, D>      strength of that file, which differs from c where rounding erases a part of D
    X_c = |M - W - c D|^2 - |P_c - W - c D|^2

P_c is the nearest number to W + c D that M's format has at each place, so X_c is never negative, and it is zero if M is
that file. Where a merge rounds before it adds, its sum differs by some h from W + c D, and

    X_c <= 4 |P_c - W - c D| |h| + 4 |h|^2,

since |M - T| <= |Q(T) - T| + 2 |h| at each place, with T = W + c D. A factor explains a weight if s is near s_c and X_c
within this bound, in the whole and in every row: a merge that left out some rows is none. In a row, |h| is at most
IMPRECISION times the norm of |B| |A|, since B A may cancel there.

The interval of s comes from the residuals r = M - W - s D, which rounding leaves: the standard error is
sqrt(sum (sum D r)^2) / <D, D>, whatever their sizes; the inner sum is over a run of elements (White 1980,
doi:10.2307/1912934, for runs of one; Liang and Zeger 1986, doi:10.1093/biomet/73.1.13, for longer ones).

Sums are computed in float32 where that can show the rounding of M's format, in runs of n elements, whose sums are
added up in float64. With u the unit roundoff, g = gamma_k of k = n + 4 roundings (gamma_k = k u / (1 - k u), Higham
2002, section 3.1), and e = gamma_{r+2} | |B| |A| |, the bound of what rounding does to D, from r x r matrices:

    |<D, Y> - its sum|  <=  (g |D| + e) |Y|            so that the strength errs by at most
    |s - its value|     <=  ((g + e / |D|) |M - W| + (g + 2 e / |D|) |s| |D|) / |D|,

and T errs by at most u |T| + |c| e, which is a part of |h|. `Sums.arithmetic` and `Sums.allowed` add these.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from loraover.checkpoint.error_bounds import U32, U64, gamma
from loraover_export.merged.matrices import Numbers, Rounding, nearest_bf16, nearest_f16

STANDARD_ERRORS = 5.0
"""Half the width of the interval of a strength: one of two million normal draws is outside."""

IMPRECISION = 2.0**-7
"""Largest relative error of delta_W as mergers compute it: three roundings to bfloat16."""

ARITHMETIC = 2.0**-23
"""Largest relative error of a sum that a merger computes in float32."""

LOOSE = 0.05
"""Share by which a quantiser's squared error may exceed that of rounding to the nearest number."""

FAINT = 0.01
"""Strength of a right merge after rounding below which the number format has erased the adapter."""


VIA: Mapping[str, Rounding] = {"BF16": nearest_bf16, "F16": nearest_f16}
"""Formats in which mergers may compute sums before they store them in another format."""

SEARCHED = 16
"""Number of parts of a block that is measured in float32, of which the first is searched for erasure."""

FEW = 1 / 8
"""Share of elements that differ, below which these are taken out and summed alone."""

RUN, SHORTEST = 2048, 64
"""Largest number of elements that are summed in float32, whose sums are added up in float64. A row is cut into
such runs if its length has a divisor from `SHORTEST` on."""

UNITS = {np.dtype(np.float32): U32, np.dtype(np.float64): U64}


@dataclass(frozen=True)
class Hypothesis:
    """Assumption on a merger: its file is Q(via(via(W) + factor D)).

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
    """Sums over a module's elements for one hypothesis; P is its file, and T the sum before the rounding to P.

    Args:
        excess: X, in squared units of the weight.
        error: Sum of squares of P - T, over the blocks in which it is needed to explain the excess.
        spared: The same over all other blocks, as |M - T|^2 - X, whose terms are known. No verdict depends on it, since
            float32 leaves an error of up to gamma_k (|M - W| + |c| |D|)^2.
        off: Sum of squares of M - P.
        before: Sum of squares of the rounding before storage.
        shift: <D, P - W>.
        different: Number of elements in which M is not P, nor as near.
        torn: Number of rows whose own excess rounding does not explain.
    """

    excess: float = 0.0
    error: float = 0.0
    spared: float = 0.0
    off: float = 0.0
    before: float = 0.0
    shift: float = 0.0
    different: int = 0
    torn: int = 0


@dataclass
class Sums:
    """Sums over a module's elements, which give its strength and verdict; they are added up over blocks.

    Args:
        elements: Number of elements.
        size: Sum of squares of W.
        dd: <D, D>.
        dy: <D, M - W>.
        yy: <M - W, M - W>.
        moments: With the sums d, y and z of D^2, D (M - W) and (M - W)^2 over a run, the sums of y^2, of d y,
            of d^2 and of d z over all runs. A run is one element in float64.
        erased: Sum of squares of D in elements whose stored number is the same with and without the merge.
        erasable: <D, D> over the rows in which these were looked for.
        unit: Unit roundoff u of the coarsest number format that was computed in.
        run: Largest number of elements in a run.
        spread: Bound e of the norm of what that format does to D.
        explained: Sums of each hypothesis.
    """

    elements: int = 0
    size: float = 0.0
    dd: float = 0.0
    dy: float = 0.0
    yy: float = 0.0
    moments: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0)
    erased: float = 0.0
    erasable: float = 0.0
    unit: float = 0.0
    run: int = 0
    spread: float = 0.0
    explained: dict[Hypothesis, Explained] = field(default_factory=dict)

    def add(self, other: Sums) -> None:
        """Add the sums of other elements."""
        for name in ("elements", "size", "dd", "dy", "yy", "erased", "erasable"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.unit, self.run = max(self.unit, other.unit), max(self.run, other.run)
        self.spread = math.hypot(self.spread, other.spread)
        self.moments = tuple(map(operator.add, self.moments, other.moments))
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
        s, (y2, dy, d2, _) = self.strength, self.moments
        return STANDARD_ERRORS * math.sqrt(max(0.0, y2 - 2 * s * dy + s * s * d2)) / self.dd

    @property
    def arithmetic(self) -> float:
        """Bound of what the number format of the computation changes in the strength, and in half its interval."""
        if not self.dd:
            return 0.0
        g, norm, s = gamma(self.run + 4, self.unit), math.sqrt(self.dd), abs(self.strength)
        e, (_, _, d2, dz) = self.spread / norm, self.moments
        mean = (g + e) * math.sqrt(self.yy) / norm + (g + 2 * e) * s
        return mean + STANDARD_ERRORS * g * (math.sqrt(dz) + s * math.sqrt(d2)) / self.dd

    @property
    def residual(self) -> float:
        """Frobenius norm of M - W - s D."""
        return math.sqrt(max(0.0, self.yy - self.strength * self.dy))

    def expected(self, hypothesis: Hypothesis) -> float:
        """Return the strength of the file that a hypothesis writes."""
        return self.explained[hypothesis].shift / self.dd if self.dd else 0.0

    def allowed(self, hypothesis: Hypothesis, *, is_quantised: bool) -> float:
        """Return the largest excess that rounding explains, in squared units of the weight."""
        found, factor = self.explained[hypothesis], abs(hypothesis.factor)
        imprecision = (IMPRECISION * factor) ** 2 * self.dd
        # Of a number that is rounded before it is stored, an error of D changes the result by a whole spacing, where
        # it does: sum spacing |h| <= sqrt(sum spacing^2) |h|, and the squared error of rounding is spacing^2 / 12.
        merger = imprecision + math.sqrt(12 * found.before * imprecision) + ARITHMETIC**2 * self.size
        ours = self.unit * (math.sqrt(self.size) + factor * math.sqrt(self.dd)) + factor * self.spread
        h = math.sqrt(merger) + ours
        summed = gamma(self.run + 4, self.unit) * (found.off + 2 * math.sqrt(found.off * found.error))
        return LOOSE * is_quantised * found.error + 4 * math.sqrt(found.error) * h + 4 * h * h + summed

    def fits(self, hypothesis: Hypothesis, *, is_quantised: bool) -> bool:
        """Whether a hypothesis explains the merged weight, by its strength and by its residual."""
        near = self.half_width + self.arithmetic + IMPRECISION * abs(hypothesis.factor)
        return (
            abs(self.strength - self.expected(hypothesis)) <= near
            and not self.explained[hypothesis].torn
            and self.explained[hypothesis].excess <= self.allowed(hypothesis, is_quantised=is_quantised)
        )  # fmt: skip


class Room:
    """Memory that a thread computes in again and again; new memory would be cleared by the system each time."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, Any], Any] = {}
        self._views: dict[tuple[str, tuple[int, ...], Any], Any] = {}

    def get(self, name: str, shape: tuple[int, ...], dtype: Any) -> Any:
        """Return the array of a name, in a shape, with the numbers that were left in it."""
        view = self._views.get((name, shape, dtype))
        if view is None:
            size, kept = math.prod(shape), self._kept.get((name, dtype))
            if kept is None or kept.size < size:
                self._views = {key: each for key, each in self._views.items() if key[::2] != (name, dtype)}
                kept = self._kept[name, dtype] = np.empty(size, dtype)
            view = self._views[name, shape, dtype] = kept[:size].reshape(shape)
        return view


def measure(
    base: Numbers,
    merged: Numbers,
    delta: Numbers,
    nearest: Rounding | None,
    hypotheses: Sequence[Hypothesis],
    *,
    reach: NDArray[np.float64] | None = None,
    is_quantised: bool = False,
    holds_base: bool = False,
    room: Room | None = None,
) -> Sums:
    """Return the sums over the elements of a block; all arrays have the same shape and dtype.

    Args:
        base: W.
        merged: M, whose elements are values of `nearest`.
        delta: D.
        nearest: Q, the rounding to the nearest number that the format of M has at each place; None if these numbers
            are not known, so that every residual counts as explained.
        hypotheses: Hypotheses to compute sums for; erasure needs `ABSENT`, and `ONCE` after it.
        reach: Largest |h| of each row for the factor 1, squared; None to leave rows unjudged.
        is_quantised: Whether elements of M share scales.
        holds_base: Whether the format of M has every number of W's.
        room: Memory to compute in.
    """
    run = _run_length(base.shape[-1]) if base.dtype == np.float32 and base.size else 0
    runs = (base.size // run, run) if run else base.shape
    base, merged, delta = (each.reshape(runs) for each in (base, merged, delta))
    get = partial((room or Room()).get, shape=runs, dtype=base.dtype)
    change = np.subtract(merged, base, out=get("change"))
    dd, dy, yy, ww = (_runs(*pair) for pair in ((delta, delta), (delta, change), (change, change), (base, base)))
    sums = Sums(base.size, float(ww.sum()), float(dd.sum()), float(dy.sum()), float(yy.sum()))
    sums.moments = float(np.vdot(dy, dy)), float(np.vdot(dd, dy)), float(np.vdot(dd, dd)), float(np.vdot(dd, yy))
    sums.unit, sums.run = UNITS[base.dtype], run
    rows = None if reach is None or not base.size else _Rows(reach, _by_row(ww, reach), sums.unit, run, is_quantised)
    absent: Numbers | None = None
    changed = _nonzero(change) if holds_base else 0  # before its memory is used again
    for hypothesis in hypotheses:
        if hypothesis == ABSENT and holds_base:
            found, written = Explained(sums.yy, off=sums.yy, different=changed), base
            found.torn = 0 if rows is None else rows.torn(ABSENT, yy, yy, 0 * yy)
        else:
            found, written = _explain(base, merged, delta, nearest, hypothesis, get, rows, sums)
            found.shift = sums.dy - found.shift
        sums.explained[hypothesis] = found
        if hypothesis == ABSENT:
            absent = written if written is base else written.copy()
        elif hypothesis == ONCE and absent is not None:
            first = slice(0, len(delta) if base.dtype == np.float64 else -(-len(delta) // SEARCHED))
            kept = np.multiply(delta[first], written[first] == absent[first], out=get("off")[first])
            sums.erased, sums.erasable = _dot(kept, kept), float(dd[first].sum())
    return sums


class _Rows(NamedTuple):
    """Rows of a block, whose excess is judged one by one: the parts of `Sums.allowed`, for each row.

    Args:
        reach: Largest |h| for the factor 1, squared.
        size: Sum of squares of W.
        unit: Unit roundoff of the computation.
        run: Number of elements in a run.
        is_quantised: Whether elements share scales, so that a quantiser may err as much again as the nearest numbers.
    """

    reach: NDArray[np.float64]
    size: NDArray[np.float64]
    unit: float
    run: int
    is_quantised: bool

    def explain(self, hypothesis: Hypothesis, found: Explained, sums: Sums, *by_row: NDArray[np.float64]) -> bool:
        """Whether the excess, also by rows, is explained by the part of `Sums.allowed` in which P - T does not occur.

        The excess is then below that of the block's share, so that its sum over blocks is explained too.
        """
        share = 4 * (IMPRECISION * hypothesis.factor) ** 2 * sums.dd
        return found.excess <= share and not self.torn(hypothesis, *by_row, np.zeros(len(self.reach)))

    def torn(self, hypothesis: Hypothesis, *runs: NDArray[np.float64]) -> int:
        """Count rows, given the excess, the squares of M - P and those of P - T, by runs or by rows."""
        excess, off, error = (_by_row(each, self.reach) for each in runs)
        h = abs(hypothesis.factor) * np.sqrt(self.reach) + (ARITHMETIC + 2 * self.unit) * np.sqrt(self.size)
        summed = gamma(self.run + 4, self.unit) * (off + 2 * np.sqrt(off * error))
        allowed = self.is_quantised * error + 4 * np.sqrt(error) * h + 4 * h * h + summed
        return int(np.count_nonzero(excess > allowed))


def _by_row(runs: NDArray[np.float64], rows: NDArray[np.float64]) -> NDArray[np.float64]:
    found: NDArray[np.float64] = runs.reshape(len(rows), -1).sum(1)
    return found


def _explain(
    base: Numbers,
    merged: Numbers,
    delta: Numbers,
    nearest: Rounding | None,
    hypothesis: Hypothesis,
    get: Any,
    rows: _Rows | None,
    sums: Sums,
) -> tuple[Explained, Numbers]:
    """Return the sums of a hypothesis, with <D, M - P> in place of the shift, and P."""
    found = Explained()
    target, found.before = _sum(base, delta, hypothesis, get)
    written = get("written")
    if nearest is None:
        np.copyto(written, target)
    else:
        nearest(target, written)
    differs = np.not_equal(merged, written, out=get("differs", dtype=np.bool_))
    found.different = int(np.count_nonzero(differs))
    if nearest is None:
        found.shift = _dot(delta, merged - written) if found.different else 0.0
        return found, written
    rows = rows if hypothesis.via is None else None  # what is rounded before has no bound in a single row
    few = found.different < FEW * base.size
    by_row = _add_few(found, merged, written, target, delta, np.flatnonzero(differs), rows) if few else []
    if few and rows is not None and rows.explain(hypothesis, found, sums, *by_row):
        c = hypothesis.factor
        found.spared = max(0.0, sums.yy - 2 * c * sums.dy + c * c * sums.dd - found.excess)
        return found, written
    error = np.subtract(written, target, out=get("error"))
    errors = _runs(error, error)
    found.error = float(errors.sum())
    if not few:
        off = np.subtract(merged, written, out=get("off"))
        squares = _runs(off, off)
        by_row = [squares + 2 * _runs(off, error), squares]
        found.shift, found.off, found.excess = _dot(delta, off), float(squares.sum()), float(by_row[0].sum())
    if rows is not None:
        found.torn = rows.torn(hypothesis, *by_row, errors)
    return found, written


def _sum(base: Numbers, delta: Numbers, hypothesis: Hypothesis, get: Any) -> tuple[Numbers, float]:
    """Return the sum T of a hypothesis, and the squares of what is rounded before storage."""
    start, target = base, get("change")
    if hypothesis.via is not None:
        start = get("start")
        VIA[hypothesis.via](base, start)
    if hypothesis.factor == 1:
        np.add(start, delta, out=target)
    else:
        np.multiply(delta, base.dtype.type(hypothesis.factor), out=target)
        target += start
    if hypothesis.via is None:
        return target, 0.0
    held = get("held")
    VIA[hypothesis.via](target, held)
    target -= held
    return held, _dot(target, target)


def _add_few(
    found: Explained,
    merged: Numbers,
    written: Numbers,
    target: Numbers,
    delta: Numbers,
    at: NDArray[np.intp],
    rows: _Rows | None,
) -> list[NDArray[Any]]:
    """Add up the elements in which M is not P, given their indices; return the excess and the squares by row."""
    m, p, t, d = (each.reshape(-1)[at].astype(np.float64) for each in (merged, written, target, delta))
    off = m - p
    squares, excess = off * off, off * (off + 2 * (p - t))
    found.different = int(np.count_nonzero(excess))  # two numbers may be equally near
    found.shift, found.off, found.excess = float(d @ off), float(squares.sum()), float(excess.sum())
    if rows is None:
        return []
    row = at // (merged.size // len(rows.reach))
    return [np.bincount(row, each, len(rows.reach)) for each in (excess, squares)]


@cache
def _run_length(columns: int) -> int:
    """Return the number of elements that are summed in float32 at once, a divisor of the columns."""
    best = max(size for size in range(1, RUN + 1) if columns % size == 0)
    return best if best >= SHORTEST else columns


def _runs(one: Numbers, other: Numbers) -> NDArray[np.float64]:
    """Return the scalar products of runs, which are rows in float32 and elements in float64, as float64."""
    if one.dtype == np.float64:
        return one * other
    found: NDArray[np.float64] = np.vecdot(one, other).astype(np.float64)
    return found


def _nonzero(numbers: Numbers) -> int:
    """Count numbers that are not zero; of whole numbers, NumPy counts them several times as fast."""
    return int(np.count_nonzero(numbers.view(np.uint32 if numbers.dtype == np.float32 else np.uint64)))


def _dot(one: Numbers, other: Numbers) -> float:
    if one.dtype == np.float64:
        return float(np.vdot(one, other))
    return float(np.vecdot(one, other).sum(dtype=np.float64))
