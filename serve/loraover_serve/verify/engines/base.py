"""The interface of an engine whose answers are verified."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from loraover.checkpoint.peft_adapter import AdapterDir
from loraover.models.load import ModelSource
from loraover_serve.verify.answers import ADAPTER, GreedyAnswer, Question, Row, window_rows
from loraover_serve.verify.request import VerifyRequest


@dataclass(frozen=True)
class Setting:
    """What an engine is started with.

    Args:
        request: what the verification was asked for.
        adapter: folder of the adapter or checkpoint.
        layout: the adapter that this folder holds.
        base: the base model.
        scratch: empty folder for exports and logs.
        longest: number of tokens of the longest request with its answer.
        messages: message of each question's chat, for a server that takes chats alone.
    """

    request: VerifyRequest
    adapter: Path
    layout: AdapterDir
    base: ModelSource
    scratch: Path
    longest: int
    messages: tuple[str, ...] = ()


class VerifyEngine(ABC):
    """A running engine that answers for two arms: the base model and the adapter."""

    takes_options: ClassVar[bool] = False
    """Whether the engine takes the words after `--`."""

    version: str | None = None
    """Version that the engine reports; None if it reports none."""

    @classmethod
    @abstractmethod
    def install(cls, vllm: str) -> str | None:
        """Return how to install the engine, in words; None if it is installed.

        Args:
            vllm: command that starts vLLM.
        """

    @classmethod
    @abstractmethod
    def start(cls, setting: Setting) -> AbstractContextManager[VerifyEngine]:
        """Export what the engine needs, start it, and stop it after the block.

        Raises:
            EngineError: an engine that does not start.
            ExportError: an adapter that cannot be exported for it.
        """

    @abstractmethod
    def rows(self, arm: str, questions: Sequence[Question]) -> list[Row]:
        """Return the arm's logprobs of next tokens after positions of every question.

        Args:
            arm: "base" or "adapter".
            questions: the questions.

        Raises:
            EngineError: a request that failed.
        """

    @abstractmethod
    def greedy(self, arm: str, prompts: Sequence[Sequence[int]], tokens: int) -> list[tuple[int, ...]]:
        """Return the arm's greedy answer to each prompt; one may be shorter if the engine ends it or hides its ids.

        Args:
            arm: "base" or "adapter".
            prompts: token ids.
            tokens: number of tokens to generate.

        Raises:
            EngineError: a request that failed.
        """

    def generated(self, questions: Sequence[Question], tokens: int) -> list[GreedyAnswer]:
        """Return the adapter's greedy answers, with their logprobs where the engine gives them.

        Args:
            questions: the questions.
            tokens: number of tokens to generate.

        Raises:
            EngineError: a request that failed.
        """
        found = self.greedy(ADAPTER, [question.prompt for question in questions], tokens)
        return [GreedyAnswer(answer, len(answer)) for answer in found]

    def mixed(self, questions: Sequence[Question]) -> dict[str, list[Row]] | None:
        """Return what `rows` does for both arms, with requests for the two sent together.

        The adapter's answers beside those of another adapter, if the engine has one, come under the name "other".

        Args:
            questions: the questions.

        Returns:
            Rows by arm; None if the engine takes one request at a time.

        Raises:
            EngineError: a request that failed.
        """
        return None


class LogitEngine(VerifyEngine):
    """An engine in this process, which gives the logits of the entire vocabulary."""

    @abstractmethod
    def logits(self, arm: str, tokens: Sequence[int]) -> Any:
        """Return the logits after each of the tokens, an array of shape (tokens, vocabulary).

        Raises:
            EngineError: a request that failed.
        """

    def rows(self, arm: str, questions: Sequence[Question]) -> list[Row]:
        return [
            row
            for index, question in enumerate(questions)
            for row in window_rows(index, question, self.logits(arm, question.tokens))
        ]

    def greedy(self, arm: str, prompts: Sequence[Sequence[int]], tokens: int) -> list[tuple[int, ...]]:
        answers = []
        for prompt in prompts:
            ids = list(prompt)
            for _ in range(tokens):
                ids.append(int(np.argmax(self.logits(arm, ids)[-1])))
            answers.append(tuple(ids[len(prompt) :]))
        return answers
