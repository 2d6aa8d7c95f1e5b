"""Limits of the verdict that several rules share, or that the documentation names."""

from __future__ import annotations

from typing import Literal

Verdict = Literal["as trained", "consistent", "differs", "inconclusive", "failed"]
EXIT_CODES: dict[Verdict, int] = {"differs": 1, "failed": 2, "inconclusive": 3, "consistent": 0, "as trained": 0}
"""Exit code of each verdict, the worst first: the verdict of several engines is the worst of theirs."""

BASE, ADAPTER = "base", "adapter"
"""Names of the two arms: requests for the base model, and requests for the adapter."""

OTHER = "other"
"""Name of the arm of another adapter, whose requests are sent together with the adapter's."""

NUMBER_FORMATS = ("fp32", "fp16", "bf16", "int8", "fp8", "int4")
"""Number formats from fine to coarse."""

PLAIN = ("fp32", "fp16", "bf16")
"""Number formats in which models are published; in coarser ones, rounding changes the published weights."""

BY_CHANCE = 1e-4
"""Probability with which chance puts the strength of a sound engine outside of its interval."""

FLOOR = 1e-4
"""Nats by which float32's rounding alone may set apart two computations."""

EXACT = 10 * FLOOR
"""Noise below which the engine computes in float32."""

CERTAIN = 5.0
"""Multiple of the base model's noise that the adapter's noise never reaches, on all or on FEW_AS_BASE prompts.

`python -m benchmarks.verify_calibration` in tests/ derives it from recorded engines."""

EXCESS = 1.35
"""Largest ratio that still counts as noise: the adapter's distance to the base model's times the sensitivity.

`python -m benchmarks.verify_calibration` in tests/ derives it from recorded engines, and `benchmarks.family_limits`
judges other models by it. It is also the largest ratio of the base model's distance to the adapter's."""

EXACT_STRENGTH = 0.002
"""Largest deviation of the strength that is not a fault on an engine that computes in float32."""

ROUNDED_STRENGTH = 0.04
"""Largest deviation of the strength that is not a fault, in addition to twice PyTorch's in that number format.

`python -m benchmarks.verify_calibration` in tests/ derives it from recorded engines."""

SEEN = 0.2
"""Deviation of the strength that is always seen: an engine with it is never called as trained."""

SURE = 5
"""Number of standard errors by which an estimate may be off."""

COARSER = 2
"""Multiple of a number format's rounding error up to which noise is explained by the format."""

FEW_PROMPTS = 6
"""Smallest number of prompts that shows how far prompts differ."""

ENOUGH_PROMPTS = 32
"""Prompts that decide on an engine in bfloat16."""

CLEAR = 4.0
"""Multiple of the noise that an adapter's change at a position must exceed to show whether it was applied."""

AS_BASE = 4.0
"""Distance from the adapter's answer over that from the base model's, above which an answer is the base model's."""

FEW_AS_BASE = 3
"""Number of the base model's answers, early ends or prompts far off that is too large to be chance."""

CONFIDENCE = 0.99
"""Probability with which a share of answers without the adapter is found."""

REPEATS = 3
"""Number of times that a check by a reference asks the adapter each question, unless told otherwise."""

EXPLAINED = 0.5
"""Smallest share of the base model's error that a fault or a coarse cache must explain to be named."""

MOST_BASES = 16
"""Largest number of weights of one base model that a reference holds."""
