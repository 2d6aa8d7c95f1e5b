"""Rows of public data sets, in the hub's columns, as prompt and completion."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from loraover.common.errors import ConfigError
from loraover.data.formats import FORMATS
from loraover.training.recipe import Recipe, load_recipe

from support.real_data import real_data
from support.rows import GSM8K, METAMATH, MNLI, TALK, TURNS, WIZARD, Write, fault, load

ASKED = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n### Response:\n"
)
ROWS: dict[str, dict[str, Any]] = {
    "gsm8k": GSM8K,
    "glue-mnli": MNLI,
    "glue-sst2": {"sentence": "a fine film ", "label": 1, "idx": 0},
    "glue-cola": {"sentence": "Him sleeps.", "label": 0, "idx": 0},
    "glue-qnli": {"question": "Who rules?", "sentence": "It rained.", "label": 1, "idx": 0},
    "glue-mrpc": {"sentence1": "It rained.", "sentence2": "Rain fell.", "label": 1, "idx": 0},
    "metamath": METAMATH,
    "codefeedback": {
        "query": "Add.",
        "answer": "Here:\n```python\na + b\n```\nor\n```python\nsum(x)\n```",
        "resource": "evolinstruct",
        "lang": "python",
    },
    "instruction": WIZARD,
    "conversations": TALK,
}
CODE = ROWS["codefeedback"]
SIMILAR = "classify the semantic similarity of the text: "


@pytest.mark.parametrize(
    ("format", "change", "prompt", "completion"),
    [
        ("gsm8k", {}, "Question: 1+1?\nAnswer:", " 1+1=<<1+1=2>>2\n#### 2"),
        ("glue-mnli", {}, f"{SIMILAR}It rained.\nIt was dry.\nresult: ", "contradiction"),
        ("glue-sst2", {}, "classify the sentiment of the text: a fine film \nresult: ", "positive"),
        ("glue-sst2", {"sentence": ""}, "classify the sentiment of the text: \nresult: ", "positive"),
        ("glue-cola", {}, "classify the grammaticality of the text: Him sleeps.\nresult: ", "unacceptable"),
        (
            "glue-qnli",
            {},
            "classify the semantic similarity of the question and the sentence: Who rules?\nIt rained.\nresult: ",
            "not_entailment",
        ),
        ("glue-mrpc", {}, f"{SIMILAR}It rained.\nRain fell.\nresult: ", "equivalent"),
        ("metamath", {}, "Question: 1+1?\nAnswer:", " It is 1+1 = 2.\n#### 2"),
        ("codefeedback", {}, ASKED.format("Add."), "Here:\n```python\na + b\n```"),
        ("codefeedback", {"answer": "```\nx"}, ASKED.format("Add."), "```\nx```"),
        ("instruction", {}, ASKED.format("Say hi."), "Hi!"),
        ("instruction", {"input": "x = 1"}, ASKED.format("Say hi.\n\n### Input:\nx = 1"), "Hi!"),
        ("instruction", {"instruction": "print({}) {0}"}, ASKED.format("print({}) {0}"), "Hi!"),
        ("conversations", {}, ASKED.format("Say hi."), "Hi!"),
    ],
)
def test_a_row_becomes_prompt_and_completion(
    format: str, change: dict[str, Any], prompt: str, completion: str, write: Write
) -> None:
    row = {"prompt": prompt, "completion": completion}
    assert load(write("a.jsonl", ROWS[format] | change), format=format).rows == [row]
    if ASKED.format("Say hi.") == prompt:  # a chat needs no template of ours
        (talk,) = load(write("a.jsonl", ROWS[format]), format=format, chat=True).rows
        assert talk["prompt"] == [{"role": "user", "content": "Say hi."}]


@pytest.mark.parametrize("format", [name for name in ROWS if FORMATS[name].fields is None])
def test_a_format_is_not_taken_by_chance(format: str, write: Write) -> None:
    assert "row 1: has fields" in fault(write("a.jsonl", ROWS[format]))


@pytest.mark.parametrize(
    ("format", "field"),
    [
        (format, field)
        for format, row in ROWS.items()
        for field in row
        if field not in ("idx", "type", "original_question", "resource", "lang")
    ],
)
@pytest.mark.parametrize("value", [None, [7]])
def test_a_row_that_lacks_a_field_is_numbered(format: str, field: str, value: Any, write: Write) -> None:
    said = fault(write("a.jsonl", ROWS[format], ROWS[format] | {field: value}), format=format)
    assert "row 2" in said
    assert repr(field) in said


@pytest.mark.parametrize(
    ("format", "change", "message"),
    [
        *(("glue-mnli", {"label": label}, "0 (entailment), 1 (neutral), 2 (contra") for label in (-1, 3, True, "yes")),
        ("codefeedback", {"answer": "No."}, "no block of code; leave such rows out with data.keep"),
        ("metamath", {"response": "\nThe answer is: 2"}, "field 'completion' is ' '"),
        (
            "conversations",
            {"conversations": [{"from": "robot", "value": "x"}]},
            "unknown speaker 'robot', expected one",
        ),
    ],
)
def test_what_a_format_does_not_have_is_refused(
    format: str, change: dict[str, Any], message: str, write: Write
) -> None:
    said = fault(write("a.jsonl", ROWS[format], ROWS[format] | change), format=format)
    assert "row 2: " in said
    assert message in said


def test_a_longer_conversation_is_chat_messages(write: Write) -> None:
    turns = [*TALK["conversations"], {"from": "human", "value": "And bye?"}, {"from": "gpt", "value": "Bye!"}]
    rows = load(write("a.jsonl", {"conversations": turns}), format="conversations", chat=True).rows
    assert [row["completion"][0]["content"] for row in rows] == ["Hi!", "Bye!"]
    assert [message["role"] for message in rows[1]["prompt"]] == ["user", "assistant", "user"]


def test_real_conversations_are_read_whole() -> None:
    path = real_data("instruct/fastchat_dummy_conversation.jsonl")
    talks = [json.loads(line)["conversations"] for line in path.read_text().splitlines()]
    rows = load(path, format="conversations", chat=True).rows
    assert len(rows) == sum(turn["from"] == "gpt" for talk in talks for turn in talk)


@pytest.mark.parametrize(
    ("recipe", "kept", "left_out"),
    [
        ("metamath-gsm8k", [METAMATH], [METAMATH | {"type": "MATH_SV"}, METAMATH | {"response": " "}]),
        ("codefeedback-humaneval", [CODE], [CODE | {"query": "\n"}, CODE | {"answer": "No."}]),
        (
            "wizardlm-mtbench",
            [WIZARD, WIZARD | {"output": "\nHi!\n"}],
            [
                WIZARD | {"output": "Hello.\nI'm SORRY, no."},
                WIZARD | {"output": "As an AI language model, no."},
                WIZARD | {"output": " \n"},
                WIZARD | {"instruction": ""},
            ],
        ),
    ],
)
def test_published_recipes_leave_rows_out(recipe: str, kept: list[Any], left_out: list[Any], write: Write) -> None:
    data = load_recipe(recipe).data
    options: dict[str, Any] = {"format": data.format, "keep": data.keep}
    assert len(load(write("a.jsonl", *left_out, *kept), **options).rows) == len(kept)
    assert "no examples that data.keep lets through" in fault(write("a.jsonl", *left_out), **options)


def test_a_column_that_keep_reads_has_to_be_there(write: Write) -> None:
    keep = load_recipe("metamath-gsm8k").data.keep
    file = write("a.jsonl", METAMATH, {key: value for key, value in METAMATH.items() if key != "type"})
    said = fault(file, format="metamath", keep=keep)
    assert "row 2: has no field 'type', which data.keep reads" in said


def test_keep_reads_what_a_chat_says(write: Write) -> None:
    chats = [[], None, TURNS[1:3], [TURNS[1] | {"content": [{"type": "text", "text": "4?"}]}, TURNS[4]]]
    file = write("a.jsonl", *({"messages": chat} for chat in chats))
    assert load(file, keep={"messages": re.compile(r"\S")}, chat=True).numbers == [3, 4]
    assert load(file, keep={"messages": re.compile(r"4\?\n4")}, chat=True).numbers == [4]
    talks = write("b.jsonl", TALK, {"conversations": []})
    assert load(talks, keep={"conversations": re.compile("Hi!")}).numbers == [1]
    assert "field 'messages' is 5, expected text or chat messages, which data.keep" in fault(
        write("c.jsonl", {"messages": 5}), keep={"messages": re.compile(r"\S")}
    )


def test_an_expression_is_checked_and_survives_being_written() -> None:
    with pytest.raises(ConfigError, match=r"data\.keep\.type"):
        load_recipe("metamath-gsm8k", {"data.keep.type": "("})
    recipe = load_recipe("wizardlm-mtbench")
    assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe
