"""The two right models' answers and logprobs: of many prompts at once where a model answers these as it does one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from loraover.common.errors import EngineError
from loraover_serve.comparison.rounding import as_served, rounding
from loraover_serve.engines.answers import Expected, last_rows
from loraover_serve.engines.base import engine_errors
from loraover_serve.engines.torch import (
    TorchEngine,
    answers_without_cache,
    greedy_answers,
    model_logits,
    tree_logits,
    tree_rows,
    tree_tokens,
)
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
"""Number of questions on which trees are tried, beside a pair that begins alike."""

PAIR = 4
"""Tokens with which this pair begins."""

TREE_PASSES = 6
"""Passes over each of them: with both models one by one and in a tree, where the base model has three rows."""

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


class _Begun(NamedTuple):
    """Questions with the adapted model's logprobs alone; the other arguments are those of `RightRuns`."""

    questions: tuple[Question, ...]
    adapted: Expected
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
            steps = right_passes(prompts, new_tokens, self.dtype)
            for answers in self._answers(prompts, new_tokens):
                begun = self._begin(tuple(ask(answers)))
                if are_greedy(begun.questions, begun.adapted):
                    break
            advance(steps["answers"] + steps["tree"] + steps["exact"])
            return self._finish(begun, steps, advance)

    def _answers(self, prompts: Sequence[tuple[int, ...]], new_tokens: int) -> Iterator[list[tuple[int, ...]]]:
        """Yield the adapted model's answers, by the fastest way first: it may mix prompts, or pass on no state."""
        ways = (greedy_answers, one_by_one, answers_without_cache) if self.dtype in EXACT else (one_by_one,)
        for way in ways:
            try:
                yield way(self.adapted, prompts, new_tokens)
            except (*CANNOT, EngineError):
                if way is ways[-1]:
                    raise

    def _begin(self, questions: tuple[Question, ...]) -> _Begun:
        """Try trees, and run the adapted model on questions."""
        tried = sorted(questions, key=lambda question: len(question.tokens))
        half = TRIED_IN_TREES // 2  # the shortest share a tree, the longest fill a window
        tried = [*tried[:half], *tried[half:][-half:]]
        as_tree = (
            self.dtype in EXACT
            and agrees_in_trees(self.base, tried, with_rows=True)
            and agrees_in_trees(self.adapted, tried)
        )
        return _Begun(questions, self._logprobs(self.adapted, questions, as_tree=as_tree), as_tree)

    def _finish(self, begun: _Begun, steps: Mapping[str, float], advance: Advance) -> RightRuns:
        """Run the base model on the questions too, and both models in bfloat16."""

        def run(model: Any, step: str) -> Expected:
            found = self._logprobs(model, begun.questions, as_tree=begun.as_tree)
            advance(steps[step])
            return found

        exact = {BASE: run(self.base, "exact"), ADAPTER: begun.adapted}
        rounded, format_ = dict[str, Expected](), as_served("bf16", self.dtype)
        for arm, model in ((BASE, self.base), (ADAPTER, self.adapted)):
            with rounding(model, format_):
                rounded[arm] = run(model, "rounded")
        return RightRuns(begun.questions, exact, rounded, begun.as_tree)

    def _logprobs(self, model: Any, questions: Sequence[Question], *, as_tree: bool) -> Expected:
        windows = [question.window for question in questions]
        tokens = [question.tokens for question in questions]
        found = tree_logits(model, tokens, [*map(len, windows)]) if as_tree else model_logits(model, tokens)
        return Expected.of(windows, found, in_file=self.in_file)


def one_by_one(model: Any, prompts: Sequence[tuple[int, ...]], tokens: int) -> list[tuple[int, ...]]:
    """Return a causal model's greedy answers as `greedy_answers` does, each prompt alone.

    Raises:
        EngineError: A model that PyTorch fails to run.
    """
    return TorchEngine({ADAPTER: partial(nullcontext, model)}).generate(ADAPTER, prompts, tokens)


def right_passes(prompts: Sequence[tuple[int, ...]], new_tokens: int, dtype: str) -> dict[str, float]:
    """Cost of each run of `RightModels.run`, in passes of the base model over one prompt."""
    at_once, number = dtype in EXACT, len(prompts)
    one, steps = tree_share(prompts, new_tokens) if at_once else number, STEP * (new_tokens - 1)
    return {
        "answers": one + (steps if at_once else number * steps),
        "exact": one,
        "rounded": one + ROUNDED,
        "tree": TREE_PASSES * min(TRIED_IN_TREES, number) if at_once else 0.0,
    }


def tree_share(prompts: Sequence[tuple[int, ...]], new_tokens: int) -> float:
    """Passes over one prompt in which a tree of prompts with their answers is run."""
    tokens = tree_tokens(prompts) + len(prompts) * (new_tokens - 1)
    return len(prompts) * tokens / sum(map(len, prompts))


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


def alike(questions: Sequence[Question]) -> list[Question]:
    """Two questions that begin alike, from tokens of others; each ends in two tokens, in both orders."""
    first, second, *_ = dict.fromkeys(chain(*(each.tokens for each in questions), (0, 1)))
    begun = questions[0].tokens[:PAIR]
    return [Question(begun, answer) for answer in ((first, second, first), (second, first, second))]


@torch.inference_mode()
def agrees_in_trees(model: Any, questions: Sequence[Question], *, with_rows: bool = False) -> bool:
    """Whether a model answers questions, and two that begin alike, in trees as it answers each one alone.

    Args:
        model: The model.
        questions: The questions, which need not begin alike.
        with_rows: Whether it has to do so for several models at once too.
    """
    questions = [*questions, *alike(questions)]
    sequences, lasts = [question.tokens for question in questions], [len(each.answered) for each in questions]
    layers = chain_of(model) if with_rows else nn.ModuleList()
    rows = [RowModel(), *[RowModel(layer=len(layers) // 2)] * 2] if with_rows else [RowModel()]  # two join half way
    errors, moves = [], []
    try:
        alone = chain.from_iterable(model_logits(model, [sequence]) for sequence in sequences)
        right = Expected.of([each.answered for each in questions], alone)
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
