"""Faults of the base model as large as the noise of a number format, in a direction that noise lacks.

The difference between the engine's base model and PyTorch's is projected on what each fault would change. A fault is
named if it explains more than EXPLAINED of the difference. Rounding to float16, bfloat16, int8, float8 or int4
explains less than a fifth of any of them, and these less than a fifth of one another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from loraover_serve.engines.answers import Expected, Question, Row, Rows
from loraover_serve.verify.faults import RightAdapter, rescaled
from loraover_serve.verify.names import BASE_LAYERS, EXTRA_TOKEN, IN_BASE, PENALTY, POSITIONS, TEMPERATURE, WINDOW
from loraover_serve.verify.strength import Estimate, Floats, project, share, strength
from loraover_serve.verify.variants import Variants

EXPLAINED = 0.5
FEW = 4  # prompts on which faults that PyTorch has to run are tried first
LEAST, NEARLY = 0.1, 0.9  # factor of the adapter that is looked at, and share that needs no further look
KINDS = {"token": EXTRA_TOKEN, "positions": POSITIONS, "window": WINDOW, "layers": BASE_LAYERS}
"""Names of the faults that PyTorch has to run, by their kind in base_variants.py."""
WORTH = 0.3  # share on those, above which all prompts are run


@dataclass(frozen=True)
class BaseFault:
    """A fault of the base model that explains its answers.

    Args:
        fault: Name of the fault.
        detail: The fault in words.
        share: Share of the difference that it explains.
    """

    fault: str
    detail: str
    share: float


Direction = Callable[[Row], Floats]


def find_base_fault(
    rows: Rows,
    base: Expected,
    adapter: Expected,
    questions: Sequence[Question],
    variants: Variants,
    subject: RightAdapter,
    *,
    thorough: bool,
) -> BaseFault | None:
    """The fault that explains most of what sets the engine's base model apart from PyTorch's; None if none does.

    Args:
        rows: The engine's base model.
        base: PyTorch's.
        adapter: PyTorch's adapted model.
        questions: Tokens after which next tokens were compared.
        variants: The base model, to run faults of it.
        subject: The adapter.
        thorough: Whether to run the faults that PyTorch must compute, too.
    """
    found = [
        _temperature(rows, base),
        _penalty(rows, base, questions),
        _adapted(rows, base, adapter, subject, variants),
    ]
    if thorough:
        found += [each for each in _computed(rows, base, variants) if each is not None]
    best = max((each for each in found if each is not None), key=lambda each: each.share, default=None)
    return best if best is not None and best.share >= EXPLAINED else None


def cache_share(rows: Rows, base: Expected, variants: Variants) -> float:
    """Share of what sets the engine's base model apart that keys and values in float8 explain; 0 if it is no such part.

    This is no fault: that the rest is small shows that the weights are the base model's.

    Args:
        rows: The engine's base model.
        base: PyTorch's.
        variants: The base model, to run it with such a cache.
    """
    found = _share_of(rows, base, variants.with_coarse_cache())
    return found if found >= EXPLAINED else 0.0


def _temperature(rows: Rows, base: Expected) -> BaseFault | None:
    """Logprobs at a temperature T are those of logits divided by T."""
    estimate, part = _aligned(rows, base, base.like, is_centred=True)
    if _is_zero(estimate) or float(estimate.value) <= -1:
        return None
    detail = f"logprobs are those at temperature {1 / (1 + float(estimate.value)):.2g}"
    return BaseFault(TEMPERATURE, detail, part)


def _penalty(rows: Rows, base: Expected, questions: Sequence[Question]) -> BaseFault | None:
    """A penalty lowers the tokens that the prompt or the answer already has."""

    def lowered(row: Row) -> Floats:
        ids = np.arange(len(row.logprobs)) if row.ids is None else row.ids
        read = questions[row.question].tokens[: row.position + 1]
        return np.where(np.isin(ids, read), -1.0, 0.0)

    estimate, part = _aligned(rows, base, lowered, is_centred=True)
    if _is_zero(estimate):
        return None
    verb = "lowered" if float(estimate.value) > 0 else "raised"
    detail = f"logprobs of tokens that were read before are {verb} by {abs(float(estimate.value)):.2g} nats"
    return BaseFault(PENALTY, detail, part)


def _adapted(
    rows: Rows, base: Expected, adapter: Expected, subject: RightAdapter, variants: Variants
) -> BaseFault | None:
    """Requests for the base model are answered with the adapter, or with a weaker one like it."""
    estimate, part = _aligned(rows, base, lambda row: adapter.like(row) - base.like(row))
    factor = float(estimate.value)
    if factor < LEAST:
        return None
    if part < NEARLY:
        weaker = variants.adapted(rescaled(subject, factor).deltas)
        part = max(part, _share_of(rows, base, weaker))
    return BaseFault(IN_BASE, f"requests for the base model are answered with {factor:.2g} times the adapter", part)


def _computed(rows: Rows, base: Expected, variants: Variants) -> Iterator[BaseFault | None]:
    few = [row for row in rows if row.question < FEW]
    for kind, detail, run in variants.base_faults():
        if _share_of(few, base, run(FEW)) >= WORTH:
            yield BaseFault(KINDS[kind], detail, _share_of(rows, base, run(None)))


def _share_of(rows: Rows, base: Expected, faulty: Expected) -> float:
    estimate, part = _aligned(rows, base, lambda row: faulty.like(row) - base.like(row))
    return part if float(estimate.value) > EXPLAINED else 0.0


def _aligned(rows: Rows, base: Expected, direction: Direction, *, is_centred: bool = False) -> tuple[Estimate, float]:
    """The factor of a direction in the difference from PyTorch, and the share of the difference that it explains."""
    changes = [row.logprobs - base.like(row) for row in rows]
    directions = [direction(row) for row in rows]
    if is_centred:
        changes, directions = ([each - each.mean() for each in all_] for all_ in (changes, directions))
    projections = project(rows, changes, directions)
    estimate = strength(projections)
    return estimate, share(projections, estimate)


def _is_zero(estimate: Estimate) -> bool:
    """Whether the estimate is within chance of zero; few prompts alone do not make it so."""
    return bool(np.isfinite(estimate.half) and estimate.low <= 0 <= estimate.high)
