"""The arms that a parity run compares, and what one engine answered for them."""

from __future__ import annotations

from dataclasses import dataclass

from loraover_serve.engines.sample import Sample

BASE, VANILLA, CONTROL, FOLDED = "base", "vanilla", "control", "folded"
"""The base model, a plain LoRA, that LoRA again, and the folded adapter."""


@dataclass(frozen=True)
class Measurement:
    """What one engine did at one concurrency.

    Args:
        samples: of whole blocks, warm-up left out.
        failure: why it ended early; None for a whole run.
    """

    engine: str
    concurrency: int
    blocks: int
    samples: tuple[Sample, ...]
    failure: str | None = None
