"""Faults of single requests: greedy answers, which go through an engine's cache, and requests that are sent together.

A server computes requests that arrive together in one batch. vLLM 0.32 on a CPU computes a batch's rows for the base
model with the weights of an adapter, if another row asks for one, and reports nothing. Batches of two adapters are
looked at as well, where the server has a second one.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from loraover_serve.judge.case import Case, split_base
from loraover_serve.judge.limits import ADAPTER, BASE, FEW_AS_BASE, FLOOR, OTHER
from loraover_serve.judge.names import CHANGED, CHANGED_BY_OTHER, DECODED, ENDS_EARLY, LEAKS

Fault = tuple[str, str | None]
"""Reason and name."""


def generated_fault(case: Case) -> Fault | None:
    """What is wrong with generated answers though logprobs agree; None if nothing is.

    Args:
        case: The engine's evidence.
    """
    greedy = case.greedy
    if greedy is None:
        return None
    as_base, others = split_base(case.evidence.decoded())
    if len(as_base) >= FEW_AS_BASE:
        clear = len(as_base) + len(others)
        return f"logprobs agree, but {len(as_base)} of {clear} generated tokens have the base model's logprobs", DECODED
    if greedy.gap > greedy.allowed:
        reason = (
            f"logprobs agree, but a greedy answer leaves PyTorch's where the two tokens are {greedy.gap:.2g} nats "
            f"apart, and noise explains {greedy.allowed:.2g}: the engine generates other tokens than it scores"
        )
        if greedy.as_base >= FEW_AS_BASE:
            return f"{reason}, in {greedy.as_base} answers the base model's", DECODED
        return reason, None
    answers = len(case.generated)
    if greedy.early * answers >= min(FEW_AS_BASE, answers):
        reason = f"logprobs agree, but {greedy.early:.0%} of the answers end before PyTorch's, at no end of the text"
        return reason, ENDS_EARLY
    return None


def mixed_fault(case: Case) -> Fault | None:
    """What is wrong with answers in mixed batches; None if nothing is.

    Args:
        case: The engine's evidence.
    """
    limit = math.sqrt(2) * (case.evidence.sensitivity * case.noise.rms + FLOOR)  # both have the engine's noise
    subjects = {
        BASE: (LEAKS, "requests for the base model, sent together with requests for the adapter, are"),
        ADAPTER: (CHANGED, "sent together with requests for the base model, they are"),
        OTHER: (CHANGED_BY_OTHER, "sent together with requests for the other adapter, they are"),
    }
    differences = case.evidence.mixed()
    for name, (fault, subject) in subjects.items():
        if name in case.mixed and case.is_apart(differences[name]):
            found = case.mixed[name]
            words = f"{found.rms:.2g} nats (at most {found.largest:.2g}) from those sent alone"
            reason = (
                f"{fault}: {subject} answered {words}, where noise explains {limit:.2g}; requests for one model at a "
                f"time are answered right: send them so, and judge them alone with {case.option('without_mixed')}"
            )
            return reason, fault
    return None


def left_out(option: Callable[[str], str]) -> str:
    """Reason why no requests were sent together: nobody wanted any.

    Args:
        option: Name of an option as its user writes it.
    """
    return f"none was asked for, as {option('without_mixed')} says"
