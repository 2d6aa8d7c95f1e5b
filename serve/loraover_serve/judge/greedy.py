"""Greedy answers beside PyTorch's: their tokens, and their ends."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from typing import NamedTuple

from loraover_serve.judge.evidence import ComparedAnswer


class Agreement(NamedTuple):
    """Greedy answers beside PyTorch's; see `GreedyAgreement` of verify.json."""

    equal: float
    early: float
    gap: float
    allowed: float
    as_base: int


def compare_greedy(answers: Sequence[ComparedAnswer], ends: AbstractSet[int], allowed: float) -> Agreement | None:
    """Greedy answers beside PyTorch's; None if the engine identifies the tokens of none.

    Args:
        answers: The answers.
        ends: Ids of the tokens that end a text.
        allowed: Largest gap that the engine's noise explains, in nats.
    """
    known = [each for each in answers if each.tokens]
    if not known:
        return None
    alike = [each for each in known if each.parted is None]
    equal = sum(_is_complete(each, ends) for each in alike)
    return Agreement(
        equal=equal / len(known),
        early=(len(alike) - equal) / len(known),
        gap=max(each.gap for each in known),
        allowed=allowed,
        as_base=sum(each.is_base and each.gap > allowed for each in known),
    )


def _is_complete(answer: ComparedAnswer, ends: AbstractSet[int]) -> bool:
    """Whether the beginning of the expected answer is all of it, or all before the end of the text.

    Servers return the token of the end of the text or leave it out.
    """
    tokens, expected = answer.tokens, answer.expected
    return answer.length >= len(expected) or tokens[-1] in ends or expected[len(tokens)] in ends
