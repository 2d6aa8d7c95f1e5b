"""The rows that trainers of TRL are given: tools, columns, classes, streams and mixtures."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest

import loraover
import loraover.data.sources
from loraover.common.errors import ConfigError, DataError
from loraover.data.formats import RowForm, read_row
from loraover.data.sources import Rows, read_raw
from loraover.training.plan import make_plan
from loraover.training.recipe import Recipe, load_recipe
from loraover.training.rows.data import Examples, check_rows, count_classes, load_examples
from loraover.training.run.trainer import to_dataset
from loraover.training.trainers import TRAINERS

from support.data_hub import DataHub
from support.tiny_hub import write_recipe
from support.train_command import TURNS, data_file
from support.trained_run import watched

pytestmark = pytest.mark.process

SUMS: list[dict[str, Any]] = [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(8)]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["yes", 1], "row 1: the label is 'yes', expected a number"),
        ([0, -1], "row 2: the label is -1"),
        ([0, True], "row 2: the label is True"),
    ],
)
def test_labels_that_are_no_classes_are_refused(labels: list[Any], message: str) -> None:
    form = RowForm(TRAINERS["classification"].columns)
    rows = ({"text": "a", "label": label} for label in labels)
    with pytest.raises(DataError, match=message):
        [[*read_row(row, "auto", form, f"row {i}")] for i, row in enumerate(rows, 1)]


def test_a_label_of_held_out_rows_is_a_class() -> None:
    train, test = (Rows([{"text": "a", "label": label}], "rows") for label in (0, 2))
    assert count_classes(Examples(train, test)) == 3
    assert count_classes(Examples(train, None)) == 2  # of one class, as the first rows of sorted data may be


@pytest.mark.parametrize(
    ("trainer", "template", "message"),
    [
        ("sft", "", "row 2 holds chat messages, and row 1 text; set data.chat to true"),
        ("sft", None, "row 2 holds chat messages, but the tokenizer of owner/model has no chat template"),
        ("seq2seq", "", "row 2 holds chat messages, which cannot train owner/model with seq2seq"),
    ],
)
def test_chat_messages_after_a_row_of_text_are_found(trainer: str, template: str | None, message: str) -> None:
    talk = {"prompt": TURNS[:1], "completion": TURNS[1:2]}
    recipe = load_recipe("demo", {"model": "owner/model"})
    tokenizer = SimpleNamespace(chat_template=template)
    with pytest.raises(DataError, match=message):
        check_rows(recipe, trainer, tokenizer, Examples(Rows(SUMS, "rows"), Rows([SUMS[0], talk], "rows")))
    check_rows(recipe, trainer, tokenizer, Examples(Rows(SUMS, "rows"), None))


def test_rows_of_several_forms_are_refused() -> None:
    whole = Rows([{"messages": TURNS}, {"prompt": TURNS[:1], "completion": TURNS[1:2]}], "rows")
    message = (
        r"rows: row 2 is learned as \['completion', 'prompt'\], but row 1 as \['messages'\] \(each turn of messages"
    )
    with pytest.raises(DataError, match=message):
        check_rows(load_recipe("demo"), "sft", SimpleNamespace(chat_template=""), Examples(whole, None))


TOOL = {"type": "function", "function": {"name": "add", "description": "Add.", "parameters": {"type": "object"}}}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "add"}}]}
TALK = [{"role": "system", "content": "brief"}, *TURNS]


def test_conversations_with_tools_are_learned(bases: dict[str, Path], tmp_path: Path) -> None:
    """The assistant's turns are learned one by one, or as the recipe says; other columns stay with them."""
    rows: list[dict[str, Any]] = [{"messages": [*TALK, TALK[1], CALL], "tools": [TOOL]}]
    (first, second, third) = read_row(rows[0], "auto", RowForm(TRAINERS["sft"].columns, chat=True), "row 1")
    assert first == {"prompt": TALK[:2], "completion": TALK[2:3], "tools": [TOOL]}
    assert (second["completion"], third["completion"]) == (TALK[4:], [CALL])
    (whole,) = read_row(rows[0], "auto", RowForm(TRAINERS["sft"].columns, chat=True, turns=False), "row 1")
    assert whole == rows[0]
    file = str(data_file(tmp_path / "rows.jsonl", *[{"messages": TALK}] * 4))
    recipe = write_recipe(tmp_path / "r.yaml", bases["chat"], data={"train": file}, evaluation={"examples": 0})
    for asked, examples in ((None, 8), (False, 4)):
        plan = make_plan(load_recipe(recipe, {"training.assistant_only_loss": asked}))
        assert plan.lengths is not None
        assert plan.lengths.examples == examples


MARKED = (
    "{% for tool in tools or () %}{{ '<tool>' + tool['function']['name'] }}{% endfor %}"
    "{% for message in messages %}{{ '<' + message['role'] + '>' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}"
    "{% for call in message['tool_calls'] or () %}{{ '#' + call['function']['name'] }}{% endfor %}"
    "{{ eos_token }}{% endgeneration %}{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
"""Chat template that marks what the assistant generates, as `assistant_only_loss` needs."""


def test_a_mixture_with_tools_trains_the_assistants_turns_only(bases: dict[str, Path], tmp_path: Path) -> None:
    base = shutil.copytree(bases["chat"], tmp_path / "base")
    (base / "chat_template.jinja").write_text(MARKED)
    tools = str(data_file(tmp_path / "tools.jsonl", *[{"messages": [TALK[1], CALL], "tools": [TOOL]}] * 4))
    talks = str(data_file(tmp_path / "talks.jsonl", *[{"messages": TALK}] * 20))
    data = {"train": [{"path": tools, "weight": 3}, talks]}
    training = {"max_steps": 2, "assistant_only_loss": True}
    recipe = write_recipe(tmp_path / "r.yaml", base, data=data, training=training, evaluation={"examples": 0})
    with watched() as seen:
        assert loraover.train(str(recipe), tmp_path / "out").update_norm
    trainer, learned = seen[0][0], list[str]()
    for row in trainer.train_dataset:
        pairs = zip(row["input_ids"], row["labels"], strict=True)
        learned.append(trainer.processing_class.decode([token for token, label in pairs if label != -100]))
        assert trainer.processing_class.decode(row["input_ids"]).startswith("<tool>add" if row["tools"] else "<system>")
    assert {*learned} == {"#add</s>", "2</s>#### 4</s>"}
    assert learned.count("#add</s>") / len(learned) == pytest.approx(0.75, abs=0.1)
    long = [{"messages": [{"role": "user", "content": "a" * 200}, TALK[2]]}]
    for rows, message in ((long, "no example fits"), ([{"messages": TALK[:2]}], "row 1: messages holds no assistant")):
        with pytest.raises(DataError, match=message):
            loraover.train(
                str(recipe), tmp_path / "no", overrides={"data.train": str(data_file(tmp_path / "r", *rows))}
            )


def test_what_other_rows_call_tools_with_stays_out_of_a_row() -> None:
    """Arrow gives dicts of one column the same keys, with None where a row has none."""
    rows = [{"messages": [{**CALL, "arguments": {name: 1}}], "text": name} for name in "ab"]
    assert to_dataset(rows).to_list() == rows


@pytest.mark.parametrize("number", [-1.7, 52.520006599999988, 7.8e-12, 2**64, -(10**30), 3.0])
def test_a_number_of_a_message_stays_as_it_is(number: float, tmp_path: Path) -> None:
    """The ujson of pandas, which `datasets` takes, would round it, or return the message as text."""
    rows: list[dict[str, Any]] = [{"messages": [{**CALL, "arguments": {"n": number}}], "tools": [{"default": number}]}]
    made = to_dataset(rows)
    found = [*made.map(lambda row: {"messages": row["messages"] * 2})]
    assert repr(found) == repr([rows[0] | {"messages": rows[0]["messages"] * 2}])
    made.to_parquet(tmp_path / "rows.parquet")
    assert repr([row for _, row in read_raw(str(tmp_path / "rows.parquet"), split="train").rows]) == repr(rows)
    written = [{"messages": [{"arguments": call}]} for call in ({"n": number}, {"text": "a"})]
    (file := tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, written)))
    read = datasets.load_dataset("json", data_files=str(file), split="train", cache_dir=str(tmp_path))  # as of the hub
    assert repr(read.to_list()) == repr(written)


def test_a_number_beyond_64_bits_is_refused() -> None:
    with pytest.raises(DataError, match="or beyond 64 bits; write all values of a column in one type"):
        to_dataset([{"prompt": "a", "id": 2**64}])


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL])])
def test_a_column_may_begin_after_the_first_row(tools: Any) -> None:
    rows: list[dict[str, Any]] = [{"prompt": "a"}, {"prompt": "b", "tools": tools, "chat_template_kwargs": {"k": 1}}]
    missing: dict[str, Any] = {"tools": None, "chat_template_kwargs": {}}
    assert to_dataset(rows).to_list() == [missing | rows[0], rows[1]]


def test_a_stream_is_read_as_far_as_the_steps_need(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = DataHub(monkeypatch, owner__data=SUMS * 100)
    changes: dict[str, Any] = {"data": {"train": "owner/data", "streaming": True}, "evaluation": {"examples": 0}}
    changes["training"] = {"max_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}
    result = loraover.train(str(write_recipe(tmp_path / "r.yaml", bases["llama"], **changes)), tmp_path / "out")
    assert result.lengths is not None
    assert (result.steps, result.lengths.examples) == (2, 12)
    assert 12 <= len(hub.streamed) < 20
    all_rows = {"data.train_examples": None}
    shared = load_recipe(str(tmp_path / "r.yaml"), all_rows | {"distributed.processes": 2})
    assert shared.most_rows == 24  # micro-batches of both processes
    with pytest.raises(ConfigError, match=r"data\.streaming with training\.packing needs data\.train_examples"):
        load_recipe(str(tmp_path / "r.yaml"), all_rows | {"training.packing": True})


def test_several_sources_are_mixed_by_their_weights(tmp_path: Path) -> None:
    datasets.Dataset.from_list(SUMS[:4]).to_parquet(tmp_path / "a.parquet")
    other = str(data_file(tmp_path / "b.jsonl", *[{"prompt": str(n), "completion": "b"} for n in range(40)]))
    data: dict[str, Any] = {"train": [str(tmp_path / "a.parquet"), other]}
    asked = {"model": "m", "data": data, "training": {"max_steps": 1}, "evaluation": {"examples": 0}}
    plain = load_examples(Recipe.model_validate(asked), RowForm()).train
    assert sorted(row["completion"] == "b" for row in plain.rows) == [False] * 4 + [True] * 40
    data["train"] = [{"path": str(tmp_path / "a.parquet"), "weight": 3}, other]
    weighted = load_examples(Recipe.model_validate(asked), RowForm()).train
    share = sum(row["completion"] != "b" for row in weighted.rows) / len(weighted.rows)
    assert share == pytest.approx(0.75, abs=0.1)
    data["train"][0]["weight"] = 1e-6
    message = "the weight 1e-06 of 1, so the run would need about 4,000,004 examples .* Raise its weight"
    with pytest.raises(DataError, match=message):
        load_examples(Recipe.model_validate(asked), RowForm())
    data["train"] = ["owner/data", other]
    with pytest.raises(DataError, match="owner/data is one of several sources; name its commit"):
        load_examples(Recipe.model_validate(asked), RowForm())
