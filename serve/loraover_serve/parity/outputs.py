"""Do the arms say the right things? Greedy tokens and their logprobs against PyTorch.

The folded adapter is compared with PyTorch's *unfolded* model, the vanilla adapter with PyTorch's vanilla adapter. The
second shows how far engine and PyTorch are apart for reasons that have nothing to do with folding; the folded adapter's
answers *agree* if they are no further from PyTorch than that, up to what an estimate from so many tokens may be off by.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field

from loraover_serve.parity.analysis import CONTROL, FOLDED, VANILLA
from loraover_serve.parity.measure import Run
from loraover_serve.parity.sample import Sample
from loraover_serve.parity.workload import Request

BASE = "base"
SURE = 5  # standard errors
ROUNDING = 1e-3  # nats: float32's own rounding, where two engines otherwise compute alike

Reference = Callable[[], AbstractContextManager[Any]]
"""A context that gives PyTorch's model."""


class Distance(BaseModel):
    """One arm's answers against PyTorch's model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    reference: str = Field(description="the model in PyTorch")
    equal: float = Field(description="share of prompts whose tokens are all PyTorch's own choices")
    largest_gap: float = Field(description="nats by which PyTorch preferred another token, where answers first part")
    logprob_rms: float | None = Field(description="nats, of the logprobs of all tokens; None: the engine tells none")
    logprob_error: float | None = Field(description="nats, standard error of logprob_rms")
    logprob_largest: float | None = Field(description="nats")


class Outputs(BaseModel):
    """What one engine answered, over the first prompts of a run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    engine: str
    prompts: int
    controls_equal: float = Field(description="share of prompts with equal tokens from two copies of one adapter")
    repeats_equal: float = Field(description="share of prompts that the folded adapter answers alike both times")
    vanilla_equal: float = Field(description="share of prompts that folded and vanilla adapter answer alike")
    folded_applied: bool = Field(description="the folded adapter's tokens differ from the base model's somewhere")
    vanilla_applied: bool
    folded: Distance
    vanilla: Distance = Field(description="the noise floor")
    agree: bool = Field(description="the folded adapter's distance is within the noise floor")


def compare_outputs(
    run: Run, requests: Sequence[Request], folded: Reference, folded_name: str, vanilla: Reference, prompts: int
) -> Outputs:
    """Compare the answers to the first prompts of a run.

    Args:
        folded: the model that the folded adapter should behave as.
        folded_name: of it, in words.
        vanilla: the vanilla adapter.
        prompts: how many.
    """
    answers = {arm: _answers(run, arm, prompts) for arm in {sample.arm for sample in run.samples}}
    firsts = {arm: first for arm, (first, _) in answers.items()}
    with folded() as model:
        distance = _distance(folded_name, [_judge(model, requests, sample) for sample in firsts[FOLDED]])
    with vanilla() as model:
        floor = _distance("the vanilla adapter", [_judge(model, requests, sample) for sample in firsts[VANILLA]])
    return Outputs(
        engine=run.engine,
        prompts=len(firsts[FOLDED]),
        controls_equal=_equal(firsts[VANILLA], firsts[CONTROL]),
        repeats_equal=_equal(*answers[FOLDED]),
        vanilla_equal=_equal(firsts[FOLDED], firsts[VANILLA]),
        folded_applied=_applied(firsts, FOLDED),
        vanilla_applied=_applied(firsts, VANILLA),
        folded=distance,
        vanilla=floor,
        agree=agrees(distance, floor),
    )


def _answers(run: Run, arm: str, prompts: int) -> tuple[list[Sample], list[Sample]]:
    """An arm's first and second answer to each of the first prompts."""
    by_request: dict[int, list[Sample]] = {}
    for sample in run.samples:
        if sample.arm == arm:
            by_request.setdefault(sample.request, []).append(sample)
    pairs = [by_request[request] for request in sorted(by_request)[:prompts]]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def _equal(one: Sequence[Sample], other: Sequence[Sample]) -> float:
    return sum(a.token_ids == b.token_ids for a, b in zip(one, other, strict=True)) / len(one)


def _applied(firsts: dict[str, list[Sample]], arm: str) -> bool:
    return BASE not in firsts or _equal(firsts[BASE], firsts[arm]) < 1


@dataclass(frozen=True)
class _Judged:
    """One answer: the gap where PyTorch first prefers another token (None: nowhere), and differences of logprobs."""

    gap: float | None
    differences: list[float]


@torch.inference_mode()
def _judge(model: Any, requests: Sequence[Request], sample: Sample) -> _Judged:
    prompt = requests[sample.request % len(requests)].prompt
    logits = model(input_ids=torch.tensor([[*prompt, *sample.token_ids]])).logits[0, len(prompt) - 1 : -1].double()
    chosen = logits.gather(1, torch.tensor(sample.token_ids)[:, None])[:, 0]
    gaps = logits.amax(-1) - chosen
    parted = gaps.nonzero()[:, 0].tolist()
    scores = (chosen - logits.logsumexp(-1)).tolist()
    differences = [served - score for served, score in zip(sample.logprobs, scores, strict=False)]
    return _Judged(float(gaps[parted[0]]) if parted else None, differences)


def _distance(reference: str, judged: Sequence[_Judged]) -> Distance:
    differences = np.array([difference for answer in judged for difference in answer.differences])
    rms = float(np.sqrt(np.mean(differences**2))) if len(differences) else None
    # of the mean square: the squares' deviation / sqrt(tokens); the root divides it by 2 rms
    error = float(np.std(differences**2) / math.sqrt(len(differences)) / (2 * rms)) if rms else None
    return Distance(
        reference=reference,
        equal=sum(answer.gap is None for answer in judged) / len(judged),
        largest_gap=max((answer.gap or 0.0 for answer in judged), default=0.0),
        logprob_rms=rms,
        logprob_error=error,
        logprob_largest=float(np.abs(differences).max()) if len(differences) else None,
    )


def agrees(found: Distance, floor: Distance) -> bool:
    """The floor's rms, and where texts part, a gap of two logits that are each off by as much as any of the floor's."""
    gap = 2 * floor.logprob_largest if floor.logprob_largest is not None else floor.largest_gap
    if found.largest_gap > gap + ROUNDING:
        return False
    if found.logprob_rms is None or floor.logprob_rms is None:
        return True
    allowed = floor.logprob_rms + SURE * math.hypot(found.logprob_error or 0.0, floor.logprob_error or 0.0)
    return found.logprob_rms <= allowed + ROUNDING
