"""The judge of an engine that ran here or was asked: its answers beside PyTorch's, and the verdict."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from loraover.common.errors import EngineError
from loraover.common.request import as_written
from loraover_serve.engines.answers import Rows
from loraover_serve.judge.case import Case
from loraover_serve.judge.rules import judge
from loraover_serve.verify.evidence import Answers, EngineEvidence
from loraover_serve.verify.faults import RightAdapter
from loraover_serve.verify.reference import TorchReference
from loraover_serve.verify.report import EngineResult
from loraover_serve.verify.request import VerifyRequest
from loraover_serve.verify.variants import Variants


@dataclass(frozen=True)
class EngineJudge:
    """Models and settings by which engines are judged.

    Args:
        reference: PyTorch's answers.
        variants: The base model with changed adapters, to run suspected faults.
        subject: The adapter.
        number_format: Coarsest number format in which the base model is known to be served.
        without_mixed: Whether no requests for both models are sent together.
    """

    reference: TorchReference
    variants: Variants
    subject: RightAdapter
    number_format: str = "bf16"
    without_mixed: bool = False

    def judge(self, engine: str, version: str | None, answers: Answers, seconds: float) -> EngineResult:
        """Compare an engine's answers with PyTorch's, and look for a fault if they differ.

        Args:
            engine: Name of the engine.
            version: Its version; None if it reports none.
            answers: Its answers.
            seconds: Time that they took.

        Raises:
            EngineError: Answers that are not finite, or of another vocabulary.
        """
        _check(engine, answers, self.reference.base.vocabulary)
        found = judge(self.evidence(answers), self.number_format, VerifyRequest.named)
        return EngineResult.model_validate({"engine": engine, "version": version, "seconds": seconds} | found)

    def case(self, answers: Answers) -> Case:
        """An engine's answers with the estimates that the rules ask of them."""
        return Case(self.evidence(answers), self.number_format)

    def evidence(self, answers: Answers) -> EngineEvidence:
        """An engine's answers beside PyTorch."""
        return EngineEvidence(answers, self.reference, self.variants, self.subject)


def _check(engine: str, answers: Answers, vocabulary: int) -> None:
    for rows in (answers.base, answers.adapter, *(answers.mixed or {}).values()):
        _check_rows(engine, rows, vocabulary)
    unknown = [token for answer in answers.greedy for token in answer.tokens if not 0 <= token < vocabulary]
    if unknown:
        raise EngineError(
            f"{engine}: generates the token {unknown[0]}, and the base model has {vocabulary}; it serves another "
            f"model. Name the base model with {as_written('model')}."
        )


def _check_rows(engine: str, rows: Rows, vocabulary: int) -> None:
    for row in rows:
        if not np.isfinite(row.logprobs).all():
            raise EngineError(f"{engine}: a logprob is not a finite number.")
        if row.ids is not None and row.ids.min() < 0:
            raise EngineError(f"{engine}: answers with a token of a negative id, {row.ids.min()}.")
        size = len(row.logprobs) if row.ids is None else int(row.ids.max()) + 1
        if size > vocabulary or (row.ids is None and size < vocabulary):
            raise EngineError(
                f"{engine}: answers with {size} tokens or more, and the base model has {vocabulary}; it serves another "
                f"model. Name the base model with {as_written('model')}."
            )
