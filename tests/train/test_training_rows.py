"""The rows that a recipe trains on and holds out: from the hub at pinned commits, from files, or word problems."""

from __future__ import annotations

import re
from collections import Counter
from itertools import islice
from typing import Any

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraover.common.errors import DataError
from loraover.data.formats import RowForm, later_turn
from loraover.data.sources import Counted
from loraover.data.word_problems import (
    DISTINCT,
    NAMES,
    STORIES,
    THINGS,
    final_number,
    split_word_problems,
    word_problems,
)
from loraover.sources.hub import HubUnreachableError
from loraover.training.recipe import Recipe
from loraover.training.rows.data import load_examples, load_held_out

from support.data_hub import DataHub
from support.rows import GSM8K, PAIR, TURNS, Write, fault, load
from support.speed import examples


def test_a_hub_name_is_read_at_its_pinned_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = DataHub(monkeypatch, owner__data=[GSM8K])
    rows = load("owner/data", subset="main", split="dev", revision="v1")
    commit = hub.commit("owner/data")
    assert hub.asked == [("owner/data", "v1")]
    assert hub.loaded == [("owner/data", "main", "dev", commit)]
    assert rows.revision == commit
    assert commit[:12] in rows.origin
    assert rows.rows[0]["completion"].endswith("#### 2")


@pytest.mark.parametrize(
    ("fault_of_hub", "error"),
    [
        ("unreachable", HubUnreachableError("the hub cannot be reached.")),
        ("unreadable", ValueError("Unknown split")),
        ("unreadable", FileNotFoundError("no file")),
        ("unreadable", datasets.exceptions.DatasetGenerationError()),
    ],
)
def test_where_a_hub_set_cannot_be_loaded_a_local_file_is_proposed(
    fault_of_hub: str, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    setattr(DataHub(monkeypatch, owner__data=[GSM8K]), fault_of_hub, error)
    message = fault("owner/data")
    assert message.startswith("owner/data: ")
    assert "with data" in message


def recipe(train: object, *, examples: int = 2, **data: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "model": "owner/model",
            "data": {"train": train if isinstance(train, list) else str(train), **data},
            "training": {"max_steps": 1, "seed": 5},
            "evaluation": {"examples": examples},
        }
    )


def examples_of(made: Recipe, *, chat: bool = False) -> Any:
    return load_examples(made, RowForm(chat=chat))


def test_held_out_rows_come_from_another_file(write: Write) -> None:
    train, test = write("train.jsonl", PAIR, PAIR, PAIR), write("other.jsonl", GSM8K, GSM8K, GSM8K)
    examples = examples_of(recipe(train, test=str(test), train_examples=2))
    assert examples.train.rows == [PAIR, PAIR]
    assert [row["prompt"] for row in examples.test.rows] == ["Question: 1+1?\nAnswer:"] * 2


def test_held_out_rows_come_from_the_other_split(write: Write) -> None:
    folder = write("folder/train.jsonl", PAIR).parent
    write("folder/dev.jsonl", GSM8K, GSM8K)
    examples = examples_of(recipe(folder, test_split="dev", test_examples=1, examples=5))
    assert [row["prompt"] for row in examples.test.rows] == ["Question: 1+1?\nAnswer:"]


def test_rows_of_one_file_are_held_out_if_it_has_enough(write: Write) -> None:
    train = write("train.jsonl", PAIR)
    assert examples_of(recipe(train)).test is None
    assert examples_of(recipe(train, examples=0)).test is None
    rows = [PAIR | {"prompt": str(i)} for i in range(60)]
    found = examples_of(recipe(write("more.jsonl", *rows), examples=200))
    assert found.divided == len(found.test.rows) == 3
    assert [*found.test.numbers] == [int(row["prompt"]) + 1 for row in found.test.rows]
    assert sorted([*found.train.numbers, *found.test.numbers]) == [*range(1, 61)]


def test_bad_rows_of_all_data_are_listed_or_skipped(write: Write) -> None:
    bad, good = {"prompt": "x"}, [[PAIR | {"prompt": f"{k}.{i}"} for i in range(4)] for k in range(30)]
    files = [str(write(f"{k}.jsonl", *good[k], bad)) for k in range(3)]
    asked = recipe(files[:2], test=files[2], examples=9)
    with pytest.raises(DataError) as caught:
        examples_of(asked)
    found = str(caught.value).splitlines()
    assert [line.partition(", row 5: has fields")[0] for line in found] == files
    skipped = examples_of(asked.changed("data", skip_bad_rows=True))
    assert (len(skipped.train.rows), len(skipped.test.rows), skipped.skipped.count) == (8, 4, 3)
    divided = recipe(write("many.jsonl", *(row for part in good for row in part), bad), skip_bad_rows=True)
    assert examples_of(divided).skipped == Counted(1, [121])


@pytest.mark.parametrize("sources", [1, 2])
def test_turns_of_one_conversation_are_held_out_together(sources: int, write: Write) -> None:
    talks = [{"messages": [{**one, "content": f"{i}: {one['content']}"} for one in TURNS]} for i in range(80)]
    files = [str(write(f"{i}.jsonl", *talks[i::sources])) for i in range(sources)]
    asked = recipe(files if sources > 1 else files[0], examples=5)
    found = examples_of(asked)
    first = {part: {row["prompt"][0]["content"] for row in getattr(found, part).rows} for part in ("train", "test")}
    assert first["train"].isdisjoint(first["test"])
    assert len(found.test.rows) == 2 * len(first["test"]) == 4  # of two turns each, at most five
    assert later_turn(held_out_of(asked)) == 1
    whole = asked.training.model_copy(update={"assistant_only_loss": True})
    assert later_turn(held_out_of(asked.model_copy(update={"training": whole}))) is None


def mixture(write: Write, *, seed: int = 5, examples: int = 200, **data: Any) -> Any:
    """Rows of two files with 60 and 9 rows, of which the second has the weight 3."""
    sizes = {"a": 60, "b": 9}
    files = [
        str(write(f"{name}.jsonl", *({"prompt": f"{name}{i}", "completion": "1"} for i in range(size))))
        for name, size in sizes.items()
    ]
    made = recipe([files[0], {"path": files[1], "weight": 3}], examples=examples, **data)
    return examples_of(made.changed("training", seed=seed))


def test_rows_of_a_mixture_are_held_out_before_they_are_repeated(write: Write) -> None:
    found = mixture(write)
    prompts = [row["prompt"] for row in found.test.rows]
    assert len({*prompts}) == len(prompts) == found.divided == 3  # one of twenty of 69
    trained = {row["prompt"] for row in found.train.rows}
    assert trained.isdisjoint(prompts)
    assert len(trained) == 69 - 3
    assert found.test.numbers[0] == f"{int(prompts[0][1:]) + 1} of file a.jsonl"
    for seed in (0, 1):
        assert mixture(write, seed=seed) == found


def test_the_only_row_of_a_source_is_trained_on(write: Write) -> None:
    files = [str(write(f"{i}.jsonl", PAIR | {"prompt": str(i)})) for i in range(40)]
    found = examples_of(recipe(files, examples=200))
    assert found.test is None
    assert len(found.train.rows) == 40


@pytest.mark.parametrize("weight", [None, 3])
def test_training_examples_are_counted_over_all_sources(weight: int | None, write: Write) -> None:
    rows = [[PAIR | {"prompt": f"{name}{i}"} for i in range(size)] for name, size in (("a", 200), ("b", 50))]
    first, second = (str(write(f"{i}.jsonl", *part)) for i, part in enumerate(rows))
    asked = recipe([first, second if weight is None else {"path": second, "weight": weight}], train_examples=100)
    counts = Counter(row["prompt"][0] for row in examples_of(asked).train.rows)
    assert counts.total() == 100
    assert counts["b"] == pytest.approx(20 if weight is None else 75, abs=10)
    alone = examples_of(recipe(first, train_examples=100, examples=200))
    assert (len(alone.train.rows), len(alone.test.rows)) == (100, 10)


def held_out_of(made: Recipe) -> list[Any]:
    found = load_held_out(made)
    assert found is not None
    return found.rows


def test_held_out_rows_of_plain_text_are_read(write: Write) -> None:
    file = write("a.jsonl", *({"text": str(i)} for i in range(80)))
    assert [*held_out_of(recipe(file, examples=5))[0]] == ["text"]


@pytest.mark.parametrize("chat", [False, True])
def test_held_out_rows_that_are_trained_on_are_counted_and_refused_if_all_are(chat: bool, write: Write) -> None:
    other, same = PAIR | {"prompt": "2-1?"}, PAIR | {"completion": " two"}
    train = write("train.jsonl", PAIR, other)
    counted = examples_of(recipe(train, test=str(write("test.jsonl", same, PAIR, PAIR)), examples=3), chat=chat)
    assert counted.shared == 2
    with pytest.raises(DataError, match="all 2 held-out examples are also trained on"):
        examples_of(recipe(train, test=str(write("test.jsonl", PAIR, PAIR, same))), chat=chat)


def test_the_held_out_split_is_read_at_the_commit_of_the_training_split(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = DataHub(monkeypatch, owner__data=[GSM8K, GSM8K | {"question": "2-1?"}])
    examples_of(recipe("owner/data", revision="v1", train_examples=1))
    assert [load[2:] for load in hub.loaded] == [(s, hub.commit("owner/data")) for s in ("train", "test")]


def test_another_hub_set_is_not_asked_for_the_commit_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = DataHub(monkeypatch, owner__data=[GSM8K], owner__other=[PAIR])
    examples = examples_of(recipe("owner/data", test="owner/other"))
    assert examples.test.revision == hub.commit("owner/other")


def test_word_problems_follow_the_run_seed_and_the_limits() -> None:
    made = recipe("word-problems", train_examples=4, test_examples=1, examples=3)
    examples = examples_of(made)
    assert (len(examples.train.rows), len(examples.test.rows)) == (4, 1)
    assert examples == examples_of(made)
    assert "seed 5" in examples.train.origin
    row = examples_of(made, chat=True).train.rows[0]
    assert (row["prompt"][0]["role"], row["completion"][0]["role"]) == ("user", "assistant")


def test_held_out_data_beside_word_problems_are_used(write: Write) -> None:
    other = write("other.jsonl", PAIR)
    assert examples_of(recipe("word-problems", test=str(other), train_examples=4)).test.rows == [PAIR]


def test_word_problems_are_held_out_beside_a_file(write: Write) -> None:
    examples = examples_of(recipe(write("train.jsonl", PAIR), test="word-problems"))
    assert examples.train.rows == [PAIR]
    assert len(examples.test.rows) == 2
    assert examples.test.revision is None
    assert "built-in word problems" in examples.test.origin


@pytest.mark.parametrize("is_built_in", [False, True])
def test_held_out_rows_on_the_hub_have_the_revision_where_training_rows_are_local(
    is_built_in: bool, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = DataHub(monkeypatch, owner__data=[GSM8K])
    train = "word-problems" if is_built_in else write("train.jsonl", PAIR)
    examples = examples_of(recipe(train, test="owner/data", revision="v1"))
    assert hub.asked == [("owner/data", "v1")]
    assert examples.test.revision == hub.commit("owner/data")


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
