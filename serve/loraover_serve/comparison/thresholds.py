"""Thresholds of the judgements on answers."""

SURE = 5
"""Standard errors by which an estimate may be off."""

APPLIED = 3
"""Multiple of the noise by which an applied adapter changes logprobs at least."""
