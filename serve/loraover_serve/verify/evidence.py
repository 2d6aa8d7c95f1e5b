"""What an engine's answers show of an adapter: its strength, and noise that the adapter ought to share with the base.

Strength is judged over prompts (see `strength`). On an engine that computes exactly, a few prompts are enough: noise
that is CERTAIN times what the base model shows, all of it along the adapter, moves the strength no further than

    CERTAIN * sqrt(2) * (noise + FLOOR) / effect.

What strength cannot see is off at right angles to the adapter. It shows as *excess*: how much further the adapter's
answers are from PyTorch's than the base model's, by prompt, so that each prompt has its own size of noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from loraover_serve.engines.answers import Expected, Row, Rows, paired
from loraover_serve.verify.report import LogprobDistance
from loraover_serve.verify.strength import Estimate, between_arms, log_ratio, strength

FLOOR = 1e-4
"""Nats by which float32's rounding alone may set apart two computations."""

EXACT = 10 * FLOOR
"""Noise below which the engine computes in float32."""

CERTAIN = 5.0
"""Multiple of the base model's noise that the adapter's never reaches."""

EXCESS = 1.49
"""Ratio of the adapter's noise to the base model's times the sensitivity, that still is noise.

`python -m benchmarks.verify_calibration` in tests/ derives it from recorded engines."""

FEW_PROMPTS = 6
"""Fewer prompts than this tell nothing of how far prompts differ."""

CLEAR = 4.0
"""Multiple of the noise by which an adapter changes a position at which one sees whether it was applied."""


AS_BASE = 4.0
"""Ratio by which an answer of the base model is nearer to the base model's than to the adapter's."""


@dataclass(frozen=True)
class Evidence:
    """An engine's answers beside PyTorch's.

    Args:
        noise: Distance of the base model.
        found: Distance of the adapter.
        effect: RMS change of logprobs by the adapter in PyTorch, in nats.
        strength: Strength of the adapter in what the engine changes.
        excess: Logarithm of the adapter's distance over the base model's times the sensitivity.
        as_base: Number of positions at which the adapter's request has the base model's answer.
        clear: Number of positions at which that would be seen.
        prompts: Number of prompts.
    """

    noise: LogprobDistance
    found: LogprobDistance
    effect: float
    strength: Estimate
    excess: Estimate
    as_base: int
    clear: int
    prompts: int


def weigh(base_rows: Rows, adapter_rows: Rows, base: Expected, adapter: Expected, sensitivity: float = 1.0) -> Evidence:
    """Compare an engine's answers with those of a base model and an adapted model in PyTorch.

    Args:
        base_rows: The engine's base model.
        adapter_rows: The engine's adapter.
        base: The base model in PyTorch.
        adapter: The adapted model in PyTorch.
        sensitivity: Ratio by which rounding moves the adapted model further than the base model.
    """
    noise, found = distance(base_rows, base), distance(adapter_rows, adapter)
    effect = between(adapter_rows, adapter, base)
    pairs = paired(base_rows, adapter_rows) or [(like(row, base), row) for row in adapter_rows]
    certain = CERTAIN * math.sqrt(2) * (noise.rms + FLOOR) / effect if effect > 0 else math.inf
    measured = strength(between_arms(pairs, base, adapter))
    as_base, clear = count_base(pairs, base, adapter, CLEAR * math.sqrt(2) * (noise.rms + FLOOR))
    return Evidence(
        noise=noise,
        found=found,
        effect=effect,
        strength=Estimate(float(measured.value), min(float(measured.half), certain)),
        excess=_excess(base_rows, adapter_rows, base, adapter, sensitivity),
        as_base=as_base,
        clear=clear,
        prompts=len({one.question for one, _ in pairs}),
    )


def distance(rows: Rows, expected: Expected) -> LogprobDistance:
    """Distance of logprobs from PyTorch's, with the standard error over prompts.

    Args:
        rows: An engine's logprobs.
        expected: PyTorch's.
    """
    return LogprobDistance.of([row.logprobs - expected.like(row) for row in rows], [row.question for row in rows])


def between(rows: Rows, one: Expected, other: Expected) -> float:
    """RMS difference of two models' logprobs in PyTorch, in nats, of the tokens and positions that an engine gave."""
    squares = [float(np.mean(np.square(one.like(row) - other.like(row)))) for row in rows]
    return math.sqrt(np.mean(squares))


def apart(pairs: Sequence[tuple[Row, Row]], base: Expected, adapter: Expected) -> float:
    """RMS difference, in nats, between what an engine's adapter changes and what an adapted model in PyTorch changes.

    The base model's own noise cancels.
    """
    squares = [
        float(np.mean(np.square(two.logprobs - one.logprobs - (adapter.like(one) - base.like(one)))))
        for one, two in pairs
    ]
    return math.sqrt(np.mean(squares))


def like(row: Row, expected: Expected) -> Row:
    """PyTorch's answer at the place of a row."""
    return Row(row.question, row.position, expected.like(row).astype(np.float32), row.ids)


def count_base(
    pairs: Sequence[tuple[Row, Row]], base: Expected, adapter: Expected, limit: float = math.inf
) -> tuple[int, int]:
    """Number of clear positions at which an engine's adapter changes nothing, and number of clear positions.

    Args:
        pairs: The engine's rows of the base model and of the adapter.
        base: The base model in PyTorch.
        adapter: The adapted model in PyTorch.
        limit: Largest RMS change, in nats, that is taken for noise. A weaker adapter changes more.
    """
    changes = [two.logprobs.astype(np.float64) - one.logprobs for one, two in pairs]
    effects = [adapter.like(one) - base.like(one) for one, _ in pairs]
    to_base = np.array([np.linalg.norm(y) for y in changes])
    to_adapter = np.array([np.linalg.norm(y - e) for y, e in zip(changes, effects, strict=True)])
    effect = np.array([np.linalg.norm(e) for e in effects])
    is_noise = to_base <= limit * np.sqrt([len(y) for y in changes])
    clear = effect > CLEAR * np.median(np.minimum(to_base, to_adapter))
    return int(np.sum(clear & is_noise & (to_base < to_adapter / AS_BASE))), int(np.sum(clear))


def _excess(base_rows: Rows, adapter_rows: Rows, base: Expected, adapter: Expected, sensitivity: float) -> Estimate:
    here, there = _by_prompt(adapter_rows, adapter), _by_prompt(base_rows, base)
    shared = sorted(here.keys() & there.keys())
    found = [here[prompt] + FLOOR for prompt in shared]
    return log_ratio(found, [sensitivity * there[prompt] + FLOOR for prompt in shared])


def _by_prompt(rows: Rows, expected: Expected) -> dict[int, float]:
    """Distance of each prompt's logprobs, in nats."""
    squares: dict[int, list[float]] = {}
    for row in rows:
        squares.setdefault(row.question, []).append(float(np.mean(np.square(row.logprobs - expected.like(row)))))
    return {prompt: math.sqrt(np.mean(each)) for prompt, each in squares.items()}
