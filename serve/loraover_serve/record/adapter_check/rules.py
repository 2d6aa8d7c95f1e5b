"""The rules of the verdict, which are those of verify/judge.py: the first that finds something decides."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import count
from typing import Any

from .base_faults import base_fault, cache_share
from .case import CLEAR, EXCESS, FEW, FEW_PROMPTS, FLOOR, SEEN, Case
from .reference import ADAPTER, BASE, FORMATS, OTHER, Model

FAR, EXACT_WAY, ROUNDED_WAY, NEAREST = 0.1, 0.1, 0.25, 4  # see verify/suspects.py
MISSED = 0.01
SHOWN = 16  # requests that are named

Finding = tuple[str, str, str | None]
"""Verdict, reason and fault."""


def finding(case: Case) -> Finding:
    """The first rule that finds something decides."""
    sensitivity, found, (low, high) = case.reference.sensitivity, case.strength, case.allowed
    noise, off = case.noise.rms, case.found.rms
    if (found_in_base := base_fault(case)) is not None:
        return found_in_base
    cache = cache_share(case)
    weights = case.format_of(noise * math.sqrt(1 - cache))
    if case.format is None or weights is None:
        return (
            "differs",
            f"the base model is off by {noise:.2g} nats, more than 4 bits would be",
            "another base model",
        )
    if case.prompts >= FEW_PROMPTS and case.excess.value + case.excess.half < -math.log(EXCESS * sensitivity):
        reason = f"the adapter's answers are off by {off:.2g} nats, those for the base model by {noise:.2g}"
        return "differs", reason, "base model answered by something else"
    as_base, clear = case.count_base(case.pairs, CLEAR * math.sqrt(2) * (noise + FLOOR))
    if FEW <= len(as_base) <= clear - FEW:
        return (
            "differs",
            f"{len(as_base)} of {clear} answers are the base model's{requests_of(case, as_base, clear)}",
            "some answers are the base model's",
        )
    if case.effect > 0 and not (found.value - found.half <= high and found.value + found.half >= low):
        return search(case, f"the adapter has the strength {found}, and {low:.3g} to {high:.3g} is right")
    if case.is_further(case.found, case.excess, case.prompts):
        return search(case, f"off by {off:.2g} nats, where the base model is off by {noise:.2g}")
    if (fault := decoded_fault(case) or mixed_fault(case)) is not None:
        return fault
    shown = f"the adapter has the strength {found}; off by {off:.2g} nats, where it moves logprobs by {case.effect:.2g}"
    shown += f" and the base model is off by {noise:.2g}, as {case.format} would be"
    if case.effect <= FLOOR or found.half + (high - low) / 2 >= SEEN:
        return "inconclusive", f"{shown}; a wrong adapter would pass as well", None
    if FORMATS.index(weights) > FORMATS.index(case.served_format):
        return (
            "inconclusive",
            f"{shown}, or another base model; if it is served so, declare it (--served-format)",
            None,
        )
    shown += f", of which a KV cache in fp8 explains {cache:.0%}" if cache else ""
    if case.answers.is_one_model:
        shown += "; the server has one model under both names, so its own noise is not known"
    return "as trained", shown, None


def quick(case: Case) -> Finding:
    """Whether the adapter is applied at all, by a few answers of the adapter alone."""
    as_base, clear = case.count_base(case.pairs)
    shown = f"{len(as_base)} of {clear} answers are the base model's"
    if len(as_base) >= FEW:
        return "differs", f"{shown}{requests_of(case, as_base, clear)}", "served as base"
    if clear < FEW or case.effect <= FLOOR:
        return "inconclusive", f"{shown}: too few to tell", None
    return "as trained", f"{shown}; a full check sees other faults", None


def search(case: Case, found: str) -> Finding:
    """The recorded fault of the adapter that is nearest to the answers."""
    models = [case.base._replace(fault="served as base", detail="the adapter is not loaded, or its names do not match")]
    models += [model for model in case.reference.variants[ADAPTER] if model.factor is None]
    few = min(len(model.rows) for model in models)
    models.sort(key=lambda model: case.apart(model, few))
    nearest = [_suspect(case, model) for model in models[:NEAREST]]
    if not any(each["explains"] for each in nearest):
        nearest.append(_suspect(case, _fitted(case)))
    nearest.sort(key=lambda each: (not each["explains"], each["rms"]))
    case.suspects = nearest + [
        {"fault": m.fault, "detail": m.detail, "rms": case.apart(m, few), "explains": False} for m in models[NEAREST:]
    ]
    best = nearest[0]
    if not best["explains"]:
        what = f"the nearest, {best['fault']} ({best['detail']}), is off by {best['rms']:.2g} nats"
        return "differs", f"{found}; no known fault explains it: {what}", None
    reason = f"{best['fault']}: {best['detail']} ({found}; with this fault {best['rms']:.2g} nats remain)"
    others = "; ".join(each["detail"] for each in nearest[1:] if each["explains"])
    return "differs", reason + (f"; within noise it could also be: {others}" if others else ""), best["fault"]


def _suspect(case: Case, model: Model) -> dict[str, Any]:
    size = len(model.rows)
    rms, right = case.apart(model, size), case.apart(case.adapter, size)
    pairs = [pair for pair in case.pairs if pair[0] < size]
    ways, effects = case.directions(model, case.adapter), case.directions(case.adapter)
    changes = [
        [v - e for v, e in zip(y, effect, strict=True)] for (_, _, y), effect in zip(pairs, effects, strict=False)
    ]
    way, tolerance = case.along(changes, ways, pairs), EXACT_WAY if case.format == "fp32" else ROUNDED_WAY
    off, excess, _ = case.weighed(model, pairs)
    passes = abs(way.value - 1) <= tolerance and not case.is_further(off, excess, off.prompts)
    explains = rms <= FAR * right or (rms < right and passes)
    return {"fault": model.fault, "detail": model.detail, "rms": rms, "explains": explains}


def _fitted(case: Case) -> Model:
    """The adapter with the factor on every delta_W that explains the answers best, between the recorded ones."""
    grid = [
        (0.0, case.base),
        (1.0, case.adapter),
        *((m.factor, m) for m in case.reference.variants[ADAPTER] if m.factor),
    ]
    grid.sort(key=lambda pair: pair[0])
    middle = min(range(1, len(grid) - 1), key=lambda k: case.apart(grid[k][1], min(len(m.rows) for _, m in grid)))
    (one, low), (two, mid), (three, high) = grid[middle - 1 : middle + 2]

    def at(factor: float) -> Model:
        f, g, h = factor - one, factor - two, factor - three
        a, b, c = (
            g * h / (one - two) / (one - three),
            f * h / (two - one) / (two - three),
            f * g / (three - one) / (three - two),
        )
        rows = [
            {i: a * x[i] + b * y[i] + c * z[i] for i in x}
            for x, y, z in zip(low.rows, mid.rows, high.rows, strict=False)
        ]
        return Model(rows, [0.0] * len(rows), "wrong scaling", f"every delta_W is multiplied by {factor:.3g}")

    def nearest(middle: float, width: float) -> float:
        factors = [middle + width * step / 10 for step in range(-10, 11)]
        return min(factors, key=lambda factor: case.apart(at(factor), len(low.rows)))

    return at(nearest(nearest(two, max(two - one, three - two)), (three - one) / 20))


def decoded_fault(case: Case) -> Finding | None:
    """What is wrong with greedy answers, which go through the server's cache; None if nothing is."""
    if case.greedy is None:
        return None
    later = {
        place: row
        for question, _, _, rows in case.answers.greedy
        for place, row in rows.items()
        if place > case.reference.places.index((question, 0))  # the first token has not been through the cache
    }
    as_base, clear = case.count_base(case.paired(later, dict(enumerate(case.base.rows))))
    if len(as_base) >= FEW:
        reason = f"logprobs agree, but {len(as_base)} of {clear} generated tokens have the base model's logprobs"
        return "differs", reason, "generated answers lack the adapter"
    gap, allowed, early = (case.greedy[key] for key in ("gap", "allowed", "early"))
    if gap > allowed:
        reason = (
            f"a greedy answer leaves PyTorch's where two tokens are {gap:.2g} nats apart; noise explains {allowed:.2g}"
        )
        fault = "generated answers lack the adapter" if case.greedy["as_base"] >= FEW else None
        return "differs", f"logprobs agree, but {reason}: the server generates other tokens than it scores", fault
    if early * len(case.answers.greedy) >= min(FEW, len(case.answers.greedy)):
        reason = f"logprobs agree, but {early:.0%} of the answers end before PyTorch's, at no end of the text"
        return "differs", reason, "answers end early"
    return None


def mixed_fault(case: Case) -> Finding | None:
    """Answers that change beside requests for another model; None if none do."""
    names = {BASE: "adapter leaks into the base model's answers in a mixed batch"}
    names |= {ADAPTER: "the adapter's answers change in a mixed batch"}
    names |= {OTHER: "the adapter's answers change in a batch with another adapter"}
    for name, found in case.mixed_distances().items():
        if found.rms > math.sqrt(2) * case.limit:
            reason = f"{names[name]}: {found.rms:.2g} nats from those sent alone, where noise explains {case.limit:.2g}"
            return "differs", reason, names[name]
    return None


def requests_of(case: Case, places: Sequence[int], clear: int) -> str:
    """How many answers show such a share, and which requests had one, for who looks for the replica."""
    share = len(places) / clear

    def missed(answers: int) -> float:
        """Probability that so many answers hold fewer than FEW such ones."""
        return sum(math.comb(answers, k) * share**k * (1 - share) ** (answers - k) for k in range(FEW))

    enough = next(answers for answers in count(FEW) if missed(answers) <= MISSED)
    told = [case.answers.sources[place] for place in places if case.answers.sources.get(place)]
    shown = f"; {enough} answers show such a share with 99 % probability"
    return shown + (f"; requests {', '.join(told[:SHOWN])}" if told else "")
