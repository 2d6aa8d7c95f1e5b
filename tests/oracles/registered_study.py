"""Answers of a registered study in plain float64: intervals, corrected p-values and the rule over four tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtr, stdtrit

Array = NDArray[np.float64]


def half_width(gaps: Array, tokens: Array, level: float) -> float:
    """Half the interval of the mean difference per token, from the variances of seeds and of rows.

    Args:
        gaps: Nats of the method minus the baseline's, shape (seeds, rows).
        tokens: Tokens of each row, shape (rows,).
        level: Share of cases that the interval leaves out.
    """
    seeds, rows = gaps.shape
    of_seed = [sum(row) / sum(tokens) for row in gaps.tolist()]
    mean = sum(of_seed) / seeds
    of_row = [(gap - mean * count) / (sum(tokens) / rows) for gap, count in zip(gaps.mean(axis=0), tokens, strict=True)]
    errors = []
    for values in (of_seed, of_row):
        number = len(values)
        centre = sum(values) / number
        variance = sum((value - centre) ** 2 for value in values) / (number - 1)
        errors.append(-stdtrit(number - 1, level / 2) * np.sqrt(variance / number))
    return float(np.sqrt(errors[0] ** 2 + errors[1] ** 2))


def p_value(gaps: Array, tokens: Array) -> float:
    """Level at which the interval ends at zero, by bisection of its logarithm."""
    mean = abs(gaps.sum() / (len(gaps) * tokens.sum()))
    low, high = -60.0, 0.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (low, middle) if half_width(gaps, tokens, np.exp(middle)) < mean else (middle, high)
    return float(np.exp(high))


def student_p(t: float, freedom: int) -> float:
    """Two-sided p-value of Student's t, to which `p_value` comes down where rows do not differ."""
    return float(2 * stdtr(freedom, -abs(t)))


def answer(tasks: Sequence[Mapping[str, Array]]) -> tuple[str, list[dict[str, float]]]:
    """Answer a question, and give each task's difference and interval in per cent and its corrected p-value.

    Args:
        tasks: For each task the nats of `method` and `baseline`, shape (seeds, rows), and `tokens`, shape (rows,).
    """
    found = []
    for task in tasks:
        gaps, tokens = task["method"] - task["baseline"], task["tokens"]
        scale = 100 / (task["baseline"].sum() / (len(gaps) * tokens.sum()))
        mean = scale * gaps.sum() / (len(gaps) * tokens.sum())
        half = scale * half_width(gaps, tokens, 0.05)
        found.append({"percent": mean, "low": mean - half, "high": mean + half, "p": p_value(gaps, tokens)})
    ranked = sorted(found, key=lambda task: task["p"])
    for place, task in enumerate(ranked):
        before = ranked[place - 1]["corrected"] if place else 0.0
        task["corrected"] = max(before, min(1.0, (len(ranked) - place) * task["p"]))
    below = sum(task["corrected"] < 0.05 and task["percent"] < 0 for task in found)
    above = sum(task["corrected"] < 0.05 and task["percent"] > 0 for task in found)
    no_gain = sum((task["corrected"] < 0.05 and task["percent"] > 0) or task["low"] > -1.0 for task in found)
    if below >= 3 and above == 0:
        return "yes", found
    return ("no" if no_gain >= 2 else "cannot be told"), found
