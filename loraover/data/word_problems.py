"""Generated arithmetic word problems, and the final numbers in texts, by which answers are checked; without PyTorch."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from decimal import Decimal

from loraover.common.errors import DataError

NAMES = ("Ada", "Ben", "Chloe", "Dev", "Elif", "Femi", "Grace", "Hugo", "Ines", "Jun", "Kofi", "Lena")
THINGS = ("apples", "books", "coins", "marbles", "pencils", "shells", "stamps", "stickers")
STORIES = (
    ("{name} has {a} {things} and gets {b} more. How many {things} does {name} have?", "+"),
    ("{name} had {a} {things} and gave {b} away. How many {things} are left?", "-"),
    ("{name} fills {a} boxes with {b} {things} each. How many {things} are there?", "*"),
    ("{name} shares {a} {things} among {b} friends. How many {things} does each get?", "/"),
)


def word_problems(seed: int) -> Iterator[dict[str, str]]:
    """Yield rows with `prompt` and `completion` without end; a completion ends in `#### answer`, as in GSM8K."""
    draw = random.Random(seed)
    while True:
        story, sign = draw.choice(STORIES)
        if sign == "+":
            a, b = draw.randint(5, 60), draw.randint(5, 39)
            answer = a + b
        elif sign == "-":
            a = draw.randint(20, 99)
            b = draw.randint(3, a - 1)
            answer = a - b
        else:
            a, b = draw.randint(2, 12), draw.randint(2, 9)
            a, answer = (a, a * b) if sign == "*" else (a * b, a)
        question = story.format(name=draw.choice(NAMES), things=draw.choice(THINGS), a=a, b=b)
        yield {"prompt": f"Question: {question}\nAnswer:", "completion": f" {a} {sign} {b} = {answer} #### {answer}"}


HELD_OUT_SEED = 0
DISTINCT = 638_976
"""Number of different problems: 12 names, 8 things and 6,656 pairs of numbers with their stories."""


def split_word_problems(train: int, held_out: int, seed: int) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Return generated training rows, and held-out rows, which are the same for every seed.

    No problem occurs twice, and no held-out problem occurs in training. A DataError says that there are not so many.
    """
    if train + held_out > DISTINCT:
        raise DataError(
            f"word-problems: {train} training and {held_out} held-out examples are asked for, but there are only "
            f"{DISTINCT} different problems; lower data.train_examples."
        )
    tests = _distinct(held_out, HELD_OUT_SEED, set())
    return _distinct(train, seed, {row["prompt"] for row in tests}), tests


def _distinct(count: int, seed: int, without: set[str]) -> list[dict[str, str]]:
    rows: dict[str, dict[str, str]] = {}
    problems = word_problems(seed)
    while len(rows) < count:
        row = next(problems)
        if row["prompt"] not in without:
            rows.setdefault(row["prompt"], row)
    return list(rows.values())


_NUMBER = re.compile(r"(?P<number>[-+−]?\s?[$€£]?\s?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|[-+−]?\.\d+)")
_MARKED = re.compile(
    rf"(?<!#)####[^\S\n]*(?:[$€£][^\S\n]*)?{_NUMBER.pattern}(?:[^\S\n]*(?:[^\s\d.#][^\s#]*|\.))?[^\S\n]*$",
    re.MULTILINE,
)


def final_number(text: str) -> Decimal | None:
    """Read the number of the last line that ends in `####` and a number, or else the last number; None without any.

    Thousands separators, currency signs and one word after the number are ignored: "#### $1,234.50 each" is 1234.50.
    `####` also begins headings of Markdown; "#### Step 1: add" and "#### 3. Add up" give no number.
    A sign counts where it stands before a number as in "is -3"; "9-5", "9 - 5", "(9)-5" and "9%-5%" end in 5, and so
    does a list's item "- 5".
    """
    found = list(_MARKED.finditer(text)) or list(_NUMBER.finditer(text))
    if not found:
        return None
    written = found[-1]["number"]
    digits = re.sub(r"[^\d.]", "", written)
    before, sign = text[: found[-1].start("number")], written[:2]
    is_item = False
    if sign[1:].isspace():
        before = before.rstrip(" \t")
        is_item = before.endswith("\n")
        before = before.rstrip()
    negative = sign[0] in "-−" and not (is_item or before[-1:].isalnum() or before.endswith((")", "%")))
    return Decimal(digits).copy_negate() if negative else Decimal(digits)
