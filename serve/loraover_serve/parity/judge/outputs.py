"""Do the arms say the right things? Greedy tokens and their logprobs against PyTorch.

The folded adapter is compared with PyTorch's *unfolded* model, the vanilla adapter with PyTorch's vanilla adapter. The
second shows how far engine and PyTorch are apart for reasons that have nothing to do with folding; the folded adapter's
answers *agree* if they are no further from PyTorch than that, up to what an estimate from so many tokens may be off by.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from loraover_serve.engines.base import engine_errors
from loraover_serve.engines.sample import Request, Sample
from loraover_serve.parity.samples import BASE, CONTROL, FOLDED, VANILLA, Measurement

SURE = 5  # standard errors
ROUNDING = 1e-3  # nats: float32's own rounding, where two engines otherwise compute alike
APPLIED = 3  # times the noise of two copies, by which an adapter changes logprobs at least

Reference = Callable[[], AbstractContextManager[Any]]
"""A context that gives PyTorch's model."""


class Answer(BaseModel):
    """One prompt's answer against PyTorch's model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    request: int
    gap: float | None = Field(description="nats by which PyTorch first preferred another token; None: nowhere")
    logprob_rms: float | None = Field(description="nats, over the tokens that the engine tells them of; None: of none")


class Distance(BaseModel):
    """One arm's answers against PyTorch's model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    reference: str = Field(description="the model in PyTorch")
    equal: float = Field(description="share of prompts whose tokens are all PyTorch's own choices")
    largest_gap: float = Field(description="nats by which PyTorch preferred another token, where answers first part")
    logprob_rms: float | None = Field(description="nats, of all logprobs that the engine tells; None: it tells none")
    logprob_error: float | None = Field(description="nats, standard error of logprob_rms")
    logprob_largest: float | None = Field(description="nats")
    answers: list[Answer]


class Outputs(BaseModel):
    """What one engine answered at one concurrency, over the first prompts of a run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    engine: str
    concurrency: int
    prompts: int
    controls_equal: float = Field(description="share of prompts with equal tokens from two copies of one adapter")
    repeats_equal: float = Field(description="share of prompts that the folded adapter answers alike both times")
    vanilla_equal: float = Field(description="share of prompts that folded and vanilla adapter answer alike")
    noise_rms: float | None = Field(description="nats, of the logprobs of two copies of one adapter on the engine")
    unapplied: list[str] = Field(
        description="arms that answer as the base model: with its tokens and, but for noise, logprobs"
    )
    folded: Distance
    vanilla: Distance = Field(description="the noise floor")
    agree: bool = Field(description="the folded adapter's distance is within the noise floor")


def compare_outputs(
    run: Measurement, requests: Sequence[Request], folded: Reference, folded_name: str, vanilla: Reference, prompts: int
) -> Outputs:
    """Compare the answers to the first prompts of a run.

    Args:
        folded: the model that the folded adapter should behave as.
        folded_name: of it, in words.
        vanilla: the vanilla adapter.
        prompts: how many.

    Raises:
        EngineError: PyTorch cannot run the model on a prompt.
    """
    answers = {arm: _answers(run, arm, prompts) for arm in {sample.arm for sample in run.samples}}
    firsts = {arm: first for arm, (first, _) in answers.items()}
    with engine_errors("PyTorch"), folded() as model:
        distance = _distance(folded_name, model, requests, firsts[FOLDED])
    with engine_errors("PyTorch"), vanilla() as model:
        floor = _distance("the vanilla adapter", model, requests, firsts[VANILLA])
    noise = logprob_rms(firsts[VANILLA], firsts[CONTROL])
    return Outputs(
        engine=run.engine,
        concurrency=run.concurrency,
        prompts=len(firsts[FOLDED]),
        controls_equal=_equal(firsts[VANILLA], firsts[CONTROL]),
        repeats_equal=_equal(*answers[FOLDED]),
        vanilla_equal=_equal(firsts[FOLDED], firsts[VANILLA]),
        noise_rms=noise,
        unapplied=[arm for arm in (VANILLA, CONTROL, FOLDED) if not is_applied(firsts[BASE], firsts[arm], noise)],
        folded=distance,
        vanilla=floor,
        agree=agrees(distance, floor),
    )


def _answers(run: Measurement, arm: str, prompts: int) -> tuple[list[Sample], list[Sample]]:
    """An arm's first and second answer to each of the first prompts."""
    by_request: dict[int, list[Sample]] = {}
    for sample in run.samples:
        if sample.arm == arm:
            by_request.setdefault(sample.request, []).append(sample)
    pairs = [by_request[request] for request in sorted(by_request)[:prompts]]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def _equal(one: Sequence[Sample], other: Sequence[Sample]) -> float:
    return sum(a.token_ids == b.token_ids for a, b in zip(one, other, strict=True)) / len(one)


def logprob_rms(one: Sequence[Sample], other: Sequence[Sample]) -> float | None:
    """Of the differences in nats, over the tokens that two arms' answers begin with alike; None: there are none."""
    pairs = [(a, b, _alike(a, b)) for a, b in zip(one, other, strict=True)]
    return _rms([p - q for a, b, n in pairs for p, q in zip(a.logprobs[:n], b.logprobs[:n], strict=True)])


def _alike(one: Sample, other: Sample) -> int:
    """How many tokens two answers begin with alike."""
    pairs = zip(one.token_ids, other.token_ids, strict=True)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), len(one.token_ids))


def is_applied(base: Sequence[Sample], arm: Sequence[Sample], noise: float | None) -> bool:
    """Whether an adapter changes what the base model says: a token, or logprobs by more than two copies' noise."""
    if _equal(base, arm) < 1:
        return True
    change = logprob_rms(base, arm)
    return change is not None and change > APPLIED * (noise or 0.0)


@torch.inference_mode()
def _judge(model: Any, requests: Sequence[Request], sample: Sample) -> tuple[Answer, list[float]]:
    """How far one answer is from PyTorch's model, and the differences of the logprobs of its tokens."""
    prompt = requests[sample.request % len(requests)].prompt
    logits = model(input_ids=torch.tensor([[*prompt, *sample.token_ids]])).logits[0, len(prompt) - 1 : -1].double()
    chosen = logits.gather(1, torch.tensor(sample.token_ids)[:, None])[:, 0]
    gaps = logits.amax(-1) - chosen
    parted = gaps.nonzero()[:, 0].tolist()
    scores = (chosen - logits.logsumexp(-1)).tolist()
    differences = [served - score for served, score in zip(sample.logprobs, scores, strict=False)]
    gap = float(gaps[parted[0]]) if parted else None
    return Answer(request=sample.request, gap=gap, logprob_rms=_rms(differences)), differences


def _rms(differences: Sequence[float] | NDArray[np.float64]) -> float | None:
    return float(np.sqrt(np.mean(np.square(differences)))) if len(differences) else None


def _distance(reference: str, model: Any, requests: Sequence[Request], samples: Sequence[Sample]) -> Distance:
    answers, apart = zip(*(_judge(model, requests, sample) for sample in samples), strict=True)
    differences = np.concatenate(apart)
    rms = _rms(differences)
    # of the mean square: the squares' deviation / sqrt(tokens); the root divides it by 2 rms
    error = float(np.std(differences**2) / math.sqrt(len(differences)) / (2 * rms)) if rms else None
    return Distance(
        reference=reference,
        equal=sum(answer.gap is None for answer in answers) / len(answers),
        largest_gap=max(answer.gap or 0.0 for answer in answers),
        logprob_rms=rms,
        logprob_error=error,
        logprob_largest=float(np.abs(differences).max()) if len(differences) else None,
        answers=list(answers),
    )


def agrees(found: Distance, floor: Distance) -> bool:
    """The floor's rms, and where texts part, its gap or that of two logits that are each off by as much as any."""
    gap = max(floor.largest_gap, 2 * (floor.logprob_largest or 0.0))
    if found.largest_gap > gap + ROUNDING:
        return False
    if found.logprob_rms is None or floor.logprob_rms is None:
        return True
    allowed = floor.logprob_rms + SURE * math.hypot(found.logprob_error or 0.0, floor.logprob_error or 0.0)
    return found.logprob_rms <= allowed + ROUNDING
