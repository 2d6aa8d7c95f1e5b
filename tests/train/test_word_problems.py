"""Word problems made on the spot: the same everywhere, right, and held-out ones unseen."""

from __future__ import annotations

import re
from collections import Counter
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraover.common.errors import DataError
from loraover.data.final_number import final_number
from loraover.data.word_problems import DISTINCT, NAMES, STORIES, THINGS, split_word_problems, word_problems

from support.speed import examples

FIRST = (
    "Question: Elif had 92 books and gave 11 away. How many books are left?\nAnswer: 92 - 11 = 81 #### 81",
    "Question: Kofi shares 81 stamps among 9 friends. How many stamps does each get?\nAnswer: 81 / 9 = 9 #### 9",
    "Question: Ada had 32 stamps and gave 18 away. How many stamps are left?\nAnswer: 32 - 18 = 14 #### 14",
)


def test_more_problems_than_there_are_is_refused() -> None:
    plus, minus = 56 * 35, sum(len(range(3, a)) for a in range(20, 100))
    times = divided = 11 * 8
    assert len(NAMES) * len(THINGS) * (plus + minus + times + divided) == DISTINCT
    with pytest.raises(DataError, match="only 638976 different problems"):
        split_word_problems(DISTINCT - 3, 4, 0)


SEEDS = st.integers(0, 2**32 - 1)
QUESTION = re.compile(r"Question: (?P<story>.+)\nAnswer:")
COMPLETION = re.compile(r" (\d+) ([-+*/]) (\d+) = (\d+) #### (\d+)")


def test_the_first_problems_never_change() -> None:
    """Results that were measured on them stay comparable."""
    assert tuple(row["prompt"] + row["completion"] for row in islice(word_problems(1), 3)) == FIRST


@given(SEEDS)
@examples(50)
def test_every_completion_is_right(seed: int) -> None:
    for row in islice(word_problems(seed), 50):
        found = COMPLETION.fullmatch(row["completion"])
        assert found is not None
        a, sign, b, result, answer = found.groups()
        left, right = int(a), int(b)
        exact = {"+": left + right, "-": left - right, "*": left * right, "/": left / right}[sign]
        assert exact == int(result) == int(answer) > 0
        assert final_number(row["completion"]) == int(answer)
        question = QUESTION.fullmatch(row["prompt"])
        assert question is not None
        assert re.findall(r"\d+", question["story"]) == [a, b]


def test_every_kind_of_problem_comes_up() -> None:
    rows = list(islice(word_problems(0), 2000))
    signs = Counter(match[2] for row in rows if (match := COMPLETION.fullmatch(row["completion"])))
    assert set(signs) == {sign for _, sign in STORIES}
    assert min(signs.values()) > 400
    text = " ".join(row["prompt"] for row in rows)
    assert all(word in text for word in (*NAMES, *THINGS))


@given(train=st.integers(0, 60), held_out=st.integers(0, 60), seed=SEEDS)
@examples(30)
def test_a_split_has_no_problem_twice(train: int, held_out: int, seed: int) -> None:
    rows, held = split_word_problems(train, held_out, seed)
    assert (len(rows), len(held)) == (train, held_out)
    assert len({row["prompt"] for row in rows + held}) == train + held_out


def test_every_seed_holds_the_same_problems_out_of_however_many() -> None:
    rows, held = split_word_problems(30, 20, 7)
    longer, same = split_word_problems(1030, 20, 7)
    assert (longer[:30], same) == (rows, held)
    others, same = split_word_problems(30, 20, 0)
    assert others != rows
    assert same == held
