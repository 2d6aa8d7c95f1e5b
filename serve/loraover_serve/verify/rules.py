"""What a right adapter may look like on an engine: its strength, its excess, and distances of single computations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats

from loraover_serve.comparison.thresholds import SURE
from loraover_serve.verify.evidence import CERTAIN, EXCESS, FEW_PROMPTS, FLOOR, Evidence
from loraover_serve.verify.report import LogprobDistance, Suspect, Verdict
from loraover_serve.verify.strength import BY_CHANCE, Estimate

EXACT_STRENGTH = 0.002
"""Deviation of the strength that is no fault of an engine that computes in float32."""

ROUNDED_STRENGTH = 0.06
"""Deviation of the strength, beside twice what PyTorch shows in that number format, that is no fault.

`python -m benchmarks.verify_calibration` in tests/ derives it from recorded engines."""

SEEN = 0.2
"""Deviation of the strength that an engine which is called as trained does not have."""


FEW_AS_BASE = 3
"""Answers of the base model that chance alone does not make."""

CONFIDENCE = 0.99
"""Probability with which a share of answers without the adapter is found."""


@dataclass(frozen=True)
class RuleFinding:
    """What a rule found.

    Args:
        verdict: The verdict.
        reason: The reason, in words.
        fault: Name of the fault; None if it has none.
        suspects: Faults that were compared, the nearest first.
    """

    verdict: Verdict
    reason: str
    fault: str | None = None
    suspects: Sequence[Suspect] = ()


def allowed_strength(number_format: str | None, bias: float) -> tuple[float, float]:
    """Strengths that a right adapter has on an engine.

    Rounding itself shrinks what an adapter changes, by as much as an engine's own rounding does only within a factor:
    twice what PyTorch shows is allowed.

    Args:
        number_format: Number format of the base model; None if it is unknown.
        bias: Strength of the adapter if PyTorch computes in that number format.
    """
    if number_format == "fp32":
        return 1 - EXACT_STRENGTH, 1 + EXACT_STRENGTH
    low, high = (2 * min(bias, 1.0) - 1, 2 * max(bias, 1.0) - 1)
    return low - ROUNDED_STRENGTH, high + ROUNDED_STRENGTH


def beyond(evidence: Evidence, allowed: tuple[float, float], sensitivity: float) -> str | None:
    """Reason why the evidence is not that of a right adapter, in words; None if it may be.

    Args:
        evidence: The evidence.
        allowed: Strengths that a right adapter has.
        sensitivity: Ratio by which rounding moves the adapted model further than the base model.
    """
    found, (low, high) = evidence.strength, allowed
    if evidence.effect > 0 and (found.low > high or found.high < low):
        return f"the adapter has the strength {shown(found)}, and {low:.3g} to {high:.3g} is right"
    if is_further(evidence, sensitivity):
        return (
            f"off by {evidence.found.rms:.2g} nats, where the base model is off by {evidence.noise.rms:.2g}; "
            f"noise explains {EXCESS * sensitivity:.2g} times as much"
        )
    return None


def is_further(evidence: Evidence, sensitivity: float) -> bool:
    """Whether the adapter is off by more than the noise of the base model explains."""
    if evidence.prompts < FEW_PROMPTS:
        return evidence.found.rms > CERTAIN * (sensitivity * evidence.noise.rms + FLOOR)
    return bool(evidence.excess.low > math.log(EXCESS))


def is_nearer(evidence: Evidence, sensitivity: float) -> bool:
    """Whether the base model is off by more than the noise of the adapter explains."""
    return bool(evidence.prompts >= FEW_PROMPTS and evidence.excess.high < -math.log(EXCESS * sensitivity))


def is_narrow(found: Estimate, allowed: tuple[float, float]) -> bool:
    """Whether an adapter that is off by SEEN would be seen: interval and allowed strengths are narrower than that."""
    return bool(found.half + (allowed[1] - allowed[0]) / 2 < SEEN)


def allowed_distance(noise: LogprobDistance, sensitivity: float) -> float:
    """Largest distance, in nats, that the noise explains; both sides are estimates over prompts."""
    relative = noise.error / noise.rms if noise.rms else 0.0
    return sensitivity * noise.rms * (1 + sure_errors(noise.prompts) * math.sqrt(2) * relative) + FLOOR


def sure_errors(prompts: int) -> float:
    """Standard errors by which an estimate may be off if its error is estimated from so many prompts.

    Two prompts have one degree of freedom; a single one is treated like two.
    """
    return max(SURE, float(stats.t.isf(BY_CHANCE, max(prompts - 1, 1))))


def share_found(answers: int) -> float:
    """The smallest share of answers without the adapter that so many show, but for 1 in 100 cases; 1 if none do."""
    return float(stats.beta.ppf(CONFIDENCE, FEW_AS_BASE, answers - FEW_AS_BASE + 1)) if answers > FEW_AS_BASE else 1.0


def answers_that_show(share: float) -> int:
    """Number of answers that show a share of answers without the adapter, but for 1 in 100 cases.

    Args:
        share: The share, above 0.
    """
    low, high = FEW_AS_BASE, FEW_AS_BASE + 1
    while share_found(high) > share:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if share_found(middle) <= share else (middle, high)
    return high


def shown(found: Estimate) -> str:
    """An estimate with its interval, in words."""
    return (
        f"{found.value:.3g} [{found.low:.3g}, {found.high:.3g}]" if math.isfinite(found.half) else f"{found.value:.3g}"
    )
