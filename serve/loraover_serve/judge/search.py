"""The search for faults of the adapter and of the base model: the one that is nearest to the answers is named.

Changes by the engine's adapter are compared, so that the base model's own noise cancels. A fault explains the answers
if they would be judged right with the faulty adapter in the place of the right one: they lie the whole way from the
right adapter to the fault (factor 1), and no further from the fault than noise. A fault that leaves at most a tenth of
the distance explains them as well.

The difference between the engine's base model and PyTorch's is projected on what each fault of a base model would
change. A fault is named if it explains more than EXPLAINED of the difference. Rounding to float16, bfloat16, int8,
float8 or int4 explains less than a fifth of the change by any of these faults, and each fault explains less than a
fifth of another one.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

from loraover_serve.judge.case import Case, share_along, strength_along
from loraover_serve.judge.estimates import Interval, in_percent
from loraover_serve.judge.evidence import Change, apart
from loraover_serve.judge.limits import ADAPTER, EXACT, EXPLAINED, NUMBER_FORMATS, PLAIN
from loraover_serve.judge.models import FaultyModel, Model
from loraover_serve.judge.names import (
    IN_BASE,
    NOT_APPLIED,
    NOT_APPLIED_DETAIL,
    PENALTY,
    SCALED,
    TEMPERATURE,
    multiplied,
)
from loraover_serve.judge.results import Suspect

LEFT = 0.1  # share of the adapter's distance that may remain if a fault explains it
EXACT_WAY, ROUNDED_WAY = 0.1, 0.25  # deviation from 1 of the way to a fault, on exact and on other engines
NEARER = 0.95  # ratio by which the fitted factor, which was chosen, is nearer than a fault that has a name
FEW, NEAREST = 3, 4  # prompts on which every fault of the adapter is run, and faults that are run on all prompts
GOLDEN, REFINEMENTS = (math.sqrt(5) - 1) / 2, 8

FEW_OF_BASE = 4
"""Number of prompts on which a fault of the base model is tried first, if it needs a run of the model."""

LEAST, NEARLY = 0.1, 0.9  # factor of the adapter that is looked at, and share that needs no further look
HOTTEST = 2.0  # temperature that OpenAI's protocol allows
WORTH = 0.3  # share on those, above which all prompts are run


def suspects(case: Case) -> list[Suspect]:
    """The nearest faults, compared on all prompts, and then the others, compared on the first prompts alone."""
    few = case.first(FEW)
    candidates = [FaultyModel(NOT_APPLIED, NOT_APPLIED_DETAIL, lambda prompts: case.evidence.base)]
    candidates += case.evidence.models.adapter_faults()
    screened = [_changes(case, candidate.run(few)) for candidate in candidates]
    shared = min(map(len, screened))
    pairs = [(apart(each[:shared]), candidate) for each, candidate in zip(screened, candidates, strict=True)]
    pairs.sort(key=lambda pair: pair[0])
    found = [_suspect(case, candidate) for _, candidate in pairs[:NEAREST]]
    found.sort(key=lambda each: (not each.explains, each.rms))
    if not found[0].explains or found[0].rms > LEFT * apart(case.changes):
        fitted = _suspect(case, _fitted(case, few))
        is_nearer = fitted.rms < NEARER * found[0].rms
        found.insert(0 if (fitted.explains or not found[0].explains) and is_nearer else 1, fitted)
    return found + [Suspect(each.fault, each.detail, far, False) for far, each in pairs[NEAREST:]]


def _changes(case: Case, model: Model) -> list[Change]:
    return case.evidence.changes(model, case.evidence.base)


def _suspect(case: Case, candidate: FaultyModel) -> Suspect:
    model = candidate.run(None)
    changes = _changes(case, model)
    rms, right = apart(changes), apart(case.changes[: len(changes)])
    explains = rms <= LEFT * right
    if not explains and rms < right:  # in the place of the right adapter, it may pass as one, as far as noise lets see
        way = strength_along(case.evidence.changes(model, case.evidence.adapter))
        allowed = EXACT_WAY if case.number_format == NUMBER_FORMATS[0] else ROUNDED_WAY
        explains = abs(way.value - 1) <= allowed and not case.is_further(case.evidence.off(ADAPTER, model))
    return Suspect(candidate.fault, candidate.detail, rms, explains)


def _fitted(case: Case, few: int) -> FaultyModel:
    """The factor on every delta_W that explains the answers best: the best of a grid, then a golden-section search.

    Args:
        few: Number of the first prompts to run.
    """

    def far(factor: float) -> float:
        return apart(_changes(case, case.evidence.models.scaled(factor, few)))

    grid = sorted({*case.evidence.models.factors, 1.0})
    distances = [far(factor) for factor in grid]
    best = distances.index(min(distances))
    low, high = (math.log(grid[min(max(each, 0), len(grid) - 1)]) for each in (best - 1, best + 1))
    left, right = ((far(math.exp(side)), side) for side in _inner(low, high))
    for _ in range(REFINEMENTS):
        if left[0] < right[0]:
            high, right = right[1], left
            left = far(math.exp(side := _inner(low, high)[0])), side
        else:
            low, left = left[1], right
            right = far(math.exp(side := _inner(low, high)[1])), side
    factor = math.exp(min(left, right)[1])
    return FaultyModel(SCALED, multiplied(factor), partial(case.evidence.models.scaled, factor))


def _inner(low: float, high: float) -> tuple[float, float]:
    """The two inner points of an interval in the golden ratio."""
    return high - GOLDEN * (high - low), low + GOLDEN * (high - low)


class BaseFault(NamedTuple):
    """A fault of the base model that explains its answers.

    Args:
        detail: The fault in words.
        share: Share of the difference that it explains.
    """

    fault: str
    detail: str
    share: float


def find_base_fault(case: Case) -> BaseFault | None:
    """The fault that explains most of the difference of the engine's base model from PyTorch's; None if none does.

    Args:
        case: The engine's evidence. Faults that need a run of the model are tried only in a coarse number format.
    """
    if case.noise.rms <= EXACT or case.is_one_model:
        return None
    found = [_temperature(case), _penalty(case), _adapted(case)]
    if case.number_format not in PLAIN:
        for each in case.evidence.models.base_faults():
            if case.share_of(each.run(case.first(FEW_OF_BASE))) >= WORTH:
                found.append(BaseFault(each.fault, each.detail, case.share_of(each.run(None))))
    best = max((each for each in found if each is not None), key=lambda each: each.share, default=None)
    return best if best is not None and best.share >= EXPLAINED else None


def _temperature(case: Case) -> BaseFault | None:
    """Find a temperature T: the logprobs are those of logits divided by T, apart from noise.

    If the server changed the prompts, as by another chat template, logprobs have little to do with the right ones, and
    the fitted temperature is larger than any that is in use.
    """
    changes = case.evidence.base_logprobs()
    estimate = strength_along(changes)
    share = share_along(changes, estimate)
    is_all = case.format_of(case.noise.rms * math.sqrt(1 - share)) is not None
    if _is_zero(estimate) or estimate.value < 1 / HOTTEST - 1 or not is_all:
        return None
    return BaseFault(TEMPERATURE, f"logprobs are those at temperature {1 / (1 + estimate.value):.2g}", share)


def _penalty(case: Case) -> BaseFault | None:
    """Find a penalty: it lowers the tokens that the prompt or the answer already has."""
    changes = case.evidence.base_repeats()
    estimate = strength_along(changes)
    if _is_zero(estimate):
        return None
    verb = "lowered" if estimate.value > 0 else "raised"
    detail = f"logprobs of tokens that were read before are {verb} by {abs(estimate.value):.2g} nats"
    return BaseFault(PENALTY, detail, share_along(changes, estimate))


def _adapted(case: Case) -> BaseFault | None:
    """Find the adapter, or a part of its strength, in answers to requests for the base model."""
    changes = case.evidence.base_changes(case.evidence.adapter)
    estimate = strength_along(changes)
    part = share_along(changes, estimate)
    if estimate.value < LEAST:
        return None
    if part < NEARLY:
        part = max(part, case.share_of(case.evidence.models.scaled(estimate.value)))
    detail = f"requests for the base model are answered with {in_percent(estimate.value)} of the adapter"
    return BaseFault(IN_BASE, detail, part)


def _is_zero(estimate: Interval) -> bool:
    """Whether the estimate can be zero by chance, and the interval is not wide merely because prompts are few."""
    return math.isfinite(estimate.half) and estimate.low <= 0 <= estimate.high
