"""Faults of the base model, which point in a direction that rounding lacks, as verify/base_faults.py finds them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import fmean

from .case import EXACT, PLAIN, Case
from .estimates import Estimate, dot, strength
from .reference import ADAPTER, BASE, Model, Row

COARSE_CACHE = "KV cache in fp8"
"""Name of what is no fault: the rest of the noise has to be that of the declared number format."""

HALF, LEAST = 0.5, 0.1  # share that names a fault, and factor of the adapter that is looked at


def base_fault(case: Case) -> tuple[str, str, str] | None:
    """Verdict, reason and name of the fault that explains most of what sets the base model apart; None if none does."""
    if case.noise.rms <= EXACT or not case.answers.base:
        return None
    faults, every = [(0.0, "", "")], len(case.base.rows)
    found, part = _aligned(case, lambda p: case.base.rows[p], every, is_centred=True)
    if _is_clear(found) and found.value > -1:
        detail = f"logprobs are those at temperature {1 / (1 + found.value):.2g}"
        faults.append((part, "logprobs at another temperature", detail))
    seen = {p: {*case.reference.read(p)} for p in case.answers.base}
    found, part = _aligned(case, lambda p: {i: -float(i in seen[p]) for i in case.base.rows[p]}, every, is_centred=True)
    if _is_clear(found):
        detail = f"logprobs of tokens that were read before are off by {-found.value:.2g} nats"
        faults.append((part, "logprobs with a repetition penalty", detail))
    found, part = _aligned(case, _to(case, case.adapter), every)
    if found.value >= LEAST:
        scaled = [_share(case, model) for model in case.reference.variants[ADAPTER] if model.factor is not None]
        detail = f"requests for the base model are answered with {found.value:.2g} times the adapter"
        faults.append((max([part, *scaled]), "adapter in the base model", detail))
    for model in case.reference.variants[BASE] if case.format not in PLAIN else ():
        if model.fault != COARSE_CACHE:
            faults.append((_share(case, model), model.fault, model.detail))
    part, fault, detail = max(faults)
    reason = f"{fault}: {detail}, which explains {part:.0%} of what sets the base model apart from PyTorch's"
    return ("differs", reason, fault) if part >= HALF else None


def cache_share(case: Case) -> float:
    """Share of the base model's distance that a KV cache in float8 explains; 0 if it explains less than half."""
    if case.format in PLAIN or not case.answers.base:
        return 0.0
    shares = [_share(case, model) for model in case.reference.variants[BASE] if model.fault == COARSE_CACHE]
    return max((share for share in shares if share >= HALF), default=0.0)


def _to(case: Case, model: Model) -> Callable[[int], Row]:
    return lambda p: {i: value - case.base.rows[p][i] for i, value in model.rows[p].items()}


def _share(case: Case, model: Model) -> float:
    found, part = _aligned(case, _to(case, model), len(model.rows))
    return part if found.value > HALF else 0.0


def _is_clear(found: Estimate) -> bool:
    """Whether the estimate is not within chance of zero; few prompts alone do not make it so."""
    return abs(found.value) > found.half or math.isinf(found.half)


def _aligned(case: Case, way: Callable[[int], Row], places: int, *, is_centred: bool = False) -> tuple[Estimate, float]:
    """The factor of a direction in the base model's difference, and the share that it explains, at the first places."""
    ways = []
    for place, row in case.answers.base.items():
        ids = [i for i in row if i in case.base.rows[place]] if place < places else []
        if ids:
            off, mine = [row[i] - case.base.rows[place][i] for i in ids], way(place)
            pair = off, [mine[i] for i in ids]
            ways.append((place, *(map(_centred, pair) if is_centred else pair)))
    found = strength([(case.prompt(p), dot(y, d), dot(d, d)) for p, y, d in ways])
    total = sum(dot(y, y) for _, y, _ in ways)
    return found, min(1.0, found.value**2 * sum(dot(d, d) for _, _, d in ways) / total) if total else 0.0


def _centred(values: Sequence[float]) -> list[float]:
    mean = fmean(values)
    return [value - mean for value in values]
