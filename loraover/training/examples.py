"""The examples that a recipe trains and measures on."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loraover.common.errors import DataError
from loraover.data.formats import Row, as_chat
from loraover.data.sources import BUILT_IN, Rows, load_rows
from loraover.data.word_problems import split_word_problems
from loraover.training.recipe import Recipe

WORD_PROBLEMS = 2000  # training examples where a recipe gives no number


@dataclass(frozen=True)
class Examples:
    """Training and held-out rows with prompt and completion, and their origin.

    Args:
        train: Training rows.
        test: Held-out rows; None: nothing is measured.
        shared: Number of held-out rows that are also training rows.
    """

    train: Rows
    test: Rows | None
    shared: int = 0


def load_examples(recipe: Recipe, *, chat: bool) -> Examples:
    """Load training rows, and held-out rows if the recipe measures something.

    Args:
        recipe: The recipe.
        chat: Whether to write text as chat messages.

    Raises:
        DataError: See `load_rows`; or held-out data are missing, or are all trained on.
    """
    found = _load(recipe, chat=chat)
    if found.test is None:
        return found
    held_out = [_content(row) for row in found.test.rows]
    trained = set(held_out).intersection(map(_content, found.train.rows))
    shared = sum(content in trained for content in held_out)
    if shared == len(held_out):
        raise DataError(
            f"all {shared} held-out examples are also trained on, so they measure only what was memorised. Name other "
            "data in data.test, or other splits in data.train_split and data.test_split, or set evaluation.examples "
            "to 0."
        )
    return replace(found, shared=shared)


def _content(row: Row) -> str:
    return json.dumps([row["prompt"], row["completion"]], sort_keys=True)


def _load(recipe: Recipe, *, chat: bool) -> Examples:
    data = recipe.data
    wanted = min(recipe.evaluation.examples, data.test_examples or recipe.evaluation.examples)
    common: dict[str, Any] = {"subset": data.subset, "format": data.format, "chat": chat, "keep": data.keep}
    if data.train == BUILT_IN:
        made, held_out = split_word_problems(data.train_examples or WORD_PROBLEMS, wanted, recipe.training.seed)
        origin = f"built-in word problems, seed {recipe.training.seed}"
        train_rows, test_rows = (Rows([as_chat(r) if chat else r for r in rows], origin) for rows in (made, held_out))
        if data.test in (None, BUILT_IN):
            return Examples(train_rows, test_rows if wanted else None)
    else:
        limit = data.train_examples
        train_rows = load_rows(data.train, split=data.train_split, revision=data.revision, limit=limit, **common)
    if not wanted:
        return Examples(train_rows, None)
    if data.test is None and Path(data.train).is_file():
        raise DataError(f"{data.train} is one file; name held-out data in data.test, or set evaluation.examples to 0.")
    if data.test == BUILT_IN:
        rows = split_word_problems(0, wanted, recipe.training.seed)[1]
        origin = f"built-in word problems, seed {recipe.training.seed}"
        return Examples(train_rows, Rows([as_chat(row) if chat else row for row in rows], origin))
    revision = data.revision if train_rows.revision is None else None
    if data.test in (None, data.train):
        revision = train_rows.revision
    test_rows = load_rows(data.test or data.train, split=data.test_split, revision=revision, limit=wanted, **common)
    return Examples(train_rows, test_rows)
