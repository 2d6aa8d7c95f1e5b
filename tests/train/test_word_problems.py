"""Word problems made on the spot: the same everywhere, right, and held-out ones unseen."""

from __future__ import annotations

import re
from collections import Counter
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraover.common.errors import DataError
from loraover.data.word_problems import DISTINCT, NAMES, STORIES, THINGS, split_word_problems, word_problems
from loraover.evaluation.final_number import final_number

from support.speed import examples

GOLDEN = {
    0: [
        {
            "prompt": "Question: Elif shares 16 stickers among 2 friends. How many stickers does each get?\nAnswer:",
            "completion": " 16 / 2 = 8 #### 8",
        },
        {
            "prompt": "Question: Femi shares 54 marbles among 9 friends. How many marbles does each get?\nAnswer:",
            "completion": " 54 / 9 = 6 #### 6",
        },
        {
            "prompt": "Question: Ben had 56 pencils and gave 11 away. How many pencils are left?\nAnswer:",
            "completion": " 56 - 11 = 45 #### 45",
        },
    ],
    1: [
        {
            "prompt": "Question: Elif had 92 books and gave 11 away. How many books are left?\nAnswer:",
            "completion": " 92 - 11 = 81 #### 81",
        },
        {
            "prompt": "Question: Kofi shares 81 stamps among 9 friends. How many stamps does each get?\nAnswer:",
            "completion": " 81 / 9 = 9 #### 9",
        },
        {
            "prompt": "Question: Ada had 32 stamps and gave 18 away. How many stamps are left?\nAnswer:",
            "completion": " 32 - 18 = 14 #### 14",
        },
    ],
}


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
    assert {seed: list(islice(word_problems(seed), 3)) for seed in GOLDEN} == GOLDEN


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


def test_every_seed_holds_the_same_problems_out() -> None:
    assert split_word_problems(10, 20, 0)[1] == split_word_problems(30, 20, 7)[1]
    assert split_word_problems(10, 20, 0)[0] != split_word_problems(10, 20, 7)[0]


@pytest.mark.parametrize("more", [1, 50, 1000])
def test_more_training_rows_leave_the_held_out_ones(more: int) -> None:
    rows, held = split_word_problems(30, 10, 3)
    longer, same = split_word_problems(30 + more, 10, 3)
    assert same == held
    assert longer[:30] == rows
