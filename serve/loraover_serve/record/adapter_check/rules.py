"""The rules of the verdict, which are those of verify/judge.py: the first that finds something decides."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

from .case import EXACT, EXCESS, FEW, FEW_PROMPTS, FLOOR, PLAIN, SEEN, Case
from .estimates import Estimate, dot, strength
from .reference import ADAPTER, BASE, FORMATS, OTHER, Model, Row

HALF, FAR, LEAST, EXACT_WAY, ROUNDED_WAY, NEAREST = 0.5, 0.1, 0.1, 0.1, 0.25, 4  # see base_faults.py, suspects.py
SHOWN = 16  # requests that are named

Finding = tuple[str, str, str | None]
"""Verdict, reason and fault."""


def finding(case: Case) -> Finding:
    """The first rule that finds something decides."""
    sensitivity, found, (low, high) = case.reference.sensitivity, case.strength, case.allowed
    noise, off = case.noise.rms, case.found.rms
    if (fault := base_fault(case)) is not None:
        return fault
    if case.format is None:
        return (
            "differs",
            f"the base model is off by {noise:.2g} nats, more than 4 bits would be",
            "another base model",
        )
    if case.prompts >= FEW_PROMPTS and case.excess.value + case.excess.half < -math.log(EXCESS * sensitivity):
        reason = f"the adapter's answers are off by {off:.2g} nats, those for the base model by {noise:.2g}"
        return "differs", reason, "base model answered by something else"
    as_base, clear = case.count_base(case.pairs)
    if FEW <= len(as_base) <= clear - FEW:
        return (
            "differs",
            f"{len(as_base)} of {clear} answers are the base model's{requests_of(case, as_base)}",
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
    if FORMATS.index(case.format) > FORMATS.index(case.served_format):
        return (
            "inconclusive",
            f"{shown}, or another base model; if it is served so, declare it (--served-format)",
            None,
        )
    return "as trained", shown, None


def quick(case: Case) -> Finding:
    """Whether the adapter is applied at all, by a few answers of the adapter alone."""
    as_base, clear = case.count_base(case.pairs)
    shown = f"{len(as_base)} of {clear} answers are the base model's"
    if len(as_base) >= FEW:
        return "differs", f"{shown}{requests_of(case, as_base)}", "served as base"
    if clear < FEW or case.effect <= FLOOR:
        return "inconclusive", f"{shown}: too few to tell", None
    return "as trained", f"{shown}; a full check sees other faults", None


def base_fault(case: Case) -> Finding | None:
    """The fault that explains most of what sets the base model apart, in a direction that rounding lacks."""
    if case.noise.rms <= EXACT or not case.answers.base:
        return None
    rows = {p: [i for i in row if i in case.base.rows[p]] for p, row in case.answers.base.items()}
    off = {p: [case.answers.base[p][i] - case.base.rows[p][i] for i in ids] for p, ids in rows.items() if ids}

    def share(way: Callable[[int], Row], places: int, is_centred: bool = False) -> tuple[Estimate, float]:
        ways = [(p, y, [way(p)[i] for i in rows[p]]) for p, y in off.items() if p < places]
        if is_centred:
            ways = [(p, centred(y), centred(d)) for p, y, d in ways]
        found = strength([(case.prompt(p), dot(y, d), dot(d, d)) for p, y, d in ways])
        total = sum(dot(y, y) for _, y, _ in ways)
        return found, min(1.0, found.value**2 * sum(dot(d, d) for _, _, d in ways) / total) if total else 0.0

    def to(model: Model) -> Callable[[int], Row]:
        return lambda p: {i: value - case.base.rows[p][i] for i, value in model.rows[p].items()}

    def is_clear(found: Estimate) -> bool:
        return abs(found.value) > found.half or math.isinf(found.half)

    faults: list[tuple[float, str, str]] = []
    every = len(case.base.rows)
    found, part = share(lambda p: case.base.rows[p], every, True)
    if is_clear(found) and found.value > -1:
        faults.append(
            (
                part,
                "logprobs at another temperature",
                f"logprobs are those at temperature {1 / (1 + found.value):.2g}",
            )
        )
    seen = {p: {*case.reference.read(p)} for p in off}
    found, part = share(lambda p: {i: -float(i in seen[p]) for i in rows[p]}, every, True)
    if is_clear(found):
        detail = f"logprobs of tokens that were read before are off by {-found.value:.2g} nats"
        faults.append((part, "logprobs with a repetition penalty", detail))
    found, part = share(to(case.adapter), every)
    if found.value >= LEAST:
        scaled = [share(to(v), len(v.rows)) for v in case.reference.variants[ADAPTER] if v.factor is not None]
        part = max([part, *(each for way, each in scaled if way.value > HALF)])
        detail = f"requests for the base model are answered with {found.value:.2g} times the adapter"
        faults.append((part, "adapter in the base model", detail))
    for model in case.reference.variants[BASE] if case.format not in PLAIN else ():
        found, part = share(to(model), len(model.rows))
        faults += [(part, model.fault, model.detail)] if found.value > HALF else []
    part, fault, detail = max(faults, default=(0.0, "", ""))
    reason = f"{fault}: {detail}, which explains {part:.0%} of what sets the base model apart from PyTorch's"
    return ("differs", reason, fault) if part >= HALF else None


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
        return "differs", f"logprobs agree, but {reason}: the server generates other tokens than it scores", None
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


def requests_of(case: Case, places: Sequence[int]) -> str:
    """How many requests find such a share of answers, and which had one, for who looks for the replica."""
    share = len(places) / len(case.pairs)
    enough = (
        f"; {math.ceil(math.log(0.01) / math.log(1 - share))} requests find such a share with 99 %" if share < 1 else ""
    )
    told = [case.answers.sources[place] for place in places if case.answers.sources.get(place)]
    return enough + (f"; requests {', '.join(told[:SHOWN])}" if told else "")


def centred(values: Sequence[float]) -> list[float]:
    """Values without their mean."""
    mean = fmean(values)
    return [value - mean for value in values]
