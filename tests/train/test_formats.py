"""Rows of public data sets, in the hub's columns, as prompt and completion."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from loraover.common.errors import ConfigError, DataError
from loraover.data.formats import FORMATS, RowForm, read_row, unread
from loraover.data.sources import load_rows
from loraover.training.recipe import Recipe, load_recipe
from loraover.training.trainers import TRAINERS

from support.real_data import real_data

ASKED = "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
MNLI = {"premise": "It rained.", "hypothesis": "It was dry.", "label": 2, "idx": 0}
SST2 = {"sentence": "a fine film ", "label": 1, "idx": 0}
COLA = {"sentence": "Him sleeps.", "label": 0, "idx": 0}
QNLI = {"question": "Who rules?", "sentence": "It rained.", "label": 1, "idx": 0}
MRPC = {"sentence1": "It rained.", "sentence2": "Rain fell.", "label": 1, "idx": 0}
METAMATH = {
    "type": "GSM_Rephrased",
    "query": "1+1?",
    "original_question": "one and one?",
    "response": "It is 1+1 = 2.\n#### 2\nThe answer is: 2",
}
CODE = {
    "query": "Add.",
    "answer": "Here:\n```python\na + b\n```\nor\n```python\nsum(x)\n```",
    "resource": "evolinstruct",
    "lang": "python",
}
WIZARD = {"instruction": "Say hi.", "output": "Hi!"}
TALK = {"idx": "a", "conversations": [{"from": "human", "value": "Say hi."}, {"from": "gpt", "value": "Hi!"}]}
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


SAID = [{"from": "human", "value": "Say hi."}, {"from": "gpt", "value": "Hi!"}]


def said(*texts: str) -> list[dict[str, str]]:
    """Return chat messages of the user and the assistant in turn."""
    return [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(texts)]


KIND = {"role": "system", "content": "Be kind."}


def test_the_system_and_the_tools_of_a_conversation_are_learned(file: Path) -> None:
    tools = '[{"name": "f"}]'
    (row,) = load(file, {"conversations": SAID, "system": "Be kind.", "tools": tools}, format="conversations")
    asked, answer = said("Say hi.", "Hi!")
    assert row == {"prompt": [KIND, asked], "completion": [answer], "tools": [{"name": "f"}]}
    first = {"from": "system", "value": "Be kind."}
    (row,) = load(file, {"conversations": [first, *SAID], "system": "Be kind.", "tools": "[]"}, format="conversations")
    assert row == {"prompt": [KIND, asked], "completion": [answer]}


CHATS = RowForm(chat=True)


@pytest.mark.parametrize("prompt", ["Say hi.", said("Say hi."), [KIND, *said("Say hi.")]])
def test_a_system_prompt_is_learned_before_the_prompt(prompt: Any) -> None:
    answer = "Hi!" if isinstance(prompt, str) else [{"role": "assistant", "content": "Hi!"}]
    pair = {"prompt": prompt, "completion": answer, "system": "Be kind."}
    learned = {"prompt": [KIND, *said("Say hi.")], "completion": said("", "Hi!")[1:]}
    assert [*read_row(pair, "auto", CHATS, "row 1")] == [learned]
    rewarded = RowForm(TRAINERS["grpo"].columns, chat=True, keeps_all=True)
    (row,) = read_row(pair, "auto", rewarded, "row 1")
    assert (row["prompt"], row["system"]) == (learned["prompt"], "Be kind.")


def test_where_all_is_text_a_system_prompt_is_text_before_it() -> None:
    (row,) = read_row(WIZARD | {"system": "Be kind."}, "auto", RowForm(), "row 1")
    assert row["prompt"] == f"Be kind.\n\n{ASKED}### Instruction:\nSay hi.\n\n### Response:\n"


@pytest.mark.parametrize(
    "first",
    [
        {"role": "system", "content": "Be kind.", "name": None},
        KIND | {"content": [{"type": "text", "text": "Be kind."}]},
    ],
)
def test_a_system_prompt_that_the_messages_have_is_learned_once(first: dict[str, Any]) -> None:
    talk = [first, *said("Say hi.", "Hi!")]
    (row,) = read_row({"messages": talk, "system": "Be kind."}, "auto", CHATS, "row 1")
    assert row["prompt"] == talk[:2]
    pair = {"chosen": talk, "rejected": [*talk[:2], {"role": "assistant", "content": "No."}]}
    form = RowForm(TRAINERS["reward"].columns, chat=True)
    assert [*read_row(pair | {"system": "Be kind."}, "auto", form, "row 1")] == [pair]


def test_the_exchanges_before_an_instruction_are_learned() -> None:
    row = WIZARD | {"history": [["1+1?", "2"]], "system": "Be kind."}
    assert [*read_row(row, "auto", CHATS, "row 1")] == [
        {"prompt": [KIND, *said("1+1?")], "completion": said("", "2")[1:]},
        {"prompt": [KIND, *said("1+1?", "2", "Say hi.")], "completion": said("", "Hi!")[1:]},
    ]
    without = [*read_row(WIZARD | {"history": [], "system": ""}, "auto", RowForm(), "row 1")]
    assert without == [*read_row(WIZARD, "auto", RowForm(), "row 1")]


@pytest.mark.parametrize(
    ("trainer", "row", "message"),
    [
        (
            "dpo",
            {"system": "a", "question": "b", "chosen": "c", "rejected": "d"},
            "a system prompt and no prompt; call the",
        ),
        (
            "sft",
            {"messages": [KIND, *said("a", "b")], "system": "Be brief."},
            "two system prompts, 'system' and",
        ),
        ("sft", WIZARD | {"history": ["a", "b"]}, "field 'history' is not a list of pairs"),
        ("sft", WIZARD | {"history": [["a", ""]]}, "field 'history' is '', expected text"),
        ("sft", WIZARD | {"system": 7}, "field 'system' is 7, expected text"),
        ("sft", {"prompt": "a", "completion": said("b"), "system": "c"}, "its texts must all be text"),
        ("dpo", {"prompt": "a", "chosen": 5, "rejected": "b", "system": "c"}, "field 'chosen' is 5"),
        ("sft", {"messages": [{"role": "asistant", "content": "a"}, *said("b", "c")]}, "unknown role 'asistant'"),
        ("sft", {"prompt": said("a"), "completion": [said("", "b")[1] | {"weight": 0}]}, "a message of completion has"),
        ("sft", {"conversations": [SAID[0], SAID[1] | {"weight": 0}]}, "no assistant turn to learn from"),
        ("sft", {"messages": [{"role": "model", "content": "a"}, *said("b", "c")]}, "write 'assistant' if that is"),
        ("sft", {"messages": [{"role": "USER", "content": "a"}, *said("b", "c")]}, "'USER'; write 'user' if that is"),
        (
            "dpo",
            {"prompt": said("a"), "chosen": said("", "b")[1:], "rejected": [said("", "c")[1] | {"weight": 0}]},
            "a mes",
        ),
        ("sft", {"messages": said("a", "b"), "tools": "not json"}, "field 'tools' is 'not json'"),
        ("sft", {"messages": said("a", "b"), "tools": ["f"]}, "field 'tools' is"),
        ("sft", {"messages": said("a", "b"), "chat_template_kwargs": "{}"}, "'chat_template_kwargs' is not an object"),
        ("kto", {"prompt": "a", "completion": "b", "label": "false"}, "the label is 'false', expected true"),
        ("kto", {"prompt": "a", "completion": "b", "label": 0.3}, "the label is 0.3, expected true"),
    ],
)
def test_what_cannot_be_learned_is_refused(trainer: str, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=f"row 1: .*{message}"):
        list(read_row(row, "auto", RowForm(TRAINERS[trainer].columns, chat=True), "row 1"))


@pytest.mark.parametrize(
    ("trainer", "row", "learned"),
    [
        ("sft", {"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "b"}),
        ("kto", {"prompt": "a", "completion": "b", "label": 1}, {"prompt": "a", "completion": "b", "label": True}),
        ("dpo", {"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a", "chosen": "b", "rejected": "c"}),
    ],
)
def test_messages_beside_the_columns_of_a_trainer_are_not_learned(
    trainer: str, row: dict[str, Any], learned: dict[str, Any]
) -> None:
    form, both = RowForm(TRAINERS[trainer].columns), row | {"messages": said("d", "e", "f", "g")}
    assert [*read_row(both, "auto", form, "row 1")] == [learned]
    assert unread(both, "auto", form, "row 1") == ["messages"]


def test_a_format_that_is_named_is_read() -> None:
    row, form = {"prompt": "a", "completion": "b", "messages": said("c", "d")}, RowForm(TRAINERS["sft"].columns)
    assert [*read_row(row, "messages", form, "row 1")] == [{"prompt": said("c"), "completion": said("", "d")[1:]}]
    assert unread(row, "messages", form, "row 1") == ["prompt", "completion"]
    rewarded = RowForm(TRAINERS["grpo"].columns, keeps_all=True)
    assert next(read_row(row, "messages", rewarded, "row 1"))["prompt"] == said("c")
    with pytest.raises(DataError, match=r"row 1: has fields \['text'\]; format messages reads the column 'messages'"):
        list(read_row({"text": "a"}, "messages", form, "row 1"))


def test_roles_that_a_template_may_know_are_taken() -> None:
    talk = [{"role": "context", "content": "a"}, *said("b", "c")]
    assert [*read_row({"messages": talk}, "auto", CHATS, "row 1")] == [{"prompt": talk[:2], "completion": talk[2:]}]


def test_no_tools_and_no_system_prompt_are_none() -> None:
    for empty in ({"tools": "null"}, {"tools": "[]"}, {"system": " "}):
        assert [*read_row({"prompt": "a", "completion": "b"} | empty, "auto", RowForm(), "row 1")] == [
            {"prompt": "a", "completion": "b"}
        ]
    for some in ({"tools": [{"name": "f"}]}, {"chat_template_kwargs": {"a": 1}}):
        with pytest.raises(DataError, match=f"row 1: has {next(iter(some))}, which chat messages alone can have"):
            list(read_row({"prompt": "a", "completion": "b"} | some, "auto", RowForm(), "row 1"))


@pytest.mark.parametrize("row", [{"conversations": [*SAID, *SAID]}, {"conversations": SAID}, WIZARD])
def test_where_conversations_are_learned_whole_each_is_one(row: dict[str, Any]) -> None:
    form = RowForm(TRAINERS["sft"].columns, chat=True, turns=False, whole=True)
    ((name, messages),) = next(read_row(row, "auto", form, "row 1")).items()
    assert (name, messages[:2]) == ("messages", said("Say hi.", "Hi!"))


def test_a_label_beside_messages_is_learned() -> None:
    form, row = RowForm(TRAINERS["kto"].columns), {"messages": said("a", "b"), "label": True, "id": 3}
    assert next(read_row(row, "auto", form, "row 1"))["label"] is True
    assert unread(row, "auto", form, "row 1") == ["id"]


def test_a_reward_sees_the_other_columns_of_a_known_format() -> None:
    form = RowForm(TRAINERS["grpo"].columns, keeps_all=True)
    (row,) = read_row({"question": "1+1?", "answer": "2", "level": 3}, "auto", form, "row 1")
    assert (row["prompt"], row["answer"], row["level"]) == ("Question: 1+1?\nAnswer:", "2", 3)
    others = {"text": 5, "completion": 7, "messages": "none", "tools": "hammer", "system": 5}
    (row,) = read_row({"prompt": "a"} | others, "auto", form._replace(chat=True), "row 1")
    assert row == {"prompt": said("a")} | others


def test_rows_with_an_instruction_are_learned_by_it_though_they_have_their_whole_text() -> None:
    row = WIZARD | {"text": "Say hi. Hi!"}
    assert [*read_row(row, "auto", RowForm(TRAINERS["sft"].columns), "row 1")] == [
        *read_row(WIZARD, "auto", RowForm(), "")
    ]
    assert unread(row, "auto", RowForm(TRAINERS["sft"].columns), "row 1") == ["text"]


def test_a_message_of_weight_0_is_not_learned(file: Path) -> None:
    asked, said = {"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "3", "weight": 0}
    corrected = {"role": "assistant", "content": "2", "weight": None}  # as Arrow gives messages without one
    row = {"messages": [asked, said, asked, corrected]}
    assert load(file, row, format="auto") == [{"prompt": [asked, said, asked], "completion": [corrected]}]
    form = RowForm((frozenset({"messages"}),), turns=False)
    with pytest.raises(DataError, match="row 1: a message of messages has the weight 0"):
        list(read_row(row, "auto", form, "row 1"))


@pytest.mark.parametrize(
    ("trainer", "row", "format", "columns"),
    [
        ("dpo", {"question": "b", "chosen": "c", "rejected": "d", "id": None}, "auto", ["question"]),
        ("sft", WIZARD | {"history": [["a", "b"]], "system": "a", "id": 1}, "auto", ["id"]),
        ("classification", {"text": "a", "label": 1, "system": "linux"}, "auto", ["system"]),
        ("sft", {"text": "a", "system": "b", "prompt": "c"}, "messages", ["system", "prompt"]),
        ("sft", METAMATH, "metamath", ["type", "original_question"]),
        ("sft", MNLI, "glue-mnli", ["idx"]),
        ("sft", TALK | {"system": "a"}, "auto", ["idx"]),
        ("sft", {"messages": [], "images": ["a.png"], "source": "b"}, "auto", ["source"]),
    ],
)
def test_columns_of_which_nothing_is_learned_are_counted(
    trainer: str, row: dict[str, Any], format: str, columns: list[str]
) -> None:
    form = RowForm(TRAINERS[trainer].columns)
    assert unread(row, format, form, "row 1") == columns
    assert unread(row, format, form._replace(keeps_all=True), "row 1") == []


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
