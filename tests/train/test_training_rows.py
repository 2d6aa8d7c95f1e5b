"""The rows that a recipe trains on and holds out: from the hub at pinned commits, from files, or built in."""

from __future__ import annotations

from typing import Any

import datasets
import pytest

import loraover.data.sources
from loraover.common.errors import ConfigError, DataError
from loraover.data.formats import RowForm
from loraover.data.turns import later_turn
from loraover.sources.hub import HubUnreachableError
from loraover.training.examples import load_examples, load_held_out
from loraover.training.recipe import Recipe

from support.rows import GSM8K, PAIR, TURNS, Write, fault, load


class Hub:
    """Data sets by name, in place of the hub."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **sets: list[Any]) -> None:
        self.sets = {name.replace("__", "/"): rows for name, rows in sets.items()}
        self.asked: list[tuple[str, str | None]] = []
        self.loaded: list[tuple[Any, ...]] = []
        monkeypatch.setattr(loraover.data.sources, "pinned_commit", self.pinned_commit)
        monkeypatch.setattr(datasets, "load_dataset", self.load_dataset)

    def commit(self, name: str) -> str:
        return f"{name.encode().hex():0<40}"[:40]

    def pinned_commit(self, name: str, revision: str | None, kind: str) -> str:
        self.asked.append((name, revision))
        if name not in self.sets or revision not in (None, "v1", self.commit(name)):
            raise ConfigError(f"{kind} {name!r} at revision {revision or 'main'}: the hub refuses it.")
        return self.commit(name)

    def load_dataset(self, name: str, subset: str | None, *, split: str, revision: str, streaming: bool) -> Any:
        self.loaded.append((name, subset, split, revision))
        return datasets.Dataset.from_list(self.sets[name])


def test_a_hub_name_is_read_at_its_pinned_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(monkeypatch, owner__data=[GSM8K])
    rows = load("owner/data", subset="main", split="dev", revision="v1")
    commit = hub.commit("owner/data")
    assert hub.asked == [("owner/data", "v1")]
    assert hub.loaded == [("owner/data", "main", "dev", commit)]
    assert rows.revision == commit
    assert commit[:12] in rows.origin
    assert rows.rows[0]["completion"].endswith("#### 2")


@pytest.mark.parametrize(
    ("place", "error"),
    [
        ("loraover.data.sources.pinned_commit", HubUnreachableError("the hub cannot be reached.")),
        ("datasets.load_dataset", ValueError("Unknown split")),
        ("datasets.load_dataset", FileNotFoundError("no file")),
        ("datasets.load_dataset", datasets.exceptions.DatasetGenerationError()),
    ],
)
def test_where_a_hub_set_cannot_be_loaded_a_local_file_is_proposed(
    place: str, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> Any:
        raise error

    Hub(monkeypatch, owner__data=[GSM8K])
    monkeypatch.setattr(place, broken)
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
    hub = Hub(monkeypatch, owner__data=[GSM8K, GSM8K | {"question": "2-1?"}])
    examples_of(recipe("owner/data", revision="v1", train_examples=1))
    assert [load[2:] for load in hub.loaded] == [(s, hub.commit("owner/data")) for s in ("train", "test")]


def test_another_hub_set_is_not_asked_for_the_commit_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(monkeypatch, owner__data=[GSM8K], owner__other=[PAIR])
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
    hub = Hub(monkeypatch, owner__data=[GSM8K])
    train = "word-problems" if is_built_in else write("train.jsonl", PAIR)
    examples = examples_of(recipe(train, test="owner/data", revision="v1"))
    assert hub.asked == [("owner/data", "v1")]
    assert examples.test.revision == hub.commit("owner/data")
