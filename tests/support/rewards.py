"""A reward for GRPO that tells short answers apart."""

from __future__ import annotations

from typing import Any


def length(completions: list[Any], **_: Any) -> list[float]:
    """One point for each character of an answer."""
    return [float(len(str(completion))) for completion in completions]
