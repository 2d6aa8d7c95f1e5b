"""The examples that a recipe trains and measures on."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loraover.common.errors import ConfigError, DataError
from loraover.common.ranks import launched
from loraover.common.reporter import Reporter
from loraover.data.formats import PAIRS, PASSED, TEXTS, RowForm, read_row
from loraover.data.pictures import as_json
from loraover.data.sources import BUILT_IN, BadRows, Counted, Rows, is_hub_name, load_rows, together
from loraover.data.word_problems import split_word_problems
from loraover.models.load import ModelSource, takes_images
from loraover.training.recipe import Recipe
from loraover.training.rows.template import learned, takes_objects
from loraover.training.trainers import TRAINERS

HELD_OUT = 20  # one row of so many is held out of data without another split
WORD_PROBLEMS = 2000  # training examples where a recipe gives no number
MOST_REPEATED = 100  # times as many examples as there are rows, in a mixture by weights


@dataclass(frozen=True)
class Examples:
    """Training and held-out rows, and their origin.

    Args:
        train: Training rows.
        test: Held-out rows; None: nothing is measured.
        shared: Number of held-out rows that are also training rows.
        divided: Number of rows that were held out of the training data themselves.
    """

    train: Rows
    test: Rows | None
    shared: int = 0
    divided: int = 0

    @property
    def parts(self) -> list[Rows]:
        """The training rows, and the held-out rows if there are any."""
        return [self.train] if self.test is None else [self.train, self.test]

    @property
    def skipped(self) -> Counted:
        """Rows that were left out, since they cannot be learned."""
        if self.test is None or not self.test.skipped.count:
            return self.train.skipped
        return together((part.origin, part.skipped) for part in self.parts)

    def without(self, bad: Sequence[BadRows]) -> Examples:
        """Return the rows without those that cannot be learned, given for each part, and count these."""
        parts = []
        for part, one in zip(self.parts, bad, strict=True):
            kept = _only(part, [i for i in range(len(part.rows)) if i not in one.examples])
            parts.append(replace(kept, skipped=part.skipped.and_those(one.rows)))
        return replace(self, train=parts[0], test=None if self.test is None else parts[1])

    @property
    def have_pictures(self) -> bool:
        """Whether any row holds images."""
        return any("images" in row for part in self.parts for row in part.rows)


def read_examples(
    recipe: Recipe, name: str, source: ModelSource, tokenizer: Any, report: Reporter, *, measures: bool = True
) -> Examples:
    """Load the rows that a recipe trains and measures on, and report the columns and rows that are not learned."""
    form = RowForm(TRAINERS[name].columns, text=recipe.training.text_column)
    if tokenizer is not None:
        form = row_form(recipe, name, tokenizer, takes_images=takes_images(source))
    measures = measures and name != "grpo"  # whose loss says nothing; its log has rewards
    with launched().first_then_others():
        examples = load_examples(recipe if measures else recipe.changed("evaluation", examples=0), form)
    train, test = examples.train, examples.test
    report.line(f"training data: {train.origin}, {len(train.rows)} examples")
    if (left := train.filtered).count:
        report.line(f"{left.count} rows are left out, since data.keep excludes them ({left.rows})")
    report_skipped(examples.skipped, report)
    for column, found in train.unread.items():
        report.line(f"column {column!r} is not learned; {found.count} rows have it ({found.rows})")
    if measures and recipe.evaluation.examples and test is None:
        report.line(
            f"data of fewer than {HELD_OUT} rows are not split into training and held-out rows; name held-out "
            "data in data.test"
        )
    if examples.divided:
        report.line(f"{examples.divided} other rows of these data are held out; name others in data.test")
    if examples.shared and test is not None:
        report.line(f"{examples.shared} of {len(test.rows)} held-out examples are also trained on")
    return examples


def report_skipped(skipped: Counted, report: Reporter) -> None:
    """Report rows that are left out, if there are any."""
    if skipped.count:
        report.line(f"warning: {skipped.count} rows are skipped, since they cannot be learned ({skipped.rows})")


def load_examples(recipe: Recipe, form: RowForm) -> Examples:
    """Load training rows, and held-out rows if the recipe measures something."""
    data, faults = recipe.data, list[str]()
    wanted = min(recipe.evaluation.examples, data.test_examples or recipe.evaluation.examples)
    is_divided, is_built_in = bool(wanted) and _is_divided(recipe), data.train == BUILT_IN
    if loose := [name for name in data.sources[1:] and data.sources if is_hub_name(name) and "@" not in name]:
        raise DataError(f"data.train: {loose[0]} is one of several sources; name its commit, as in owner/data@COMMIT.")

    def read(source: str, split: str, revision: str | None, limit: int | None) -> Rows:
        chosen: dict[str, Any] = {"subset": data.subset, "format": data.format, "form": form, "keep": data.keep}
        chosen |= {"streaming": data.streaming, "skip_bad_rows": data.skip_bad_rows}
        try:
            return load_rows(source, split=split, revision=revision, limit=limit, **chosen)
        except DataError as error:
            faults.append(str(error))
            return Rows([], source)

    # Rows are counted after some are held out, and the shares of sources without weights are those of all rows.
    is_counted_later = not data.streaming and (len(data.sources) > 1 or is_divided)
    limit = None if is_counted_later else recipe.most_rows
    parts = [] if is_built_in else [read(name, data.train_split, data.revision, limit) for name in data.sources]
    test = None
    if wanted and not is_divided and data.test != BUILT_IN and not (is_built_in and data.test is None):
        pinned = parts[0].revision if len(parts) == 1 else None
        of_train = data.test in (None, data.train)
        revision = pinned if of_train else data.revision if pinned is None else None
        test = read(data.test or data.sources[0], data.test_split, revision, wanted)
    if faults:
        raise DataError("\n".join(faults))
    if BUILT_IN in (data.train, data.test):
        seed, origin = recipe.training.seed, f"built-in word problems, seed {recipe.training.seed}"
        count = data.train_examples or WORD_PROBLEMS if is_built_in else 0
        made, asked = (
            Rows([one for row in part for one in read_row(row, PASSED, form, BUILT_IN)], origin)
            for part in split_word_problems(count, wanted, seed)
        )
        parts, test = [made] if is_built_in else parts, asked if wanted and test is None else test
    if is_divided:
        parts, test = _divided(parts, wanted)
        test = None if test is None else replace(test, skipped=Counted())  # counted among those of the source
    train = _mixed(parts, recipe)
    if not is_built_in:
        train = _only(train, range(len(train.rows))[: recipe.most_rows])
    return Examples(train, test, _shared(train, test), len(test.rows) if is_divided and test is not None else 0)


def _shared(train: Rows, test: Rows | None) -> int:
    """Count held-out rows that are also training rows; raise DataError if all are."""
    if test is None:
        return 0
    held_out = [as_json(row) for row in test.rows]
    trained = set(held_out).intersection(map(as_json, train.rows))
    shared = sum(content in trained for content in held_out)
    if shared == len(held_out):
        raise DataError(
            f"all {shared} held-out examples are also trained on, so they measure only what was memorised. Name other "
            "data in data.test, or other splits in data.train_split and data.test_split, or set evaluation.examples "
            "to 0."
        )
    return shared


def load_held_out(recipe: Recipe) -> Rows | None:
    """Load the held-out rows alone, turns as examples where training has them so; None if nothing is measured."""
    if not _is_divided(recipe):
        recipe = recipe.changed("data", train_examples=1)  # the training rows are not looked at
    training, columns = recipe.training, TRAINERS[recipe.trainer or "sft"].columns
    turns, text = training.assistant_only_loss is None, training.text_column
    return load_examples(recipe, RowForm(columns, chat=True, turns=turns, pictures=True, text=text)).test


def _is_divided(recipe: Recipe) -> bool:
    """Whether held-out rows are taken from the training rows."""
    data = recipe.data
    is_built_in = data.train == BUILT_IN
    return data.test is None and not is_built_in and (len(data.sources) > 1 or Path(data.sources[0]).is_file())


def _divided(parts: Sequence[Rows], most: int) -> tuple[list[Rows], Rows | None]:
    """Hold out some rows of sources that have no split for it, the same ones for every seed and every weight."""
    sizes = Counter((k, number) for k, part in enumerate(parts) for number in part.numbers)
    left = Counter(k for k, _ in sizes)
    taken: set[Hashable] = set()
    held_out = 0
    for place in random.Random(0).sample(list(sizes), min(most, len(sizes) // HELD_OUT)):
        if left[place[0]] > 1 and (not taken or held_out + sizes[place] <= most):
            taken.add(place)
            left[place[0]] -= 1
            held_out += sizes[place]
    train, test = [list[tuple[int, int]]() for _ in parts], list[tuple[int, int]]()
    for k, part in enumerate(parts):
        for i, number in enumerate(part.numbers):
            (test if (k, number) in taken else train[k]).append((k, i))
    others = [_only(part, [i for _, i in chosen]) for part, chosen in zip(parts, train, strict=True)]
    return others, _joined(parts, test) if test else None


def _only(rows: Rows, chosen: Sequence[int]) -> Rows:
    numbers = [rows.numbers[i] for i in chosen] if rows.numbers else ()
    return replace(rows, rows=[rows.rows[i] for i in chosen], numbers=numbers)


def _joined(parts: Sequence[Rows], places: Sequence[tuple[int, int]]) -> Rows:
    """Return rows of several sources, each named by its source and its place there."""
    if len(parts) == 1:
        return _only(parts[0], [i for _, i in places])
    return Rows(
        [parts[k].rows[i] for k, i in places],
        " + ".join(part.origin for part in parts),
        numbers=[f"{parts[k].numbers[i]} of {parts[k].origin}" for k, i in places],
        filtered=together((part.origin, part.filtered) for part in parts),
        unread={
            name: together((part.origin, part.unread[name]) for part in parts if name in part.unread)
            for name in dict.fromkeys(name for part in parts for name in part.unread)
        },
        skipped=together((part.origin, part.skipped) for part in parts),
    )


def _mixed(parts: Sequence[Rows], recipe: Recipe) -> Rows:
    """Interleave sources in the shares of their weights, or of their rows, until every row was taken once.

    A source repeats its rows if its share is larger than they are, so that a weight is kept until the end. The order is
    the same for every seed, which shuffles the rows in training.
    """
    from datasets import Dataset, interleave_datasets

    if len(parts) == 1:
        return parts[0]
    weights = recipe.data.weights or [len(part.rows) for part in parts]
    needed, last = max(
        (len(part.rows) * sum(weights) / weight, k) for k, (part, weight) in enumerate(zip(parts, weights, strict=True))
    )
    if needed > MOST_REPEATED * sum(len(part.rows) for part in parts):
        raise DataError(
            f"data.train: {recipe.data.sources[last]} has {len(parts[last].rows)} rows and the weight "
            f"{weights[last]:g} of {sum(weights):g}, so the run would need about {needed:,.0f} examples to take "
            "each of its rows once, and would repeat the other sources. Raise its weight."
        )
    places = [
        Dataset.from_dict({"part": [k] * len(part.rows), "row": [*range(len(part.rows))]})
        for k, part in enumerate(parts)
    ]
    strategy = "all_exhausted" if recipe.data.weights else "all_exhausted_without_replacement"
    shares = [weight / sum(weights) for weight in weights]
    mixed = interleave_datasets(places, shares, seed=0, stopping_strategy=strategy)
    return _joined(parts, [*zip(mixed["part"], mixed["row"], strict=True)])


def row_form(recipe: Recipe, name: str, tokenizer: Any, *, takes_images: bool) -> RowForm:
    """Return the form of rows that a recipe's trainer takes.

    Conversations stay as they are if the loss can know which tokens are the assistant's, or if the recipe says which
    tokens count; otherwise each turn of the assistant is an example.
    """
    has_template = tokenizer.chat_template is not None
    if recipe.data.chat and not has_template:
        raise ConfigError(f"data.chat is true, but the tokenizer of {recipe.model} has no chat template.")
    kind = TRAINERS[name]
    chat = has_template and kind.library == "trl" if recipe.data.chat is None else recipe.data.chat
    answers_only = recipe.training.assistant_only_loss
    pictures = takes_images and name == "sft"
    return RowForm(
        kind.columns,
        chat=chat,
        turns=answers_only is None,
        whole=answers_only is True,
        keeps_all=name == "grpo",
        pictures=pictures,
        text=recipe.training.text_column,
        text_calls=not takes_objects(tokenizer),
    )


def check_rows(recipe: Recipe, name: str, tokenizer: Any, examples: Examples) -> None:
    """Check that a recipe's trainer can learn the chat messages, margins and images among its rows."""
    for part in examples.parts:
        _check_chat(recipe, name, tokenizer, part)
        margins = [row.get("margin") for row in part.rows]
        is_number = [
            isinstance(one, int | float) and not isinstance(one, bool) and math.isfinite(one) for one in margins
        ]
        fault = None if all(is_number) else is_number.index(False)
        if fault is not None and any(margin is not None for margin in margins):
            raise DataError(
                f"{part.place(fault)}: the margin is {margins[fault]!r}, expected a number in every row, or in none."
            )
    if examples.test is not None and recipe.evaluation.exact_match:
        for i, row in enumerate(examples.test.rows):
            others = sorted({"images", "tools", "chat_template_kwargs"} & row.keys())
            if others or not (row.keys() >= {"prompt", "completion"} or "messages" in row):
                what = f"has {others[0]}" if others else f"has {sorted(row)} and no prompt with a completion"
                raise ConfigError(
                    f"evaluation.exact_match generates answers to prompts, and {examples.test.place(i)} {what}. Set "
                    "it to false."
                )
    for part in examples.parts if examples.have_pictures else ():
        for i, row in enumerate(part.rows):
            if found := sorted({"tools", "chat_template_kwargs"} & row.keys()):
                raise DataError(
                    f"{part.place(i)} has {found[0]}, and TRL leaves this column out where rows hold images; train "
                    "such rows apart."
                )


def _check_chat(recipe: Recipe, name: str, tokenizer: Any, part: Rows) -> None:
    part = learned(part, name)
    columns = [TEXTS & row.keys() for row in part.rows]
    if other := next((i for i, found in enumerate(columns) if found != columns[0]), 0):
        pair = " (each turn of messages is a prompt and a completion)" if PAIRS[0] in columns else ""
        raise DataError(
            f"{part.place(other)} is learned as {sorted(columns[other])}, but row {part.number(0)} as "
            f"{sorted(columns[0])}{pair}; write all rows in one form."
        )
    is_text = [all(isinstance(row[column], str) for column in columns[0]) for row in part.rows]
    if all(is_text):
        return
    where = f"{part.place(is_text.index(False))} holds chat messages"
    if TRAINERS[name].library == "transformers":
        raise DataError(f"{where}, which cannot train {recipe.model} with {name}; use text.")
    if tokenizer.chat_template is None:
        raise DataError(f"{where}, but the tokenizer of {recipe.model} has no chat template.")
    if any(is_text):
        raise DataError(
            f"{where}, and row {part.number(is_text.index(True))} text; set data.chat to true, so that all "
            "become chat messages."
        )


def count_classes(examples: Examples) -> int:
    """Return the number of classes of training and held-out rows, whose labels are 0, 1 and so on; at least two."""
    most: int = max(row["label"] for rows in examples.parts for row in rows.rows)
    return max(2, 1 + most)
