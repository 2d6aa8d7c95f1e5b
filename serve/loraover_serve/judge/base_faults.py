"""Faults of the base model as large as the noise of a number format, in a direction that noise lacks.

The difference between the engine's base model and PyTorch's is projected on what each fault would change. A fault is
named if it explains more than EXPLAINED of the difference. Rounding to float16, bfloat16, int8, float8 or int4
explains less than a fifth of any of them, and these less than a fifth of one another.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from loraover_serve.judge.case import Case, share_along, strength_along
from loraover_serve.judge.estimates import Interval
from loraover_serve.judge.limits import EXACT, EXPLAINED, PLAIN
from loraover_serve.judge.names import IN_BASE, PENALTY, TEMPERATURE

FEW = 4
"""Prompts on which faults that somebody has to run are tried first."""

LEAST, NEARLY = 0.1, 0.9  # factor of the adapter that is looked at, and share that needs no further look
HOTTEST = 2.0  # temperature that OpenAI's protocol allows
WORTH = 0.3  # share on those, above which all prompts are run


class BaseFault(NamedTuple):
    """A fault of the base model that explains its answers.

    Args:
        fault: Name of the fault.
        detail: The fault in words.
        share: Share of the difference that it explains.
    """

    fault: str
    detail: str
    share: float


def find_base_fault(case: Case) -> BaseFault | None:
    """The fault that explains most of what sets the engine's base model apart from PyTorch's; None if none does.

    Args:
        case: The engine's evidence. Faults that somebody has to run are tried where the number format is a coarse one.
    """
    if case.noise.rms <= EXACT or case.is_one_model:
        return None
    found = [_temperature(case), _penalty(case), _adapted(case)]
    if case.number_format not in PLAIN:
        found += _computed(case)
    best = max((each for each in found if each is not None), key=lambda each: each.share, default=None)
    return best if best is not None and best.share >= EXPLAINED else None


def _temperature(case: Case) -> BaseFault | None:
    """Logprobs at a temperature T are those of logits divided by T, and all else is noise.

    After other prompts, as of another chat template, logprobs have little to do with the right ones: their share in the
    difference looks like that of a temperature far above any.
    """
    changes = case.evidence.base_logprobs()
    estimate = strength_along(changes)
    share = share_along(changes, estimate)
    is_all = case.format_of(case.noise.rms * math.sqrt(1 - share)) is not None
    if _is_zero(estimate) or estimate.value < 1 / HOTTEST - 1 or not is_all:
        return None
    return BaseFault(TEMPERATURE, f"logprobs are those at temperature {1 / (1 + estimate.value):.2g}", share)


def _penalty(case: Case) -> BaseFault | None:
    """A penalty lowers the tokens that the prompt or the answer already has."""
    changes = case.evidence.base_repeats()
    estimate = strength_along(changes)
    if _is_zero(estimate):
        return None
    verb = "lowered" if estimate.value > 0 else "raised"
    detail = f"logprobs of tokens that were read before are {verb} by {abs(estimate.value):.2g} nats"
    return BaseFault(PENALTY, detail, share_along(changes, estimate))


def _adapted(case: Case) -> BaseFault | None:
    """Requests for the base model are answered with the adapter, or with a weaker one like it."""
    changes = case.evidence.base_changes(case.evidence.adapter)
    estimate = strength_along(changes)
    part = share_along(changes, estimate)
    if estimate.value < LEAST:
        return None
    if part < NEARLY:
        part = max(part, case.share_of(case.evidence.models.scaled(estimate.value)))
    detail = f"requests for the base model are answered with {estimate.value:.2g} times the adapter"
    return BaseFault(IN_BASE, detail, part)


def _computed(case: Case) -> Iterator[BaseFault]:
    for each in case.evidence.models.base_faults():
        if case.share_of(each.run(case.first(FEW))) >= WORTH:
            yield BaseFault(each.fault, each.detail, case.share_of(each.run(None)))


def _is_zero(estimate: Interval) -> bool:
    """Whether the estimate is within chance of zero; few prompts alone do not make it so."""
    return math.isfinite(estimate.half) and estimate.low <= 0 <= estimate.high
