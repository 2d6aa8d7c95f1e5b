"""Greedy answers, which go through an engine's cache, beside PyTorch's: their tokens, their ends and their logprobs."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING

from loraover_serve.engines.answers import GreedyAnswer
from loraover_serve.verify.evidence import count_base, like
from loraover_serve.verify.names import DECODED, ENDS_EARLY
from loraover_serve.verify.report import GreedyAgreement
from loraover_serve.verify.rules import RuleFinding

if TYPE_CHECKING:
    from loraover_serve.verify.reference import Reference

FEW = 3  # answers that end early, or lack the adapter, without being chance


def compare_greedy(found: Sequence[GreedyAnswer], reference: Reference, allowed: float) -> GreedyAgreement | None:
    """Greedy answers beside PyTorch's; those of which the engine identifies no token are left out.

    Args:
        found: The answer to each question.
        reference: PyTorch's answers.
        allowed: Largest gap that the engine's noise explains, in nats.
    """
    gaps, equal, early, as_base = [], 0, 0, 0
    for index, (question, answer) in enumerate(zip(reference.questions, found, strict=True)):
        tokens = answer.tokens
        pairs = enumerate(zip(question.continuation, tokens, strict=False))
        parted = next((i for i, (expected, token) in pairs if expected != token), None)
        if parted is not None:
            logprobs = reference.adapter.at(index, question.answered[parted])
            gaps.append(float(logprobs[question.continuation[parted]] - logprobs[tokens[parted]]))
            likeliest = int(reference.base.at(index, question.answered[parted]).argmax())
            as_base += gaps[-1] > allowed and tokens[parted] == likeliest
        elif tokens:
            gaps.append(0.0)
            complete = _is_complete(answer, question.continuation, reference.ends)
            equal += complete
            early += not complete
    if not gaps:
        return None
    return GreedyAgreement(
        equal=equal / len(gaps), early=early / len(gaps), gap=max(gaps), allowed=allowed, as_base=as_base
    )


def decoded_fault(
    greedy: GreedyAgreement | None, answers: Sequence[GreedyAnswer], reference: Reference
) -> RuleFinding | None:
    """The finding if generated answers are wrong though logprobs agree; None if they are not.

    Args:
        greedy: Greedy answers beside PyTorch's.
        answers: Greedy answers.
        reference: PyTorch's answers.
    """
    if greedy is None:
        return None
    later = [row for answer in answers for row in answer.rows[1:]]  # the first token has not been through the cache
    if later:
        pairs = [(like(row, reference.base), row) for row in later]
        as_base, clear = count_base(pairs, reference.base, reference.adapter)
        if as_base >= FEW:
            reason = f"logprobs agree, but {as_base} of {clear} generated tokens have the base model's logprobs"
            return RuleFinding("differs", reason, DECODED)
    if greedy.gap > greedy.allowed:
        reason = (
            f"logprobs agree, but a greedy answer leaves PyTorch's where the two tokens are {greedy.gap:.2g} nats "
            f"apart, and noise explains {greedy.allowed:.2g}: the engine generates other tokens than it scores"
        )
        if greedy.as_base >= FEW:
            return RuleFinding("differs", f"{reason}, in {greedy.as_base} answers the base model's", DECODED)
        return RuleFinding("differs", reason)
    if greedy.early * len(answers) >= min(FEW, len(answers)):
        reason = f"logprobs agree, but {greedy.early:.0%} of the answers end before PyTorch's, at no end of the text"
        return RuleFinding("differs", reason, ENDS_EARLY)
    return None


def _is_complete(answer: GreedyAnswer, expected: tuple[int, ...], ends: AbstractSet[int]) -> bool:
    """Whether the beginning of the expected answer is all of it, or all before the end of the text.

    Servers return the token of the end of the text or leave it out.
    """
    tokens = answer.tokens
    return answer.length >= len(expected) or tokens[-1] in ends or expected[len(tokens)] in ends
