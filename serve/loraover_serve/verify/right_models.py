"""The two right models' answers and logprobs: of many prompts at once where a model answers these as it does one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from loraover_serve.comparison.rounding import as_served, rounding
from loraover_serve.engines.answers import Expected, last_rows
from loraover_serve.engines.base import engine_errors
from loraover_serve.engines.torch import TorchEngine, greedy_answers, model_logits, tree_logits, tree_rows
from loraover_serve.judge.limits import ADAPTER, BASE
from loraover_serve.judge.models import Question
from loraover_serve.verify.base_variants import chain_of
from loraover_serve.verify.layers import RowModel, as_rows, at_input
from loraover_serve.verify.work import ROUNDED, Advance, unseen

EXACT = ("fp32", "fp64")
"""Data types in which another order of sums changes no answer by more than a server's noise."""

STEP = 0.5
"""Time of a pass over the next token of an answer, in passes over its question."""

TREE_ERROR = 1e-4
"""Largest error of a tree's logprobs, as a share of their spread: float32 gives 1e-6, tokens seen wrongly 1e-2."""

TIE = 1e-3
"""Difference of two tokens' logprobs, in nats, at which either may be the answer: float32 errs by 1e-5."""

TRIED_IN_TREES = 4
"""Number of questions on which trees are tried."""

CANNOT = (TypeError, ValueError, IndexError, AttributeError, RuntimeError)
"""Errors of a model that takes no such mask, no positions, or no keys and values of several prompts."""


class RightRuns(NamedTuple):
    """Questions that the adapted model answered, with both right models' logprobs.

    Args:
        questions: The prompts with the adapted model's answers.
        exact: Logprobs of both models, by arm.
        rounded: Logprobs of both models in bfloat16, by arm.
        as_tree: Whether both models run questions in trees as they run them one by one.
    """

    questions: tuple[Question, ...]
    exact: dict[str, Expected]
    rounded: dict[str, Expected]
    as_tree: bool


@dataclass(frozen=True)
class RightModels:
    """The base model and the adapted model in PyTorch.

    Args:
        base: The base model.
        adapted: The adapted model.
        dtype: Data type in which they run: fp32, bf16, fp16 or fp64.
        in_file: Whether logprobs are kept in a file.
    """

    base: Any
    adapted: Any
    dtype: str
    in_file: bool = False

    @torch.inference_mode()
    def run(
        self, prompts: Sequence[tuple[int, ...]], messages: Sequence[str], new_tokens: int, advance: Advance = unseen
    ) -> RightRuns:
        """Answer prompts with the adapted model, and run both models on the answers.

        Args:
            prompts: Token ids.
            messages: Message of each prompt's chat; empty if prompts are no chats.
            new_tokens: Number of tokens of an answer.
            advance: Function that is told how many of `right_passes` are done.

        Raises:
            EngineError: A model that PyTorch fails to run.
        """
        ask = partial(answered, prompts, messages, ends=end_tokens(self.base.config))
        with engine_errors(TorchEngine.name):
            if self.dtype in EXACT and (answers := self._answers_at_once(prompts, new_tokens)) is not None:
                found = self._ask(tuple(ask(answers)), new_tokens, advance)
                if are_greedy(found.questions, found.exact[ADAPTER]):
                    return found
                advance = unseen  # all passes are told
            one_by_one = TorchEngine({ADAPTER: partial(nullcontext, self.adapted)})
            answers = one_by_one.generate(ADAPTER, prompts, new_tokens)
            return self._ask(tuple(ask(answers)), new_tokens, advance)

    def _answers_at_once(self, prompts: Sequence[tuple[int, ...]], new_tokens: int) -> list[tuple[int, ...]] | None:
        """The adapted model's answers, which may be wrong if it mixes padding with the prompts; None if it fails."""
        try:
            return greedy_answers(self.adapted, prompts, new_tokens)
        except CANNOT:
            return None

    def _ask(self, questions: tuple[Question, ...], new_tokens: int, advance: Advance) -> RightRuns:
        """Run both models on questions, exactly and rounded."""
        models, steps = {BASE: self.base, ADAPTER: self.adapted}, right_passes(len(questions), new_tokens)
        advance(steps["answers"])
        tried = sorted(questions, key=lambda question: len(question.tokens))
        half = TRIED_IN_TREES // 2  # the shortest have branches in a tree, the longest fill a window
        tried = [*tried[:half], *tried[half:][-half:]]
        as_tree = (
            self.dtype in EXACT
            and agrees_in_trees(self.base, tried, with_rows=True)
            and agrees_in_trees(self.adapted, tried)
        )
        advance(steps["tree"])

        def run(model: Any, step: str) -> Expected:
            found = self._logprobs(model, questions, as_tree=as_tree)
            advance(steps[step])
            return found

        exact = {arm: run(model, "exact") for arm, model in models.items()}
        rounded, format_ = dict[str, Expected](), as_served("bf16", self.dtype)
        for arm, model in models.items():
            with rounding(model, format_):
                rounded[arm] = run(model, "rounded")
        return RightRuns(questions, exact, rounded, as_tree)

    def _logprobs(self, model: Any, questions: Sequence[Question], *, as_tree: bool) -> Expected:
        windows = [question.window for question in questions]
        tokens = [question.tokens for question in questions]
        found = tree_logits(model, tokens, [*map(len, windows)]) if as_tree else model_logits(model, tokens)
        return Expected.of(windows, found, in_file=self.in_file)


def right_passes(number: float, new_tokens: int) -> dict[str, float]:
    """Cost of each run of `RightModels.run`, in passes of the base model over one question."""
    return {
        "answers": number * (1 + STEP * (new_tokens - 1)),
        "exact": number,
        "rounded": number + ROUNDED,
        "tree": number,
    }


def end_tokens(config: Any) -> frozenset[int]:
    """Ids of the tokens that end an answer, by a model's configuration."""
    ends = getattr(config.get_text_config(), "eos_token_id", None)
    return frozenset(ends if isinstance(ends, list) else [] if ends is None else [ends])


def answered(
    prompts: Sequence[tuple[int, ...]],
    messages: Sequence[str],
    answers: Iterable[tuple[int, ...]],
    ends: frozenset[int],
) -> Iterator[Question]:
    """Questions with answers up to the first end of the text, and that end; later tokens were not trained.

    Args:
        prompts: Token ids of the prompts.
        messages: Message of each prompt's chat; empty if prompts are no chats.
        answers: Tokens that follow each prompt.
        ends: Ids of the tokens that end a text.
    """
    for index, (prompt, tokens) in enumerate(zip(prompts, answers, strict=True)):
        last = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
        yield Question(prompt, tokens[: last + 1], messages[index] if messages else None)


def are_greedy(questions: Sequence[Question], adapted: Expected) -> bool:
    """Whether each token of the answers is the likeliest one, or as good as that.

    Args:
        questions: The questions.
        adapted: Logprobs of the adapted model after the tokens of each question's window.
    """
    rows = (
        (adapted.at(index, position), token)
        for index, question in enumerate(questions)
        for position, token in zip(question.answered, question.answer, strict=True)
    )
    return all(row.max() - row[token] <= TIE for row, token in rows)


@torch.inference_mode()
def agrees_in_trees(model: Any, questions: Sequence[Question], *, with_rows: bool = False) -> bool:
    """Whether a model answers questions in trees as it answers them without.

    Args:
        model: The model.
        questions: The questions.
        with_rows: Whether it has to do so for several models at once too.
    """
    sequences, lasts = [question.tokens for question in questions], [len(each.answered) for each in questions]
    layers = chain_of(model) if with_rows else nn.ModuleList()
    rows = [RowModel(), *[RowModel(layer=len(layers) // 2)] * 2] if with_rows else [RowModel()]  # two join half way
    errors, moves = [], []
    try:
        right = Expected.of([each.answered for each in questions], model_logits(model, sequences))
        with as_rows(model, layers, rows):
            found = tree_rows(model, sequences, lasts, at_input(rows))
            for index, (question, logits) in enumerate(zip(questions, found, strict=True)):
                for place, row in chain.from_iterable(
                    last_rows(index, question.answered, mine).items() for mine in logits
                ):
                    errors.append(np.mean(np.square(row - right.at(*place))))
                    moves.append(np.var(right.at(*place)))
    except CANNOT:
        return False
    return bool(np.mean(errors) <= TREE_ERROR**2 * np.mean(moves))
