"""The search for the fault of an adapter: the model with the fault that is nearest to the engine's answers is named.

What the engine's adapter changes is compared, so that the base model's own noise cancels. A fault explains the answers
if, in the place of the right adapter, it would pass as one: the answers lie on the way from the right adapter to the
fault by the factor 1, and are not further off than noise. One that leaves a tenth of the distance explains it as well.
"""

from __future__ import annotations

import math
from functools import partial

from loraover_serve.judge.case import Case, strength_along
from loraover_serve.judge.evidence import Change, apart
from loraover_serve.judge.limits import ADAPTER, NUMBER_FORMATS
from loraover_serve.judge.models import FaultyModel, Model
from loraover_serve.judge.names import NOT_APPLIED, NOT_APPLIED_DETAIL, SCALED, multiplied
from loraover_serve.judge.results import Suspect

LEFT = 0.1  # share of the adapter's distance that may remain if a fault explains it
EXACT_WAY, ROUNDED_WAY = 0.1, 0.25  # deviation from 1 of the way to a fault, on exact and on other engines
NEARER = 0.95  # ratio by which the fitted factor, which was chosen, is nearer than a fault that has a name
FEW, NEAREST = 3, 4  # prompts on which every fault is run, and faults that are run on all prompts
GOLDEN, REFINEMENTS = (math.sqrt(5) - 1) / 2, 8


def suspects(case: Case) -> list[Suspect]:
    """The nearest faults on all prompts, and then the others on the first ones, where they are further.

    Args:
        case: The engine's evidence.
    """
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
    explains = rms <= LEFT * right or (rms < right and _would_pass(case, model))
    return Suspect(candidate.fault, candidate.detail, rms, explains)


def _would_pass(case: Case, model: Model) -> bool:
    """Whether the answers are those of this adapter, as far as noise lets one see."""
    way = strength_along(case.evidence.changes(model, case.evidence.adapter))
    allowed = EXACT_WAY if case.number_format == NUMBER_FORMATS[0] else ROUNDED_WAY
    return abs(way.value - 1) <= allowed and not case.is_further(case.evidence.off(ADAPTER, model))


def _fitted(case: Case, few: int) -> FaultyModel:
    """The factor on every delta_W that explains the answers best: the best of a grid, then a golden-section search.

    Args:
        case: The engine's evidence.
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
