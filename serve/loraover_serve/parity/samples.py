"""The arms that a parity run compares, and the answers of one engine."""

from __future__ import annotations

from dataclasses import dataclass

from loraover_serve.engines.base import Sample

VANILLA, CONTROL, FOLDED = "vanilla", "control", "folded"
"""Names of the arms beside the base model: a plain LoRA (the baseline), a copy of that LoRA, and the folded adapter."""

SWITCHING, MIXED = "switching", "mixed"
"""Names of the arms that several adapters answer: one after the other, and together in one batch."""
ALSO = "adapter{}"
"""Name under which an engine has each further adapter."""


@dataclass(frozen=True)
class Measurement:
    """Answers of one engine at one concurrency.

    Args:
        engine: Name of the engine.
        concurrency: Number of simultaneous requests.
        blocks: Number of complete blocks.
        samples: Answers of the complete blocks, without warm-up.
        failure: Reason why the measurement ended early; None if it did not.
        waves: Number of waves of simultaneous requests that an arm answers in a row.
    """

    engine: str
    concurrency: int
    blocks: int
    samples: tuple[Sample, ...]
    failure: str | None = None
    waves: int = 1
