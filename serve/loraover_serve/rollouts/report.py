"""The report on a file of rollouts: the verdict on the run, and on each step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from pydantic import Field

from loraover.common.strict_json import StrictModel
from loraover_serve.judge.estimates import Interval
from loraover_serve.judge.limits import EXIT_CODES
from loraover_serve.judge.results import Suspect
from loraover_serve.rollouts.verdict import RolloutVerdict

NOT_JUDGED = "not judged"
"""Verdict, in words, of a step without one and of a run without judged steps."""


class JudgedStep(StrictModel):
    """A step of a training loop, judged together with those before it."""

    step: int = Field(description="Number of the step")
    verdict: RolloutVerdict | None = Field(description="Verdict; null if nothing can be judged, for the reason given")
    fault: str | None = Field(description="Name of the likeliest fault; null if there is none, or none explains it")
    reason: str = Field(description="Reason, in a sentence")
    strength: Interval | None = Field(description="Strength of the adapter in the engine's logprobs")
    allowed: tuple[float, float] | None = Field(description="Strengths that a right engine can have")
    effect: float = Field(description="RMS change of the sampled tokens' logprobs by the adapter, in nats")
    distance: float = Field(description="RMS difference of the engine's logprobs from the trainer's, in nats")
    noise: float = Field(description="RMS difference of a right engine from the trainer that was taken, in nats")
    tokens: int = Field(description="Number of tokens that were judged, those of earlier steps included")
    prompts: int = Field(description="Number of their prompts")
    mean_difference: float = Field(description="Mean of |e - a| over all tokens of the step, in nats")
    kl: float = Field(
        description="Mean of e - a over all tokens of the step, in nats: an estimate of the KL divergence"
    )
    suspects: list[Suspect] = Field(description="Faults that were compared, the nearest first, if the step differs")
    not_excluded: list[str] = Field(description="Models and factors that the engine could have")

    @property
    def word(self) -> str:
        """The verdict, or words for none."""
        return self.verdict or NOT_JUDGED


class Span(NamedTuple):
    """Steps in a row that have the same verdict.

    Args:
        steps: The steps.
    """

    steps: list[JudgedStep]

    @property
    def last(self) -> JudgedStep:
        """The last step, which is judged with most steps before it."""
        return self.steps[-1]

    @property
    def name(self) -> str:
        """Numbers of the first step and of the last."""
        first, last = self.steps[0].step, self.last.step
        return str(first) if first == last else f"{first} to {last}"


class RolloutReport(StrictModel):
    """Contents of `rollouts.json`."""

    schema_version: int = 1
    verdict: RolloutVerdict | None = Field(
        description='The first of these that applies: "differs" if a step differs, "not comparable" if a step is not, '
        "null if a step with an adapter cannot be judged, and the verdict of the last step"
    )
    fault: str | None = Field(description="Name of the fault at the first step that differs and has one")
    steps: list[JudgedStep]
    file: str = Field(description="File of the rollouts")
    window: int = Field(description="Largest number of steps that were judged together")
    command: str = Field(description="Command line that judges them again")
    versions: dict[str, str] = Field(description="Versions of packages")
    hardware: str = Field(description="Processor")
    date: str = Field(description="Day of the judgement, in UTC")

    @property
    def word(self) -> str:
        """The verdict, or words for none."""
        return self.verdict or NOT_JUDGED

    @property
    def decisive(self) -> JudgedStep:
        """The step on which the verdict rests."""
        return decisive_step(self.steps)

    @property
    def spans(self) -> list[Span]:
        """Steps in a row that have the same verdict and the same fault."""
        found: list[Span] = []
        for each in self.steps:
            if found and (found[-1].last.verdict, found[-1].last.fault) == (each.verdict, each.fault):
                found[-1].steps.append(each)
            else:
                found.append(Span([each]))
        return found

    @property
    def exit_code(self) -> int:
        """0 as trained, 1 differs, 3 anything else."""
        return EXIT_CODES[self.verdict if self.verdict in ("as trained", "differs") else "inconclusive"]


def decisive_step(steps: list[JudgedStep]) -> JudgedStep:
    """The step that decides: the first that names a fault, else that differs, else that cannot be judged."""
    begun = next((each.step for each in steps if each.effect > 0 or each.tokens == 0), math.inf)
    rules: list[Callable[[JudgedStep], bool]] = [
        lambda each: each.verdict == "differs" and each.fault is not None,
        lambda each: each.verdict == "differs",
        lambda each: each.verdict == "not comparable",
        lambda each: each.verdict is None and each.step >= begun,  # B = 0 is right before, and never again
    ]
    return next((each for rule in rules for each in steps if rule(each)), steps[-1])
