"""Limits of the verdict: every one that several rules share, or that the documentation names."""

from __future__ import annotations

from typing import Literal

Verdict = Literal["as trained", "consistent", "differs", "inconclusive", "failed"]
EXIT_CODES: dict[Verdict, int] = {"differs": 1, "failed": 2, "inconclusive": 3, "consistent": 0, "as trained": 0}
"""Exit code of each verdict, the worst first: the verdict of several engines is the worst of theirs."""

BASE, ADAPTER = "base", "adapter"
"""Names of the two arms: requests for the base model, and requests for the adapter."""

OTHER = "other"
"""Name of another adapter of the same base model, beside which the adapter's answers are compared as well."""

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
"""Multiple of the base model's noise that the adapter's never reaches, over all prompts or on FEW_AS_BASE of them.

`python -m benchmarks.verify_calibration` in tests/ derives it from recorded engines."""

EXCESS = 1.35
"""Largest ratio of the adapter's noise to the base model's times the sensitivity that still counts as noise.

`python -m benchmarks.verify_calibration` in tests/ derives it from recorded engines."""

EXACT_STRENGTH = 0.002
"""Largest deviation of the strength that is not a fault on an engine that computes in float32."""

ROUNDED_STRENGTH = 0.04
"""Largest deviation of the strength that is not a fault, beside twice the one of PyTorch in that number format.

`python -m benchmarks.verify_calibration` in tests/ derives it from recorded engines."""

SEEN = 0.2
"""Deviation of the strength that no engine has which is called as trained."""

SURE = 5
"""Standard errors by which an estimate may be off."""

COARSER = 2
"""Multiple of the distance of a number format, up to which noise is that format's."""

FEW_PROMPTS = 6
"""Smallest number of prompts that shows how far prompts differ."""

ENOUGH_PROMPTS = 32
"""Prompts that decide on an engine in bfloat16."""

CLEAR = 4.0
"""Multiple of the noise by which an adapter changes a position at which one sees whether it was applied."""

AS_BASE = 4.0
"""Ratio of the distances from the adapter's and the base model's answers, above which an answer is the base model's."""

FEW_AS_BASE = 3
"""Number of answers of the base model, of answers that end early, or of prompts far off, that chance never makes."""

CONFIDENCE = 0.99
"""Probability with which a share of answers without the adapter is found."""

REPEATS = 3
"""Number of times that a check by a reference asks the adapter each question, unless told otherwise."""

EXPLAINED = 0.5
"""Smallest share of a base model's error that a fault of it, or a coarse cache, has to explain."""
