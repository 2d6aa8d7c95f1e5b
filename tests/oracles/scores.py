"""Scores of matrices from recorded steps, one matrix and one element at a time where the product works on stacks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from oracles.contraction import Array

Step = dict[str, tuple[Array, Array]]
"""M and dL/dM of every matrix before one optimizer step."""


def normalised(steps: Sequence[Step]) -> list[Step]:
    """Each step's gradients divided by their joint norm."""
    found = []
    for step in steps:
        norm = np.sqrt(sum((gradient**2).sum() for _, gradient in step.values()))
        found.append({name: (matrix, gradient / norm) for name, (matrix, gradient) in step.items()})
    return found


def fisher(steps: Sequence[Step], name: str) -> float:
    """Mean squared gradient. Source: Gao et al. 2023 (OPF), section 3.3."""
    return float(np.mean([step[name][1] ** 2 for step in normalised(steps)]))


def taylor(steps: Sequence[Step], name: str) -> float:
    """Mean of |w dL/dw|. Source: Molchanov et al. 2019, arXiv:1906.10771, equation 8."""
    return float(np.mean([np.abs(step[name][0] * step[name][1]) for step in normalised(steps)]))


def sensitivity(steps: Sequence[Step], name: str, beta: float = 0.85) -> float:
    """Mean of I_bar * U_bar after the last step. Source: Zhang et al. 2023 (AdaLoRA), arXiv:2303.10512, section 3.2.

    I^(t) = |w dL/dw|, I_bar^(t) = beta I_bar^(t-1) + (1 - beta) I^(t), U^(t) = |I^(t) - I_bar^(t)|,
    U_bar^(t) = beta U_bar^(t-1) + (1 - beta) U^(t), from zero.
    """
    smoothed, uncertain = np.zeros(()), np.zeros(())
    for step in normalised(steps):
        now = np.abs(step[name][0] * step[name][1])
        smoothed = beta * smoothed + (1 - beta) * now
        uncertain = beta * uncertain + (1 - beta) * np.abs(now - smoothed)
    return float(np.mean(smoothed * uncertain))


def inverse(steps: Sequence[Step], name: str) -> float:
    return -fisher(steps, name)
