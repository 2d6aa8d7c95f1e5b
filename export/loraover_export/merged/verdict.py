"""Verdict on a module: which merge, if any, its weight is the file of, as far as rounding lets it be told."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from loraover_export.merged.changes import AdapterChange, AddedDelta
from loraover_export.merged.matrices import FLOATS, Overlap
from loraover_export.merged.meter import SAMPLED, Meter
from loraover_export.merged.report import ModuleStrength, ModuleVerdict
from loraover_export.merged.strength import ABSENT, FAINT, IMPRECISION, ONCE, STANDARD_ERRORS, VIA, Hypothesis, Sums

NEIGHBOURS = (0.75, 1.25)
"""Factors that must be excluded, like the known wrong ones, before a module is called merged."""

SECANT_STEPS = 4


@dataclass(frozen=True)
class StoredModule:
    """An adapted module in both models' files.

    Args:
        change: What the adapter changes.
        places: Where its weights are.
        is_transposed: Whether they are stored as (in_features, out_features).
        dtype: Number format of the merged weight, for people.
    """

    change: AdapterChange
    places: Sequence[Overlap]
    is_transposed: bool
    dtype: str


class Judge:
    """Verdict on one module, by the sums that it asks for.

    Args:
        module: The module.
        meter: Meter of sums.

    Attributes:
        norm: Squared norm of the delta, after `judge`.
    """

    def __init__(self, module: StoredModule, meter: Meter) -> None:
        self.module, self.meter, self.norm = module, meter, 0.0
        delta = module.change.read()
        self._delta = delta.mT if module.is_transposed else delta
        self._is_quantised = any(place.merged.is_quantised for place in module.places)

    def judge(self) -> ModuleStrength:
        """Judge by the usual two hypotheses, and where these do not decide, by every other one."""
        self.norm = self._delta.norm() ** 2
        unchanged = self._unchanged()
        if unchanged is not None:
            return unchanged
        sums = self._measured([ABSENT, ONCE])
        if not self.norm:
            if self._fits(sums, ABSENT):
                return self._verdict("nothing to merge", sums, ABSENT, "the delta is zero")
        elif self._is_faint(sums) and (self._fits(sums, ONCE) or self._fits(sums, ABSENT)):
            reason = f"{self.module.dtype} rounds a right merge to the base weight"
            return self._verdict("rounded away", sums, ABSENT, reason)
        elif self._fits(sums, ONCE) and not self._fits(sums, ABSENT) and self._is_told(sums):
            return self._verdict("merged", sums, ONCE)
        elif self._fits(sums, ABSENT) and not self._fits(sums, ONCE) and not sums.explained[ABSENT].different:
            return self._verdict("not merged", sums, ABSENT)
        else:
            decided = self._by_factor(sums)
            if decided is not None:
                return decided
        return self._misplaced(sums)

    def _unchanged(self) -> ModuleStrength | None:
        """Judge a weight with the base model's bytes by a sample of rows, if a right merge would have changed these."""
        if not self.norm or not self.meter.holds_same(self.module.places):
            return None
        rows = self.module.change.shape[0] * self.module.change.shape[1]
        sums = self._measured([ABSENT, ONCE], max(1, rows // SAMPLED))
        if self._fits(sums, ONCE) or self._is_faint(sums):
            return None
        return self._verdict("not merged", sums, ABSENT)

    def _measured(self, hypotheses: Sequence[Hypothesis], share: int = 1) -> Sums:
        return self.meter.measure(self.module.places, self._delta, hypotheses, share)

    def _fits(self, sums: Sums, hypothesis: Hypothesis) -> bool:
        return sums.fits(hypothesis, is_quantised=self._is_quantised)

    def _is_faint(self, sums: Sums) -> bool:
        """Whether the files of a merge and of its absence are too much alike."""
        return abs(sums.expected(ONCE) - sums.expected(ABSENT)) < FAINT

    def _is_told(self, sums: Sums) -> bool:
        """Whether a right merge is the file itself, or the strength can be told from that of every wrong factor."""
        if not sums.explained[ONCE].different:
            return True
        ratio, near = sums.expected(ONCE), sums.half_width + sums.arithmetic
        return all(
            abs(sums.strength - each.factor * ratio) > near + IMPRECISION * abs(each.factor)
            for each in (*self.module.change.factors, *map(Hypothesis, NEIGHBOURS))
        )

    def _verdict(self, name: ModuleVerdict, sums: Sums, by: Hypothesis, reason: str = "") -> ModuleStrength:
        s, norm = sums.strength, math.sqrt(sums.dd) or 1.0
        half = sums.half_width + sums.arithmetic
        return ModuleStrength(
            module=self.module.change.path,
            verdict=name,
            dtype=self.module.dtype,
            strength=s,
            interval=(s - half, s + half),
            expected=sums.expected(by if by.factor == 1 else ONCE),
            residual=sums.residual / norm,
            rounding=math.sqrt(sums.explained[by].error + sums.explained[by].spared) / norm,
            erased=sums.erased / (sums.erasable or 1.0),
            reason=reason,
        )

    def _by_factor(self, first: Sums) -> ModuleStrength | None:
        """Judge by all factors and ways of rounding; None if none explains the weight.

        If two hypotheses fit, the one whose file has fewer other elements than the merged file is more likely.
        """
        usual = self._fits(first, ONCE) or self._fits(first, ABSENT)
        ratio = first.expected(ONCE)
        free = [] if usual else [Hypothesis(c) for c in (first.strength, first.strength / (ratio if ratio > 0 else 1))]
        plain = [ABSENT, ONCE, *self.module.change.factors, *map(Hypothesis, NEIGHBOURS), *free]
        vias = [via for via in VIA if all(_is_plausible(via, place) for place in self.module.places)]
        sums = self._measured([*plain, *(replace(each, via=via) for each in plain for via in vias)])
        best = self._contenders(sums)
        if not best and free and sums.residual**2 <= 2 * sums.explained[free[0]].error:
            sums = self._refined(sums, free)
            best = self._contenders(sums)
        if not best:
            return None
        by = best[0]
        factors = {each.factor for each in best}
        once = next((each for each in best if each.factor == 1), None)
        if once is not None and abs(sums.expected(once) - sums.expected(replace(once, factor=0.0))) < FAINT:
            return self._verdict("rounded away", sums, ABSENT, "a right merge rounds to the base weight")
        if len(factors) > 1 and factors & {0.0, 1.0}:
            told = ", ".join(f"{factor:.3g}" for factor in sorted(factors))
            reason = f"rounding is larger than the delta, so the factors {told} cannot be distinguished"
            return self._verdict("undecided", sums, once or by, reason)
        if factors <= {0.0, 1.0}:
            through = "" if by.via is None else f"rounded to {by.via} first"
            return self._verdict("merged" if by.factor else "not merged", sums, by, through)
        if factors == {2.0}:
            return self._verdict("merged twice", sums, by, by.name)
        names = [each.name or f"merged {each.factor:.3g} times" for each in best]
        return self._verdict("another factor", sums, by, ", or ".join(dict.fromkeys(names)))

    def _contenders(self, sums: Sums) -> list[Hypothesis]:
        """Return the hypotheses that fit, best first, one for each factor that the number of different elements leaves.

        A factor without a name gives way to those that have one, and `NEIGHBOURS` only to wrong ones.
        """
        fitting = [each for each in sums.explained if self._fits(sums, each)]
        fitting.sort(key=lambda each: sums.explained[each].different)
        best: dict[float, Hypothesis] = {}
        for each in fitting:
            found, least = sums.explained[each].different, sums.explained[fitting[0]].different
            if found - least <= STANDARD_ERRORS * math.sqrt(found + least):
                best.setdefault(each.factor, each)
        usual = {0.0, 1.0}.intersection(best)
        known = [each for each in best.values() if each.name or each.factor in usual]
        if usual:
            return [each for each in best.values() if each in known or each.factor in NEIGHBOURS]
        free = [each for each in best.values() if each.factor not in NEIGHBOURS]
        return known or free[:1] or list(best.values())[:1]

    def _refined(self, sums: Sums, free: Sequence[Hypothesis]) -> Sums:
        """Find the factor whose file has the measured strength, by secant steps from two factors, and add its sums."""
        before, now = free
        for _ in range(SECANT_STEPS):
            rise = sums.expected(now) - sums.expected(before)
            step = (sums.strength - sums.expected(now)) * (now.factor - before.factor) / rise if rise else 0.0
            if not step:
                break
            before, now = now, Hypothesis(now.factor + step)
            sums.explained |= self._measured([now]).explained
        return sums

    def _misplaced(self, sums: Sums) -> ModuleStrength:
        """Judge a weight that no factor explains: the delta may lie wrongly in it, or it has other changes."""
        rows, columns = self.module.change.shape
        if rows == columns:
            flipped = self.meter.measure(self.module.places, self._delta.mT, [ABSENT, ONCE])
            if self._fits(flipped, ONCE):
                return self._verdict("transposed", flipped, ONCE, "the transposed delta was added")
        for reason, found in self._reordered():
            return self._verdict("rows in another order", found, ONCE, reason)
        return self._verdict("another base", sums, ONCE, "rounding does not explain the difference from the base model")

    def _reordered(self) -> Iterator[tuple[str, Sums]]:
        """Yield each wrong order that the rows of queries or keys may have, in words, with the sums for that order."""
        places = self.module.places
        merged = places[0].merged
        plain = merged.in_file_order()
        if plain is None:
            return
        delta = AddedDelta(self._delta.left[merged.order()], self._delta.right)
        for reason, where, what in (
            ("the rows of the delta were not reordered for llama.cpp", places, delta),
            ("the rows are not in llama.cpp's order", [places[0]._replace(merged=plain)], self._delta),
        ):
            sums = self.meter.measure(where, what, [ABSENT, ONCE])
            if self._fits(sums, ONCE) and not self._fits(sums, ABSENT):
                yield reason, sums


def _is_plausible(via: str, place: Overlap) -> bool:
    """Whether a merger may have computed a sum in a format; if both files share one of 16 bits, in no other."""
    before, after = place.base.type_name, place.merged.type_name
    return after != via and not (before == after and after in VIA)


def on_this_base(module: ModuleStrength) -> ModuleStrength:
    """Turn the verdict "another base" into "other changes", since all other tensors are the base model's."""
    if module.verdict != "another base" or module.interval is None:
        return module
    least, most = module.interval
    found = "changes other than this adapter's" if least <= 0 <= most else "more than the adapter's delta was added"
    reason = f"{found}, such as those of another adapter; all other tensors are the base model's"
    return module.model_copy(update={"verdict": "other changes", "reason": reason})


def judged_together(modules: Sequence[ModuleStrength]) -> list[ModuleStrength]:
    """Call merged modules merged by another factor if their strengths together are not those of right merges.

    A factor near 1 may be within the interval of every module, where rounding is large, and outside that of their mean.
    The mean's weights are the inverse squares of half the intervals, so that half its own is 1 / sqrt(sum of weights).
    Quantisers may shrink what they store, by weights that nobody knows here; floating-point formats do not.
    """
    merged = [m for m in modules if m.verdict == "merged" and m.dtype in FLOATS]
    ratios, weights = [], []
    for module in merged:
        strength, interval, expected = module.strength, module.interval, module.expected
        assert strength is not None and interval is not None and expected, "merged modules were measured"  # noqa: PT018
        ratios.append(strength / expected)
        weights.append(1 / (((interval[1] - interval[0]) / 2 / expected) ** 2 + IMPRECISION**2))
    total = sum(weights)
    factor = sum(map(operator.mul, weights, ratios)) / total if total else 1.0
    if not total or abs(factor - 1) <= IMPRECISION + 1 / math.sqrt(total):
        return list(modules)
    reason = f"merged {factor:.3g} times, as the {len(merged)} modules show together"
    return [m.model_copy(update={"verdict": "another factor", "reason": reason}) if m in merged else m for m in modules]
