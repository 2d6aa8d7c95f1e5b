"""Comparison of an engine's answers with PyTorch's: greedy tokens and their logprobs.

The folded adapter is compared with PyTorch's *unfolded* model, the vanilla adapter with PyTorch's vanilla adapter. The
second comparison shows how far the engine is from PyTorch without any folding: the noise floor. The folded adapter's
answers *agree* if they are as near to PyTorch's as that, within the error of an estimate from so many tokens.

An engine that applies every adapter wrongly has a floor as wrong as the folded adapter's answers. The base model's
noise therefore has to explain the floor: the distance of its answers from PyTorch's base model, times `sensitivity`,
the ratio by which coarser arithmetic in PyTorch moves the vanilla adapter's logprobs more than the base model's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from loraover.common.strict_json import StrictModel
from loraover_serve.comparison.rounding import FORMATS, rounding
from loraover_serve.engines.base import Sample, TokenRequest, engine_errors
from loraover_serve.judge.estimates import root_mean
from loraover_serve.judge.limits import BASE, SURE
from loraover_serve.parity.samples import CONTROL, FOLDED, MIXED, SWITCHING, VANILLA, Measurement

APPLIED = 3
"""Smallest multiple of the noise by which an applied adapter changes logprobs."""

ROUNDING = 1e-3  # nats by which float32's rounding sets apart two engines that otherwise compute alike

ADAPTED = (VANILLA, CONTROL, FOLDED)
"""Arms with an adapter."""

Reference = Callable[[], AbstractContextManager[Any]]
"""Returns a context manager that yields a model in PyTorch."""


class Answer(StrictModel):
    """Distance of the answer to one prompt from PyTorch's model."""

    request: int = Field(description="Index of the request")
    gap: float | None = Field(
        description="Difference of logits, in nats, where PyTorch first preferred another token; None if nowhere"
    )
    logprob_rms: float | None = Field(
        description="RMS difference of logprobs in nats; None if the engine returns no logprobs"
    )


class Distance(StrictModel):
    """Distance of one arm's answers from PyTorch's model."""

    reference: str = Field(description="The model in PyTorch, in words")
    equal: float = Field(description="Share of prompts whose tokens PyTorch would all have chosen, too")
    largest_gap: float = Field(
        description="Largest difference of logits, in nats, where PyTorch first preferred another token in an answer"
    )
    logprob_rms: float | None = Field(
        description="RMS difference of logprobs in nats; None if the engine returns no logprobs"
    )
    logprob_error: float | None = Field(
        description="Standard error of logprob_rms, in nats; with a single token logprob_rms itself"
    )
    logprob_largest: float | None = Field(description="Largest difference of logprobs, in nats")
    answers: list[Answer] = Field(description="Distance of the answer to each prompt")


class Outputs(StrictModel):
    """Comparison of one engine's answers with PyTorch's, for the first prompts of a run."""

    engine: str
    concurrency: int
    prompts: int = Field(description="Number of prompts")
    controls_equal: float = Field(description="Share of prompts that two copies of one adapter answer alike")
    repeats_equal: float = Field(description="Share of prompts that the folded adapter answers alike both times")
    vanilla_equal: float = Field(description="Share of prompts that folded and vanilla adapter answer alike")
    noise_rms: float | None = Field(
        description="RMS difference, in nats, between the logprobs of two copies of one adapter; None if the engine "
        "returns no logprobs"
    )
    unapplied: list[str] = Field(
        description="Arms whose adapter is not applied: tokens and, up to noise, logprobs are the base model's, or "
        "they are nearer to PyTorch's base model than to PyTorch's adapted model"
    )
    folded: Distance = Field(description="Distance of the folded adapter's answers from PyTorch's")
    vanilla: Distance = Field(description="Distance of the vanilla adapter's answers from PyTorch's: the noise floor")
    agree: bool = Field(
        description="Whether the folded adapter's distance is within the noise floor, and the noise floor within the "
        "base model's noise"
    )
    base: Distance | None = Field(
        default=None,
        description="Distance of the base model's answers from PyTorch's, which has to explain the noise floor; None "
        "if it was not compared",
    )
    sensitivity: float = Field(
        default=1.0,
        description="Ratio by which coarser arithmetic moves the vanilla adapter's logprobs more than the base "
        "model's in PyTorch, at least 1",
    )
    misapplied: bool = Field(
        default=False,
        description="Whether the vanilla adapter's distance exceeds what the base model's noise explains: the engine "
        "applies adapters wrongly",
    )

    def rows(self) -> list[tuple[str, Distance, str]]:
        """Arm, distance and verdict in words of each arm that was compared with PyTorch."""
        found = [
            (FOLDED, self.folded, "agrees" if self.agree else "too far"),
            (VANILLA, self.vanilla, "too far" if self.misapplied else "noise floor"),
        ]
        return found if self.base is None else [*found, (BASE, self.base, "noise")]


def compare_outputs(
    run: Measurement,
    requests: Sequence[TokenRequest],
    references: Mapping[str, Reference],
    folded_name: str,
    prompts: int,
) -> Outputs:
    """Compare the answers to the first prompts of a run with PyTorch's.

    Args:
        run: The samples.
        references: Models in PyTorch that the base model, the vanilla and the folded adapter should answer like, by
            the name of the arm.
        folded_name: Name of the folded adapter's model, in words.
        prompts: Number of prompts to compare.

    Raises:
        EngineError: A prompt that PyTorch cannot run the model on.
    """
    answers = {arm: _answers(run, arm, prompts) for arm in {sample.arm for sample in run.samples}}
    firsts = {arm: first for arm, (first, _) in answers.items()}

    def distances(name: str, model: Any, *arms: str) -> dict[str, Distance]:
        return {arm: distance_of(name, model, requests, firsts[arm]) for arm in arms}

    with engine_errors("PyTorch"), references[BASE]() as model:
        plain = distances("the base model", model, BASE, *ADAPTED)
        least = _moved(model, requests, firsts[BASE])
    with engine_errors("PyTorch"), references[VANILLA]() as model:
        mine = distances("the vanilla adapter", model, VANILLA, CONTROL)
        most = _moved(model, requests, firsts[VANILLA])
    with engine_errors("PyTorch"), references[FOLDED]() as model:
        mine |= distances(folded_name, model, FOLDED)
    noise = logprob_rms(firsts[VANILLA], firsts[CONTROL])
    sensitivity = max(1.0, most / least) if least > 0 else 1.0
    is_sound = agrees(mine[VANILLA], plain[BASE], sensitivity)

    def is_applied(arm: str) -> bool:
        return is_changed(firsts[BASE], firsts[arm], noise) and not is_base(mine[arm], plain[arm], plain[BASE])

    return Outputs(
        engine=run.engine,
        concurrency=run.concurrency,
        prompts=len(firsts[FOLDED]),
        controls_equal=equal_share(firsts[VANILLA], firsts[CONTROL]),
        repeats_equal=equal_share(*answers[FOLDED]),
        vanilla_equal=equal_share(firsts[FOLDED], firsts[VANILLA]),
        noise_rms=noise,
        unapplied=[arm for arm in ADAPTED if not is_applied(arm)],
        folded=mine[FOLDED],
        vanilla=mine[VANILLA],
        agree=is_sound and agrees(mine[FOLDED], mine[VANILLA]),
        base=plain[BASE],
        sensitivity=sensitivity,
        misapplied=not is_sound,
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
        one, other: Samples of the two arms, for the same requests.

    Returns:
        The difference; None if there are no logprobs to compare.
    """
    apart: list[float] = []
    for a, b in zip(one, other, strict=True):
        pairs = zip(a.token_ids, b.token_ids, strict=True)
        alike = next((i for i, (p, q) in enumerate(pairs) if p != q), len(a.token_ids))
        apart += [p - q for p, q in zip(a.logprobs[:alike], b.logprobs[:alike], strict=True)]
    return _rms(apart)


def is_changed(base: Sequence[Sample], arm: Sequence[Sample], noise: float | None) -> bool:
    """Whether an adapter changes the base model's answers: a token, or the logprobs beyond noise.

    Args:
        base: Samples of the base model.
        arm: Samples of the adapter, for the same requests.
        noise: RMS difference between the logprobs of two copies of one adapter, in nats; None if there are none.
    """
    if equal_share(base, arm) < 1:
        return True
    change = logprob_rms(base, arm)
    return change is not None and change > APPLIED * (noise or 0.0)


def is_base(adapted: Distance, plain: Distance, ground: Distance) -> bool:
    """Whether answers to requests for an adapter are those of the base model, up to noise.

    They are if they are nearer to the base model in PyTorch than to the adapter. Where the two models are no further
    apart than the noise lets see, this is not asked.

    Args:
        adapted: Distance of the answers from the adapter in PyTorch.
        plain: Distance of the answers from the base model in PyTorch.
        ground: Distance of the base model's answers from the base model in PyTorch.
    """
    mine, others, noise = adapted.logprob_rms, plain.logprob_rms, ground.logprob_rms
    if mine is None or others is None or noise is None:
        mine, others, noise = adapted.largest_gap, plain.largest_gap, ground.largest_gap
    return max(mine, others) > APPLIED * noise and others <= mine


@torch.inference_mode()
def _next_logits(model: Any, requests: Sequence[TokenRequest], sample: Sample) -> Tensor:
    """Logits of a model in PyTorch before each token of an answer, (tokens, vocabulary), in float64."""
    prompt = requests[sample.request % len(requests)].prompt
    ids = torch.tensor([[*prompt, *sample.token_ids]], device=model.device)
    logits: Tensor = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].cpu().double()
    return logits


def _chosen(logits: Tensor, sample: Sample) -> Tensor:
    """Values of an answer's tokens, (tokens,)."""
    return logits.gather(1, torch.tensor(sample.token_ids)[:, None])[:, 0]


def _moved(model: Any, requests: Sequence[TokenRequest], samples: Sequence[Sample]) -> float:
    """RMS change of the logprobs of answers' tokens by arithmetic that is coarser than the model's, in nats."""
    coarser = FORMATS["int8" if model.dtype == torch.bfloat16 else "bf16"]

    def scores() -> Tensor:
        found = [_chosen(_next_logits(model, requests, s).log_softmax(-1), s) for s in samples]
        return torch.cat([each[: len(s.logprobs) or None] for each, s in zip(found, samples, strict=True)])

    exact = scores()
    with rounding(model, coarser):
        return float((scores() - exact).square().mean().sqrt())


def _rms(differences: Sequence[float] | NDArray[np.float64]) -> float | None:
    return float(np.sqrt(np.mean(np.square(differences)))) if len(differences) else None


def distance_of(reference: str, model: Any, requests: Sequence[TokenRequest], samples: Sequence[Sample]) -> Distance:
    """Distance of one arm's answers from a model in PyTorch.

    Args:
        reference: The model in words.
        samples: The answers.
    """
    answers: list[Answer] = []
    apart: list[float] = []
    for sample in samples:
        logits = _next_logits(model, requests, sample)
        gaps = logits.amax(-1) - _chosen(logits, sample)
        parted = gaps.nonzero()[:, 0].tolist()
        scores = _chosen(logits.log_softmax(-1), sample).tolist()
        mine = [served - score for served, score in zip(sample.logprobs, scores, strict=False)]
        gap = float(gaps[parted[0]]) if parted else None
        answers.append(Answer(request=sample.request, gap=gap, logprob_rms=_rms(mine)))
        apart += mine
    differences = np.array(apart)
    rms, error = root_mean((differences**2).tolist()) if len(differences) else (None, None)
    return Distance(
        reference=reference,
        equal=sum(answer.gap is None for answer in answers) / len(answers),
        largest_gap=max(answer.gap or 0.0 for answer in answers),
        logprob_rms=rms,
        logprob_error=error,
        logprob_largest=float(np.abs(differences).max()) if len(differences) else None,
        answers=answers,
    )


def agrees(found: Distance, floor: Distance, factor: float = 1.0) -> bool:
    """Whether a distance is within a noise floor.

    The RMS difference of logprobs may exceed the floor's by the error of the two estimates. Where texts first differ,
    the gap may be the floor's largest, or that of two logits that are each off by the floor's largest difference.

    Args:
        found: A distance, such as that of the folded adapter.
        floor: The distance that noise explains, such as that of the vanilla adapter.
        factor: Ratio by which noise moves the answers of `found` more than those of `floor`.
    """
    gap = factor * max(floor.largest_gap, 2 * (floor.logprob_largest or 0.0))
    if found.largest_gap > gap + ROUNDING:
        return False
    if found.logprob_rms is None or floor.logprob_rms is None:
        return True
    error = math.hypot(found.logprob_error or 0.0, factor * (floor.logprob_error or 0.0))
    return found.logprob_rms <= factor * floor.logprob_rms + SURE * error + ROUNDING


class Together(StrictModel):
    """Answers of one adapter to requests that ran in turn, or in one batch, with those of other adapters."""

    engine: str
    concurrency: int
    arm: str = Field(description="Switching for adapters in turn, mixed for several adapters in one batch")
    adapter: str = Field(description="Name of the adapter's arm")
    prompts: int = Field(description="Number of prompts")
    alone_equal: float = Field(description="Share of prompts that the adapter alone answers with the same tokens")
    distance: Distance = Field(description="Distance of the answers from the adapter's in PyTorch")
    agree: bool = Field(description="Whether that distance is within the noise floor, that of the vanilla adapter")


def compare_together(
    run: Measurement,
    requests: Sequence[TokenRequest],
    adapter_of: Callable[[str, int], str],
    alone: Mapping[tuple[str, int], Sample],
    references: Mapping[str, Reference],
    floor: Outputs,
) -> list[Together]:
    """Compare the answers of "switching" and "mixed" with those of each adapter alone and with PyTorch's.

    Args:
        run: The samples.
        adapter_of: Function that gives the adapter which answered a request of an arm.
        alone: Answers of each adapter alone, by its name and the index of the request; only these are compared.
        references: Models in PyTorch, by the names of the adapters.
        floor: Comparison of the run's other arms, with the noise floor.

    Raises:
        EngineError: A prompt that PyTorch cannot run a model on.
    """
    found = []
    for name, reference in references.items():
        with engine_errors("PyTorch"), reference() as model:
            for arm in (SWITCHING, MIXED):
                firsts = {s.request: s for s in reversed(run.samples) if s.arm == arm}
                mine = [i for i in sorted(firsts) if adapter_of(arm, i) == name and (name, i) in alone]
                if not mine:
                    continue
                samples = [firsts[i] for i in mine]
                distance = distance_of(f"{name} in PyTorch", model, requests, samples)
                found.append(
                    Together(
                        engine=run.engine,
                        concurrency=run.concurrency,
                        arm=arm,
                        adapter=name,
                        prompts=len(mine),
                        alone_equal=equal_share(samples, [alone[name, i] for i in mine]),
                        distance=distance,
                        agree=agrees(distance, floor.vanilla),
                    )
                )
    return found
