"""Answers to requests for the base model and for the adapter that a server gets together, beside those sent apart.

A server computes requests that arrive together in one batch. vLLM 0.32 on a CPU computes a batch's rows for the base
model with the weights of an adapter, if another row asks for one, and reports nothing.

Both answers have the engine's noise, so they may be sqrt(2) times as far apart as one of them may be from PyTorch's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loraover_serve.verify.answers import ADAPTER, BASE, Row, Rows
from loraover_serve.verify.faults import CHANGED, LEAKS
from loraover_serve.verify.report import LogprobDistance, MixedBatch


def compare_mixed(mixed: Mapping[str, Rows], apart: Mapping[str, Rows]) -> MixedBatch:
    """Distance between the answers that were sent together and those that were sent apart, for each arm.

    Args:
        mixed: logprobs of the base model and the adapter, asked for together.
        apart: logprobs after the same tokens, asked for one arm at a time.
    """

    def distance(arm: str) -> LogprobDistance:
        pairs = zip(mixed[arm], apart[arm], strict=True)
        return LogprobDistance.of([_difference(together, alone) for together, alone in pairs])

    return MixedBatch(base=distance(BASE), adapter=distance(ADAPTER))


def mixed_fault(mixed: MixedBatch, allowed: float) -> dict[str, Any] | None:
    """Verdict, reason and fault if answers change in a mixed batch; None if they do not.

    Args:
        mixed: distance between answers sent together and apart.
        allowed: largest distance of the adapter's answers from PyTorch's that noise explains, in nats.
    """
    limit = math.sqrt(2) * allowed
    if mixed.base.rms > limit:
        reason = (
            f"{LEAKS}: requests for the base model, sent together with requests for the adapter, are answered "
            f"{_words(mixed.base, limit)}; requests for one model at a time are answered right"
        )
        return {"verdict": "differs", "reason": reason, "fault": LEAKS}
    if mixed.adapter.rms > limit:
        reason = (
            f"{CHANGED}: sent together with requests for the base model, they are answered "
            f"{_words(mixed.adapter, limit)}; requests for one model at a time are answered right"
        )
        return {"verdict": "differs", "reason": reason, "fault": CHANGED}
    return None


def _words(found: LogprobDistance, limit: float) -> str:
    return f"{found.rms:.2g} nats (at most {found.largest:.2g}) from those sent alone, where noise explains {limit:.2g}"


def _difference(one: Row, other: Row) -> NDArray[np.float64]:
    """Differences of two rows' logprobs, of the tokens that both have.

    If they share none, the likeliest token of one has at most the other's smallest logprob.
    """
    here, there = one.logprobs.astype(np.float64), other.logprobs.astype(np.float64)
    if one.ids is None or other.ids is None:
        return here - there
    _, mine, theirs = np.intersect1d(one.ids, other.ids, return_indices=True)
    return here[mine] - there[theirs] if len(mine) else np.array([here.max() - there.min()])
