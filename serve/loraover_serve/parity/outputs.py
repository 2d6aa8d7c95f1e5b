"""Do the arms say the right things? Greedy tokens and their logprobs against PyTorch's unfolded model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field

from loraover_serve.parity.analysis import CONTROL, FOLDED, VANILLA
from loraover_serve.parity.measure import Run
from loraover_serve.parity.sample import Sample
from loraover_serve.parity.workload import Request

BASE = "base"


class Outputs(BaseModel):
    """What one engine answered, over the prompts of a run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    engine: str
    prompts: int
    controls_equal: float = Field(description="share of prompts with equal tokens from two copies of one adapter")
    repeats_equal: float = Field(description="share of prompts that the folded adapter answers alike both times")
    folded_applied: bool = Field(description="the folded adapter's tokens differ from the base model's somewhere")
    vanilla_applied: bool
    reference: str = Field(description="what the folded adapter's tokens are compared with")
    reference_equal: float = Field(description="share of prompts whose tokens are all PyTorch's own choices")
    logprob_rms: float | None = Field(description="nats, of the folded adapter's logprobs against the reference's")
    logprob_noise: float | None = Field(description="nats, the same for the base model on both engines")


def compare_outputs(
    run: Run,
    requests: Sequence[Request],
    reference: AbstractContextManager[Any],
    reference_name: str,
    base: AbstractContextManager[Any],
    prompts: int,
) -> Outputs:
    """Compare the answers to the first prompts of a run.

    Args:
        reference: a context that gives PyTorch's model of the folded adapter.
        base: a context that gives PyTorch's base model.
        prompts: how many.
    """
    firsts = {arm: _answers(run, arm, prompts) for arm in {sample.arm for sample in run.samples}}
    with reference as model:
        judged = [_judge(model, requests, sample) for sample in firsts[FOLDED][0]]
    noise = None
    if BASE in firsts and firsts[BASE][0][0].logprobs:
        with base as model:
            noise = _rms([d for sample in firsts[BASE][0] for d in _judge(model, requests, sample)[1]])
    errors = [d for _, differences in judged for d in differences]
    return Outputs(
        engine=run.engine,
        prompts=len(judged),
        controls_equal=_equal(firsts[VANILLA][0], firsts[CONTROL][0]),
        repeats_equal=_equal(*firsts[FOLDED]),
        folded_applied=_applied(firsts, FOLDED),
        vanilla_applied=_applied(firsts, VANILLA),
        reference=reference_name,
        reference_equal=sum(own for own, _ in judged) / len(judged),
        logprob_rms=_rms(errors) if errors else None,
        logprob_noise=noise,
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


def _applied(firsts: dict[str, tuple[list[Sample], list[Sample]]], arm: str) -> bool:
    return BASE not in firsts or _equal(firsts[BASE][0], firsts[arm][0]) < 1


@torch.inference_mode()
def _judge(model: Any, requests: Sequence[Request], sample: Sample) -> tuple[bool, list[float]]:
    """Whether every token is PyTorch's own choice, and the differences of logprobs, teacher-forced."""
    prompt = requests[sample.request % len(requests)].prompt
    logits = model(input_ids=torch.tensor([[*prompt, *sample.token_ids]])).logits[0, len(prompt) - 1 : -1].double()
    tokens = torch.tensor(sample.token_ids)
    scores = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    own = bool((logits.argmax(-1) == tokens).all())
    return own, [served - score for served, score in zip(sample.logprobs, scores.tolist(), strict=False)]


def _rms(values: Sequence[float]) -> float:
    return math.sqrt(sum(value * value for value in values) / len(values))
