"""Strength of an adapter that rounding hides, and the number of questions with which a recording decides on it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from loraover_serve.comparison.rounding import NumberFormat
from loraover_serve.judge.case import allowed_strength, strength_along
from loraover_serve.judge.estimates import Interval, t_quantile
from loraover_serve.judge.evidence import projected
from loraover_serve.judge.limits import ADAPTER, BASE, COARSER, SEEN
from loraover_serve.judge.results import LogprobDistance, Off
from loraover_serve.verify.pytorch import TorchModels, likeliest

TOP = 20  # logprobs that most servers give
NUMBERS = (24, 32, 48)  # questions, of which the smallest number that decides is taken; else all
MEASURED = 16  # questions on which rounding is measured


@dataclass(frozen=True)
class Rounding:
    """Effect of a number format on PyTorch's answers.

    Args:
        distance: RMS distance of the base model's logprobs, in nats.
        strength: Strength of the adapter, with its interval over MEASURED prompts.
    """

    distance: float
    strength: Interval


def measure_rounding(models: TorchModels, format_: NumberFormat) -> Rounding:
    """Run both models in a number format, and compare what a server would answer."""
    base, adapter = models.variants.rounded_both(format_, models.subject.deltas, MEASURED)
    changes, off = [], []
    for index, question in enumerate(models.questions[:MEASURED]):
        for position in question.answered:
            one, two, right, with_adapter = (
                model.at(index, position) for model in (base, adapter, models.expected[BASE], models.expected[ADAPTER])
            )
            shown = [i for i in likeliest(one, TOP) if i in {*likeliest(two, TOP)}]
            if shown:
                change, direction = (mine[shown].astype(np.float64) for mine in (two - one, with_adapter - right))
                changes.append(projected(index, change.tolist(), direction.tolist()))
            error = (one - right)[likeliest(one, TOP)].astype(np.float64)
            off.append(Off(index, float(np.mean(np.square(error))), float(np.abs(error).max())))
    return Rounding(LogprobDistance.of(off).rms, strength_along(changes))


def choose_number(number: int, bias: float, bf16: Rounding, *, chosen: bool) -> dict[str, Any]:
    """The number of questions that decides on a server in bfloat16, and what it shows.

    The error of the strength shrinks with the root of the number of questions.
    """
    known = min(MEASURED, number)

    def power(questions: int) -> dict[str, Any]:
        ratio = questions / known
        narrower = t_quantile(max(questions - 1, 1)) / t_quantile(max(known - 1, 1))
        return power_of(questions, bf16.strength.half * narrower / math.sqrt(ratio), bias)

    if not chosen:
        number = next((n for n in NUMBERS if n < number and power(n)["decides"]), number)
    return power(number)


def power_of(questions: int, half: float, bias: float) -> dict[str, Any]:
    """The section `power` of a reference: whether its questions tell a right adapter from one that is 20 % off.

    A server's noise counts as bfloat16's up to COARSER times that of PyTorch: with so much of it, a right adapter has
    to pass, and one 20 % off may not.

    Args:
        questions: Number of questions.
        half: Half the width of the interval in which a server that rounds like PyTorch in bfloat16 shows the strength.
        bias: Strength of the adapter if PyTorch computes in bfloat16.
    """
    low, high = allowed_strength("bf16", bias)
    return {
        "questions": questions,
        "half": half if math.isfinite(half) else None,
        "decides": COARSER * half + (high - low) / 2 < SEEN,
    }


def effect_of(models: TorchModels) -> float:
    """RMS change of logprobs by the adapter, of the likeliest tokens of the adapted model."""
    squares = []
    for index, question in enumerate(models.questions):
        for position in question.answered:
            two, one = (models.expected[arm].at(index, position) for arm in (ADAPTER, BASE))
            ids = likeliest(two, TOP)
            squares.append(float(np.mean(np.square(two[ids] - one[ids]))))
    return math.sqrt(sum(squares) / len(squares))
