"""Answers on keys and values that a server has kept, beside answers without them.

The long questions of a reference begin alike. Each is asked cold, so that the server reads all of it, and warm, after
the same and other models have read it. On a right server, warm and cold answers differ by rounding alone. The size of
this noise is measured with the base model, in a cache that holds nothing else. Let y be the difference of a warm answer
from the cold one, and d the difference of PyTorch's answer on another model's keys and values from the right one. The
strength s of d in y is 0 on a right server, and 1 if the server uses that model's keys and values. A fault is found if
all of the interval of s is nearer to 1, and excluded if all of it is nearer to 0.

All questions share the keys and values of one beginning, and thereby a part of their noise. The interval is made wider
by the strength of d in the base model's noise.

Before a reload that is to be checked, the server reads the questions for the earlier version of the adapter. If the
adapter answers the same after the reload, or if the server has kept nothing from before it, no stale answer could be
seen, and nothing is decided.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from loraover.common.errors import EngineError
from loraover_serve.judge.asker import Asker
from loraover_serve.judge.case import fit_along, most_noise, strength_along
from loraover_serve.judge.estimates import Interval, log_ratio
from loraover_serve.judge.evidence import Change, apart, by_prompt, difference, middle_by_prompt, projected
from loraover_serve.judge.limits import ADAPTER, BASE, CERTAIN, EXCESS, EXIT_CODES, FEW_AS_BASE, FLOOR, OTHER
from loraover_serve.judge.models import Models, Row, Rows
from loraover_serve.judge.names import OF_EARLIER_WEIGHTS, STALE_OF_OTHERS
from loraover_serve.judge.own_prompts import OwnPrompts
from loraover_serve.judge.results import Caches, FurtherCheck, LogprobDistance, Off, Reload, WarmAnswers
from loraover_serve.judge.search import ROUNDED_WAY
from loraover_serve.judge.user_command import CommandError, UserCommand
from loraover_serve.judge.warm_probe import MOST_SLOTS, Asked, Reloaded, WarmProbe, takes_salt

NO_SLOTS: dict[str, Any] = {
    "verdict": "inconclusive",
    "reason": "prompts that llama-server keeps in host memory were not checked, since the server does not report its "
    f"number of slots, or has too many: allow requests to /props, and start the server with at most {MOST_SLOTS}",
}

HALF_WAY = 0.5
"""Strength of an answer that is as far from a right one as from one on another model's keys and values."""


def beside(found: Mapping[str, Any], name: str, part: FurtherCheck) -> dict[str, Any]:
    """Add the answers on kept keys and values, or those in churn, to the result of a check.

    Args:
        found: Fields of an engine's result in verify.json.
        name: Name of the part's field.
        part: Answers on kept keys and values, or in churn.

    Returns:
        The fields with the part, with the worse verdict of the two, its sentence first, and with all that neither
        checked. If both are "differs", the fault of the cache is named, since it may have caused the other one.
    """
    both = [*EXIT_CODES].index(part.verdict), [*EXIT_CODES].index(found["verdict"])
    is_first = both[0] < both[1] or (both == (0, 0) and name == "caches")
    first, second = (part.reason, found["reason"]) if is_first else (found["reason"], part.reason)
    verdict = {"verdict": part.verdict, "fault": part.fault} if is_first else {}
    not_checked = [*found["not_checked"], *part.not_checked]
    return {
        **found,
        **verdict,
        "reason": "; ".join(filter(None, (first, second))),
        "not_checked": not_checked,
        name: part,
    }


def ask_warm(asker: Asker, reload: UserCommand | None = None) -> Caches:
    """Ask a server the long questions without and with its cache, and judge the answers; a refusal is inconclusive.

    Args:
        asker: The server, with the long questions.
        reload: Command that makes the server load the adapter anew, after it has answered with its earlier version.

    Raises:
        CommandError: The command failed.
    """
    dialect, unfit = asker.speaker.dialect, ""
    if asker.is_one_model:
        unfit = "the server has one model under both names"
    elif not takes_salt(asker):
        unfit = (
            f"the server speaks {dialect.protocol} and has no field that bypasses its cache, expected cache_salt "
            "(vLLM) or cache_prompt (llama-server)"
        )
    if unfit:
        if reload is not None:
            reload.run(asker.speaker.endpoint.ends)
        return _unclear(unfit)
    try:
        probe = WarmProbe(asker)
        reloaded = None if reload is None else probe.reload(reload)
        cold, noise, warm, hits = probe.answers()
        if isinstance(asker.models, OwnPrompts):
            asker.models.sensitivity = _sensitivity(asker.models, cold, {BASE: noise, ADAPTER: probe.on_own(ADAPTER)})
        found = judge_warm(asker.models, cold, noise, warm, hits, reloaded)
        return found if found.verdict != "as trained" or probe.is_complete else replace(found, **NO_SLOTS)
    except CommandError:
        raise
    except EngineError as error:
        return _unclear(str(error))


def _sensitivity(models: Models, cold: Mapping[str, Asked], on_own: Mapping[str, Asked]) -> float:
    """Ratio of the adapter's noise to the base model's, measured on the server; at least 1."""
    base, adapter = (
        _WarmCase(models, {BASE: cold[arm]}, on_own[arm]._replace(arm=BASE)).noise.rms + FLOOR
        for arm in (BASE, ADAPTER)
    )
    return max(1.0, adapter / base)


def _unclear(why: str) -> Caches:
    return Caches("inconclusive", f"the server's KV cache was not checked: {why}", None)


def judge_warm(
    models: Models,
    cold: Mapping[str, Asked],
    noise: Asked,
    warm: Sequence[Asked],
    hits: int | None,
    reloaded: Reloaded | None = None,
) -> Caches:
    """Judge answers on kept keys and values.

    Args:
        models: The long questions, with the right models and those on other models' keys and values.
        cold: Answers of each arm without a cache.
        noise: The base model's answers in a cache that nothing else was put into.
        warm: Answers in the cache that all models share, in the order of the requests.
        hits: Number of tokens of the warm answers that were found in the cache; None if the server does not tell.
        reloaded: Reload before all of them; None if there was none.
    """
    case = _WarmCase(models, cold, noise)
    found = [case.judged(each) for each in (noise, *warm)]
    shown = Caches("differs", "", None, hits, [answers for answers, _, _ in found], noise=case.noise)
    after = ""
    if reloaded is not None:
        off = LogprobDistance.of(case.off(reloaded.before))
        shown = replace(shown, reload=Reload(reloaded.command, reloaded.seconds, reloaded.roots, off))
        after = _after(reloaded)
    for answers, fault, detail in found:
        if fault is not None:
            reason = f"{fault}: answers of {_named(answers.arm)} {answers.after} are wrong, since {detail}"
            return replace(shown, reason=reason + after, fault=fault)
    why = _undecided(case, cold, (noise, *warm), hits, reloaded, shown)
    if why is not None:
        return replace(shown, verdict="inconclusive", reason=f"the server's KV cache: {why}")
    reason = f"answers with and without the server's KV cache are the same ({hits} tokens came from it){after}"
    return replace(shown, verdict="as trained", reason=reason)


def _undecided(
    case: _WarmCase,
    cold: Mapping[str, Asked],
    asked: Sequence[Asked],
    hits: int | None,
    reloaded: Reloaded | None,
    shown: Caches,
) -> str | None:
    """Reason why answers without a fault do not prove the cache right; None if they do."""
    ignored = sum(each.cached or 0 for each in cold.values())
    if ignored:
        return (
            f"the server found {ignored} tokens in its cache where none were expected: it ignores cache_salt and "
            "cache_prompt, or answers other clients, so its answers without the cache are not known"
        )
    if not hits:
        told = "does not report cache hits" if hits is None else "found none"
        return (
            f"no prompt was seen to use the cache (the server {told}): start llama-server with its prompt cache, vLLM "
            "with --enable-prefix-caching and --enable-prompt-tokens-details, or allow requests to /metrics"
        )
    if few := [each for each in asked if case.lacking(each) >= FEW_AS_BASE]:
        return (
            f"{case.lacking(few[0])} answers of {_named(few[0].arm)} {few[0].after} share no token with those without "
            "the cache, so too few answers were compared: make the server list more logprobs for each token"
        )
    if reloaded is not None and not reloaded.is_kept:
        told = "does not report whether it had cached" if reloaded.is_kept is None else "had cached nothing of"
        return (
            f"the server {told} the base model's prompts from before the command, so no stale answer could be seen "
            f"(load the adapter without a restart of the server){_after(reloaded)}"
        )
    if reloaded is not None and shown.reload is not None and not case.is_changed(reloaded.before):
        return (
            "the adapter gives the same answers before and after the command, so no stale answer could be seen (serve "
            f"its earlier version before the command){_after(reloaded)}"
        )
    if unclear := sorted({fault for answers in shown.warm for fault in case.unclear(answers)}):
        return (
            f"a {', a '.join(unclear)} would not be seen, since the server's noise hides it (check a server with a "
            "finer number format)"
        )
    return None


def _after(reloaded: Reloaded) -> str:
    """Clause about the folder that the server names after a reload, to be added to a reason."""
    before, root = reloaded.roots
    if root is None:
        return ""
    return f", and the server names the {'same' if root == before else 'new'} path {root} after the command"


def _named(arm: str) -> str:
    return {BASE: "the base model", ADAPTER: "the adapter", OTHER: "another adapter"}[arm]


class _WarmCase:
    """Warm answers beside cold ones."""

    def __init__(self, models: Models, cold: Mapping[str, Asked], noise: Asked) -> None:
        self._models, self._cold = models, {arm: each.rows for arm, each in cold.items()}
        self._noise_rows, self._noise_off = noise.rows, self.off(noise)
        self.noise = LogprobDistance.of(self._noise_off)

    def judged(self, asked: Asked) -> tuple[WarmAnswers, str | None, str]:
        """Warm answers, the name of the fault that they show, and its description."""
        off = self.off(asked)
        strengths, explained = dict[str, Interval](), list[tuple[float, str, str]]()
        for model in self._models.recorded(asked.arm):
            if model.fault in OF_EARLIER_WEIGHTS:  # only answers in churn may be of them
                continue
            changes = [*self._changes(asked.arm, asked.rows, model.rows)]
            found = self._strength(asked, changes, model.rows)
            if found is not None:
                strengths[model.fault] = found
                if found.low > HALF_WAY:
                    explained.append((apart(changes), model.fault, model.detail))
        answers = WarmAnswers(asked.arm, asked.after, asked.cached, LogprobDistance.of(off), strengths)
        if explained:
            _, fault, detail = min(explained)
            found = strengths[fault]
            if abs(found.value - 1) <= ROUNDED_WAY + found.half:
                return answers, fault, detail
            return answers, STALE_OF_OTHERS, f"they continue keys and values of other weights, as in a {fault}"
        far = () if asked.rows is self._noise_rows else self._far(off)
        if len(far) >= FEW_AS_BASE:
            far_off = f"{len(far)} of {len(by_prompt(off))} differ from those without the cache"
            return answers, STALE_OF_OTHERS, f"{far_off}, and no known fault explains it"
        return answers, None, ""

    @staticmethod
    def unclear(answers: WarmAnswers) -> Iterator[str]:
        """Yield the faults that answers neither show nor exclude."""
        for fault, found in answers.strengths.items():
            if found.low <= HALF_WAY <= found.high:
                yield fault

    def is_changed(self, asked: Asked) -> bool:
        """Whether answers are further from the cold ones than noise explains."""
        off, there, usual = self.off(asked), by_prompt(self._noise_off), self.noise.rms
        noise = {q: self._models.sensitivity * max(there.get(q, 0.0), usual) + FLOOR for q in by_prompt(off)}
        excess = log_ratio([mine + FLOOR for mine in by_prompt(off).values()], [*noise.values()])
        return len(self._far(off)) >= FEW_AS_BASE or excess.low > math.log(EXCESS)

    def _strength(self, asked: Asked, changes: Sequence[Change], stale: Sequence[Row]) -> Interval | None:
        """Strength of a fault in answers; None if the fault would not change them."""
        effect = math.sqrt(fmean(each.size / each.tokens for each in changes)) if changes else 0.0
        if effect <= FLOOR:
            return None
        found = fit_along(changes)
        if asked.rows is self._noise_rows:
            return found.interval
        sensitivity = self._models.sensitivity
        bounded = found.within(most_noise(changes, sensitivity * self.noise.rms))
        common = strength_along([*self._changes(BASE, self._noise_rows, stale, asked.arm)])
        return Interval.around(bounded.value, bounded.half + sensitivity * abs(common.value))

    def _changes(self, arm: str, rows: Rows, stale: Sequence[Row], of: str | None = None) -> Iterator[Change]:
        """Project the differences of an arm's warm rows from the cold ones on a fault of this or another arm."""
        right = self._models.base if (of or arm) == BASE else self._models.adapter
        for place, ids, off in self._pairs(arm, rows):
            known = [
                (value, stale[place][i] - right.rows[place][i])
                for i, value in zip(ids, off, strict=True)
                if i in stale[place]
            ]
            if known:
                yield projected(self._models.places[place][0], *zip(*known, strict=True))

    def _pairs(self, arm: str, rows: Rows) -> Iterator[tuple[int, list[int], list[float]]]:
        for place, row in sorted(rows.items()):
            cold = self._cold[arm].get(place, {})
            ids = [i for i in row if i in cold]
            if ids:
                yield place, ids, [row[i] - cold[i] for i in ids]

    def off(self, asked: Asked) -> list[Off]:
        """Differences of answers from the cold ones; if they share no token, the smallest possible difference."""
        cold, found = self._cold[asked.arm], list[Off]()
        for place, row in sorted(asked.rows.items()):
            if place in cold:
                off = difference(row, cold[place])
                found.append(Off(self._models.places[place][0], fmean([d * d for d in off]), max(map(abs, off))))
        return found

    def lacking(self, asked: Asked) -> int:
        """Number of questions whose warm answers share no token with the cold ones."""
        expected, compared = (
            {self._models.places[place][0] for place in places}
            for places in (self._cold[asked.arm], [place for place, _, _ in self._pairs(asked.arm, asked.rows)])
        )
        return len(expected - compared)

    def _far(self, off: Sequence[Off]) -> list[int]:
        """Questions whose warm answers are CERTAIN times as far from the cold ones as noise explains."""
        there = by_prompt(self._noise_off)
        limit = {
            q: CERTAIN * (self._models.sensitivity * max(there.get(q, 0.0), self.noise.rms) + FLOOR)
            for q in by_prompt(off)
        }
        return [prompt for prompt, mine in middle_by_prompt(off).items() if mine > limit[prompt] - FLOOR]
