"""Answers to requests for the base model and for the adapter that a server gets together, beside those sent apart.

A server computes requests that arrive together in one batch. vLLM 0.32 on a CPU computes a batch's rows for the base
model with the weights of an adapter, if another row asks for one, and reports nothing. Batches of two adapters are
looked at as well, where the server has a second one.

Both answers have the engine's noise, so they may be sqrt(2) times as far apart as one of them may be from PyTorch's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from loraover_serve.engines.answers import ADAPTER, BASE, OTHER, Row, Rows
from loraover_serve.verify.names import CHANGED, CHANGED_BY_OTHER, LEAKS
from loraover_serve.verify.report import LogprobDistance, MixedBatch
from loraover_serve.verify.rules import RuleFinding


def compare_mixed(mixed: Mapping[str, Rows], apart: Mapping[str, Rows]) -> MixedBatch:
    """Distance between the answers that were sent together and those that were sent apart, for each arm.

    Args:
        mixed: Logprobs of the base model and the adapter, asked for together, and of the adapter beside another one.
        apart: Logprobs after the same tokens, asked for one arm at a time.
    """

    def distance(name: str, arm: str) -> LogprobDistance:
        alone = {(row.question, row.position): row for row in apart[arm]}
        found = ((row, alone.get((row.question, row.position))) for row in mixed[name])
        pairs = [(row, other) for row, other in found if other is not None]
        return LogprobDistance.of([_difference(*pair) for pair in pairs], [row.question for row, _ in pairs])

    other = distance(OTHER, ADAPTER) if OTHER in mixed else None
    return MixedBatch(base=distance(BASE, BASE), adapter=distance(ADAPTER, ADAPTER), other=other)


def mixed_fault(mixed: MixedBatch, allowed: float) -> RuleFinding | None:
    """The finding if answers change in a mixed batch; None if they do not.

    Args:
        mixed: Distance between answers sent together and apart.
        allowed: Largest distance of the adapter's answers from PyTorch's that noise explains, in nats.
    """
    limit = math.sqrt(2) * allowed
    cases = (
        (LEAKS, mixed.base, "requests for the base model, sent together with requests for the adapter, are"),
        (CHANGED, mixed.adapter, "sent together with requests for the base model, they are"),
        (CHANGED_BY_OTHER, mixed.other, "sent together with requests for the other adapter, they are"),
    )
    for fault, found, subject in cases:
        if found is not None and found.rms > limit:
            words = f"{found.rms:.2g} nats (at most {found.largest:.2g}) from those sent alone"
            reason = (
                f"{fault}: {subject} answered {words}, where noise explains {limit:.2g}; requests for one model at a "
                "time are answered right"
            )
            return RuleFinding("differs", reason, fault)
    return None


def _difference(one: Row, other: Row) -> NDArray[np.float64]:
    """Differences of two rows' logprobs, of the tokens that both have.

    If they share none, the likeliest token of one has at most the other's smallest logprob.
    """
    here, there = one.logprobs.astype(np.float64), other.logprobs.astype(np.float64)
    if one.ids is None or other.ids is None:
        return here - there
    _, mine, theirs = np.intersect1d(one.ids, other.ids, return_indices=True)
    return here[mine] - there[theirs] if len(mine) else np.array([here.max() - there.min()])
