"""Rows of public data sets, in the hub's columns, as prompt and completion."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from loraover.common.errors import ConfigError, DataError
from loraover.data.formats import FORMATS, RowForm
from loraover.data.sources import load_rows
from loraover.training.recipe import Recipe, load_recipe

from support.real_data import real_data
from support.rows import METAMATH, MNLI, TALK, WIZARD

ASKED = "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
SST2 = {"sentence": "a fine film ", "label": 1, "idx": 0}
COLA = {"sentence": "Him sleeps.", "label": 0, "idx": 0}
QNLI = {"question": "Who rules?", "sentence": "It rained.", "label": 1, "idx": 0}
MRPC = {"sentence1": "It rained.", "sentence2": "Rain fell.", "label": 1, "idx": 0}
CODE = {
    "query": "Add.",
    "answer": "Here:\n```python\na + b\n```\nor\n```python\nsum(x)\n```",
    "resource": "evolinstruct",
    "lang": "python",
}
ROWS: dict[str, dict[str, Any]] = {
    "glue-mnli": MNLI,
    "glue-sst2": SST2,
    "glue-cola": COLA,
    "glue-qnli": QNLI,
    "glue-mrpc": MRPC,
    "metamath": METAMATH,
    "codefeedback": CODE,
    "instruction": WIZARD,
    "conversations": TALK,
}


def load(path: Path, *rows: Any, chat: bool = False, **options: Any) -> list[dict[str, Any]]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_rows(
        str(path), split="train", subset=None, revision=None, limit=None, form=RowForm(chat=chat), **options
    ).rows


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "rows.jsonl"


@pytest.mark.parametrize(
    ("format", "prompt", "completion"),
    [
        (
            "glue-mnli",
            "classify the semantic similarity of the text: It rained.\nIt was dry.\nresult: ",
            "contradiction",
        ),
        ("glue-sst2", "classify the sentiment of the text: a fine film \nresult: ", "positive"),
        ("glue-cola", "classify the grammaticality of the text: Him sleeps.\nresult: ", "unacceptable"),
        (
            "glue-qnli",
            "classify the semantic similarity of the question and the sentence: Who rules?\nIt rained.\nresult: ",
            "not_entailment",
        ),
        (
            "glue-mrpc",
            "classify the semantic similarity of the text: It rained.\nRain fell.\nresult: ",
            "equivalent",
        ),
        ("metamath", "Question: 1+1?\nAnswer:", " It is 1+1 = 2.\n#### 2"),
        ("codefeedback", f"{ASKED}### Instruction:\nAdd.\n\n### Response:\n", "Here:\n```python\na + b\n```"),
        ("instruction", f"{ASKED}### Instruction:\nSay hi.\n\n### Response:\n", "Hi!"),
        ("conversations", f"{ASKED}### Instruction:\nSay hi.\n\n### Response:\n", "Hi!"),
    ],
)
def test_a_row_becomes_prompt_and_completion(format: str, prompt: str, completion: str, file: Path) -> None:
    assert load(file, ROWS[format], format=format) == [{"prompt": prompt, "completion": completion}]


@pytest.mark.parametrize("format", ["codefeedback", "instruction", "conversations"])
def test_a_chat_needs_no_template_of_ours(format: str, file: Path) -> None:
    (row,) = load(file, ROWS[format], format=format, chat=True)
    assert row["prompt"] == [{"role": "user", "content": "Add." if format == "codefeedback" else "Say hi."}]


@pytest.mark.parametrize("format", [name for name in ROWS if FORMATS[name].fields is None])
def test_a_format_is_not_taken_by_chance(format: str, file: Path) -> None:
    with pytest.raises(DataError, match="row 1: has fields"):
        load(file, ROWS[format], format="auto")


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
def test_a_row_that_lacks_a_field_is_numbered(format: str, field: str, value: Any, file: Path) -> None:
    with pytest.raises(DataError) as caught:
        load(file, ROWS[format], ROWS[format] | {field: value}, format=format)
    assert "row 2" in str(caught.value)
    assert repr(field) in str(caught.value)


@pytest.mark.parametrize("label", [-1, 3, True, "entailment"])
def test_a_label_that_glue_does_not_have_is_refused(label: Any, file: Path) -> None:
    with pytest.raises(DataError, match=r"0 \(entailment\), 1 \(neutral\), 2 \(contradiction\)"):
        load(file, MNLI | {"label": label}, format="glue-mnli")


def test_an_empty_sentence_of_glue_is_data(file: Path) -> None:
    assert load(file, SST2 | {"sentence": ""}, format="glue-sst2")[0]["prompt"].endswith("the text: \nresult: ")


def test_an_input_follows_its_instruction(file: Path) -> None:
    (row,) = load(file, WIZARD | {"input": "x = 1"}, format="instruction")
    assert row["prompt"].endswith("### Instruction:\nSay hi.\n\n### Input:\nx = 1\n\n### Response:\n")


def test_braces_in_a_prompt_are_left_alone(file: Path) -> None:
    (row,) = load(file, WIZARD | {"instruction": "print({}) {0}"}, format="instruction")
    assert "\nprint({}) {0}\n" in row["prompt"]


def test_code_whose_block_is_not_closed_is_closed(file: Path) -> None:
    (row,) = load(file, CODE | {"answer": "```\nx"}, format="codefeedback")
    assert row["completion"] == "```\nx```"


def test_an_answer_without_code_is_refused_or_left_out(file: Path) -> None:
    with pytest.raises(DataError, match=r"row 2: .*data\.keep"):
        load(file, CODE, CODE | {"answer": "No."}, format="codefeedback")
    keep = load_recipe("codefeedback-humaneval").data.keep
    assert len(load(file, CODE, CODE | {"answer": "No."}, format="codefeedback", keep=keep)) == 1


def test_a_longer_conversation_is_chat_messages(file: Path) -> None:
    turns = [*TALK["conversations"], {"from": "human", "value": "And bye?"}, {"from": "gpt", "value": "Bye!"}]
    rows = load(file, {"conversations": turns}, format="conversations", chat=True)
    assert [row["completion"][0]["content"] for row in rows] == ["Hi!", "Bye!"]
    assert [message["role"] for message in rows[1]["prompt"]] == ["user", "assistant", "user"]


def test_an_unknown_speaker_is_named(file: Path) -> None:
    with pytest.raises(DataError, match="unknown speaker 'robot', expected one of system, human"):
        load(file, {"conversations": [{"from": "robot", "value": "x"}]}, format="conversations")


def test_real_conversations_are_read_whole() -> None:
    path = real_data("instruct/fastchat_dummy_conversation.jsonl")
    rows = load_rows(
        str(path),
        split="train",
        subset=None,
        revision=None,
        limit=None,
        format="conversations",
        form=RowForm(chat=True),
    ).rows
    talks = [json.loads(line)["conversations"] for line in path.read_text().splitlines()]
    assert len(rows) == sum(turn["from"] == "gpt" for talk in talks for turn in talk)


@pytest.mark.parametrize(
    ("recipe", "kept", "left_out"),
    [
        ("metamath-gsm8k", [METAMATH], [METAMATH | {"type": "MATH_SV"}, METAMATH | {"response": " "}]),
        ("codefeedback-humaneval", [CODE], [CODE | {"query": "\n"}]),
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
def test_published_recipes_leave_rows_out(recipe: str, kept: list[Any], left_out: list[Any], file: Path) -> None:
    data = load_recipe(recipe).data
    assert len(load(file, *left_out, *kept, format=data.format, keep=data.keep)) == len(kept)


def test_a_column_that_keep_reads_has_to_be_there(file: Path) -> None:
    keep = load_recipe("metamath-gsm8k").data.keep
    without = {key: value for key, value in METAMATH.items() if key != "type"}
    with pytest.raises(DataError, match=r"row 2: field 'type' is None, expected text, which data\.keep reads"):
        load(file, METAMATH, without, format="metamath", keep=keep)


def test_data_of_which_nothing_is_kept_is_refused(file: Path) -> None:
    with pytest.raises(DataError, match=r"no examples that data\.keep lets through"):
        load(file, METAMATH | {"type": "MATH"}, format="metamath", keep=load_recipe("metamath-gsm8k").data.keep)


def test_an_expression_is_checked_and_survives_being_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.keep\.type"):
        load_recipe("metamath-gsm8k", {"data.keep.type": "("})
    recipe = load_recipe("wizardlm-mtbench")
    assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe
