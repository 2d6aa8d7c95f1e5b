"""The ranks that engines take: vLLM can be started for some, and no other engine names a largest one."""

from __future__ import annotations

MAX_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values of --max-lora-rank: vllm/config/lora.py of vLLM 0.32."""

DEFAULT_MAX_LORA_RANK = 16
"""Value of --max-lora-rank if the server is started without it: the same file."""


def max_lora_rank(r: int) -> int | None:
    """Return the smallest allowed --max-lora-rank for adapters of rank r; None if r is above all of them.

    A larger value costs time and memory: vLLM pads every adapter to it.
    """
    return next((allowed for allowed in MAX_LORA_RANKS if allowed >= r), None)
