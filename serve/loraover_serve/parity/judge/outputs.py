"""Comparison of an engine's answers with PyTorch's: greedy tokens and their logprobs.

The folded adapter is compared with PyTorch's *unfolded* model, the vanilla adapter with PyTorch's vanilla adapter. The
second comparison shows how far the engine is from PyTorch without any folding: the noise floor. The folded adapter's
answers *agree* if they are as near to PyTorch's as that, within the error of an estimate from so many tokens.
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

from loraover_serve.comparison.thresholds import APPLIED, SURE
from loraover_serve.engines.base import engine_errors
from loraover_serve.engines.sample import Request, Sample
from loraover_serve.parity.samples import BASE, CONTROL, FOLDED, VANILLA, Measurement

ROUNDING = 1e-3  # nats by which float32's rounding sets apart two engines that otherwise compute alike

Reference = Callable[[], AbstractContextManager[Any]]
"""Returns a context manager that yields a model in PyTorch."""


class Answer(BaseModel):
    """Distance of the answer to one prompt from PyTorch's model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    request: int = Field(description="index of the request")
    gap: float | None = Field(
        description="difference of logits, in nats, where PyTorch first preferred another token; None if nowhere"
    )
    logprob_rms: float | None = Field(
        description="RMS difference of logprobs in nats; None if the engine returns no logprobs"
    )


class Distance(BaseModel):
    """Distance of one arm's answers from PyTorch's model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    reference: str = Field(description="the model in PyTorch, in words")
    equal: float = Field(description="share of prompts whose tokens PyTorch would all have chosen, too")
    largest_gap: float = Field(
        description="largest difference of logits, in nats, where PyTorch first preferred another token in an answer"
    )
    logprob_rms: float | None = Field(
        description="RMS difference of logprobs in nats; None if the engine returns no logprobs"
    )
    logprob_error: float | None = Field(description="standard error of logprob_rms, in nats")
    logprob_largest: float | None = Field(description="largest difference of logprobs, in nats")
    answers: list[Answer] = Field(description="distance of the answer to each prompt")


class Outputs(BaseModel):
    """Comparison of one engine's answers with PyTorch's, for the first prompts of a run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    engine: str
    concurrency: int
    prompts: int = Field(description="number of prompts")
    controls_equal: float = Field(description="share of prompts that two copies of one adapter answer alike")
    repeats_equal: float = Field(description="share of prompts that the folded adapter answers alike both times")
    vanilla_equal: float = Field(description="share of prompts that folded and vanilla adapter answer alike")
    noise_rms: float | None = Field(
        description="RMS difference, in nats, between the logprobs of two copies of one adapter; None if the engine "
        "returns no logprobs"
    )
    unapplied: list[str] = Field(
        description="arms whose adapter is not applied: tokens and, up to noise, logprobs are the base model's"
    )
    folded: Distance = Field(description="distance of the folded adapter's answers from PyTorch's")
    vanilla: Distance = Field(description="distance of the vanilla adapter's answers from PyTorch's: the noise floor")
    agree: bool = Field(description="whether the folded adapter's distance is within the noise floor")


def compare_outputs(
    run: Measurement, requests: Sequence[Request], folded: Reference, folded_name: str, vanilla: Reference, prompts: int
) -> Outputs:
    """Compare the answers to the first prompts of a run with PyTorch's.

    Args:
        run: the samples.
        requests: the requests of the run.
        folded: model that the folded adapter should answer like.
        folded_name: name of that model, in words.
        vanilla: model of the vanilla adapter.
        prompts: number of prompts to compare.

    Raises:
        EngineError: a prompt that PyTorch cannot run the model on.
    """
    answers = {arm: _answers(run, arm, prompts) for arm in {sample.arm for sample in run.samples}}
    firsts = {arm: first for arm, (first, _) in answers.items()}
    with engine_errors("PyTorch"), folded() as model:
        distance = distance_of(folded_name, model, requests, firsts[FOLDED])
    with engine_errors("PyTorch"), vanilla() as model:
        floor = distance_of("the vanilla adapter", model, requests, firsts[VANILLA])
    noise = logprob_rms(firsts[VANILLA], firsts[CONTROL])
    return Outputs(
        engine=run.engine,
        concurrency=run.concurrency,
        prompts=len(firsts[FOLDED]),
        controls_equal=equal_share(firsts[VANILLA], firsts[CONTROL]),
        repeats_equal=equal_share(*answers[FOLDED]),
        vanilla_equal=equal_share(firsts[FOLDED], firsts[VANILLA]),
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


def equal_share(one: Sequence[Sample], other: Sequence[Sample]) -> float:
    """Share of requests that two arms answer with the same tokens."""
    return sum(a.token_ids == b.token_ids for a, b in zip(one, other, strict=True)) / len(one)


def logprob_rms(one: Sequence[Sample], other: Sequence[Sample]) -> float | None:
    """RMS difference of two arms' logprobs, in nats, over the tokens before their answers first differ.

    Args:
        one, other: samples of the two arms, for the same requests.

    Returns:
        The difference; None if there are no logprobs to compare.
    """
    pairs = [(a, b, _alike(a, b)) for a, b in zip(one, other, strict=True)]
    return _rms([p - q for a, b, n in pairs for p, q in zip(a.logprobs[:n], b.logprobs[:n], strict=True)])


def _alike(one: Sample, other: Sample) -> int:
    """Number of tokens before two answers first differ."""
    pairs = zip(one.token_ids, other.token_ids, strict=True)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), len(one.token_ids))


def is_applied(base: Sequence[Sample], arm: Sequence[Sample], noise: float | None) -> bool:
    """Whether an adapter changes the base model's answers: a token, or the logprobs beyond noise.

    Args:
        base: samples of the base model.
        arm: samples of the adapter, for the same requests.
        noise: RMS difference between the logprobs of two copies of one adapter, in nats; None if there are none.
    """
    if equal_share(base, arm) < 1:
        return True
    change = logprob_rms(base, arm)
    return change is not None and change > APPLIED * (noise or 0.0)


@torch.inference_mode()
def _judge(model: Any, requests: Sequence[Request], sample: Sample) -> tuple[Answer, list[float]]:
    """Distance of one answer from PyTorch's model, and the differences of its tokens' logprobs."""
    prompt = requests[sample.request % len(requests)].prompt
    ids = torch.tensor([[*prompt, *sample.token_ids]], device=model.device)
    logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].cpu().double()
    chosen = logits.gather(1, torch.tensor(sample.token_ids)[:, None])[:, 0]
    gaps = logits.amax(-1) - chosen
    parted = gaps.nonzero()[:, 0].tolist()
    scores = (chosen - logits.logsumexp(-1)).tolist()
    differences = [served - score for served, score in zip(sample.logprobs, scores, strict=False)]
    gap = float(gaps[parted[0]]) if parted else None
    return Answer(request=sample.request, gap=gap, logprob_rms=_rms(differences)), differences


def _rms(differences: Sequence[float] | NDArray[np.float64]) -> float | None:
    return float(np.sqrt(np.mean(np.square(differences)))) if len(differences) else None


def distance_of(reference: str, model: Any, requests: Sequence[Request], samples: Sequence[Sample]) -> Distance:
    """Distance of one arm's answers from a model in PyTorch.

    Args:
        reference: the model in words.
        model: the model.
        requests: the requests of the run.
        samples: the answers.
    """
    answers, apart = zip(*(_judge(model, requests, sample) for sample in samples), strict=True)
    differences = np.concatenate(apart)
    rms = _rms(differences)
    # standard error of the mean square: deviation of the squares / sqrt(tokens); the root divides it by 2 rms
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
    """Whether a distance is within the noise floor.

    The RMS difference of logprobs may exceed the floor's by the error of the two estimates. Where texts first differ,
    the gap may be the floor's largest, or that of two logits that are each off by the floor's largest difference.

    Args:
        found: distance of the folded adapter.
        floor: distance of the vanilla adapter.
    """
    gap = max(floor.largest_gap, 2 * (floor.logprob_largest or 0.0))
    if found.largest_gap > gap + ROUNDING:
        return False
    if found.logprob_rms is None or floor.logprob_rms is None:
        return True
    allowed = floor.logprob_rms + SURE * math.hypot(found.logprob_error or 0.0, floor.logprob_error or 0.0)
    return found.logprob_rms <= allowed + ROUNDING
