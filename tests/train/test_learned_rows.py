"""System prompts, tools, turns and columns of rows: learned, counted, or refused by their row."""

from __future__ import annotations

from typing import Any

import pytest

from loraover.common.errors import DataError
from loraover.data.formats import ALPACA, RowForm, read_row, unread
from loraover.training.recipe import load_recipe
from loraover.training.rows.data import row_form
from loraover.training.rows.template import takes_objects
from loraover.training.trainers import TRAINERS

from support.rows import METAMATH, MNLI, TALK, WIZARD
from support.tiny_hub import tiny_tokenizer

TEXTS, CHATS = RowForm(), RowForm(chat=True)
REWARDED = RowForm(TRAINERS["grpo"].columns, keeps_all=True)


def read(row: dict[str, Any], form: RowForm = TEXTS, format: str = "auto") -> list[dict[str, Any]]:
    return [*read_row(row, format, form, "row 1")]


SAID = [{"from": "human", "value": "Say hi."}, {"from": "gpt", "value": "Hi!"}]


def said(*texts: str) -> list[dict[str, str]]:
    """Return chat messages of the user and the assistant in turn."""
    return [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(texts)]


KIND = {"role": "system", "content": "Be kind."}
asked, answer = said("Say hi.", "Hi!")


def test_the_system_and_the_tools_of_a_conversation_are_learned() -> None:
    tools = '[{"name": "f"}]'
    (row,) = read({"conversations": SAID, "system": "Be kind.", "tools": tools})
    assert row == {"prompt": [KIND, asked], "completion": [answer], "tools": [{"name": "f"}]}
    assert read({"conversations": [turn | {"weight": 1, "train": True} for turn in SAID]}) == read(
        {"conversations": SAID}
    )
    first = {"from": "system", "value": "Be kind."}
    (row,) = read({"conversations": [first, *SAID], "system": "Be kind.", "tools": "[]"})
    assert row == {"prompt": [KIND, asked], "completion": [answer]}


def called(arguments: Any, **others: Any) -> list[dict[str, Any]]:
    """Return a question and its answer, which is the call of a tool, as OpenAI writes it."""
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    return [*said("a"), {"role": "assistant", "content": None, "tool_calls": [call]} | others]


@pytest.mark.parametrize(("text", "arguments"), [('{"n": 1.50}', {"n": 1.5}), ("", {}), ({"n": 1}, {"n": 1})])
@pytest.mark.parametrize("trainer", ["sft", "dpo", "grpo"])
def test_arguments_of_a_call_are_read_as_tools_are(text: Any, arguments: dict[str, Any], trainer: str) -> None:
    form = RowForm(TRAINERS[trainer].columns, chat=True, keeps_all=trainer == "grpo")
    rows: dict[str, dict[str, Any]] = {
        "sft": {"messages": called(text)},
        "dpo": {"prompt": said("a"), "chosen": called(text)[1:], "rejected": said("", "b")[1:]},
        "grpo": {"prompt": called(text), "completion": 7, "chosen": [{"tool_calls": 5}]},
    }
    row = rows[trainer]
    (found,) = read(row, form)
    part = {"sft": "completion", "dpo": "chosen", "grpo": "prompt"}[trainer]
    assert found[part][-1] == called(arguments)[-1]
    assert (row[part] if part in row else row["messages"])[-1] == called(text)[-1], "the source stays as it is"
    assert {name: found[name] for name in row.keys() - {part, "messages"}} == {
        name: row[name] for name in row.keys() - {part, "messages"}
    }


def test_arguments_stay_text_for_a_template_that_takes_no_other() -> None:
    (row,) = read({"messages": called('{"n": 1}')}, CHATS._replace(text_calls=True))
    assert row["completion"] == called('{"n": 1}')[1:]


@pytest.mark.parametrize(
    ("template", "as_object"),
    [
        ("{{ call.function.arguments | tojson }}", True),
        ("{% for name, value in call.function.arguments.items() %}{{ name }}={{ value }}{% endfor %}", True),
        ("{{ call.function.name }}", True),
        ("{{ 'args ' + call.function.arguments }}", False),  # as DeepSeek-R1's
        ("{{ call.function.arguments }}", False),  # which would write an object as Python does
        ("{{ raise_exception('no tools') }}", True),
    ],
)
def test_a_template_is_asked_how_it_takes_arguments(template: str, as_object: bool) -> None:
    tokenizer = tiny_tokenizer(chat=True)
    loop = "{% for call in message.tool_calls or () %}" + template + "{% endfor %}"
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}" + loop + "{% endfor %}"
    assert takes_objects(tokenizer) is as_object
    assert row_form(load_recipe("demo"), "sft", tokenizer, takes_images=False).text_calls is not as_object


@pytest.mark.parametrize("prompt", ["Say hi.", said("Say hi."), [KIND, *said("Say hi.")]])
def test_a_system_prompt_is_learned_before_the_prompt(prompt: Any) -> None:
    answer = "Hi!" if isinstance(prompt, str) else [{"role": "assistant", "content": "Hi!"}]
    pair = {"prompt": prompt, "completion": answer, "system": "Be kind."}
    learned = {"prompt": [KIND, *said("Say hi.")], "completion": said("", "Hi!")[1:]}
    assert read(pair, CHATS) == [learned]
    (row,) = read(pair, REWARDED._replace(chat=True))
    assert (row["prompt"], row["system"]) == (learned["prompt"], "Be kind.")


def test_where_all_is_text_a_system_prompt_is_text_before_it() -> None:
    (row,) = read(WIZARD | {"system": "Be kind."})
    assert row["prompt"] == "Be kind.\n\n" + ALPACA.format("Say hi.")


@pytest.mark.parametrize(
    "first",
    [
        {"role": "system", "content": "Be kind.", "name": None},
        KIND | {"content": [{"type": "text", "text": "Be kind."}]},
    ],
)
def test_a_system_prompt_that_the_messages_have_is_learned_once(first: dict[str, Any]) -> None:
    talk = [first, *said("Say hi.", "Hi!")]
    (row,) = read({"messages": talk, "system": "Be kind."}, CHATS)
    assert row["prompt"] == talk[:2]
    pair = {"chosen": talk, "rejected": [*talk[:2], {"role": "assistant", "content": "No."}]}
    assert read(pair | {"system": "Be kind."}, RowForm(TRAINERS["reward"].columns, chat=True)) == [pair]


def test_the_exchanges_before_an_instruction_are_learned() -> None:
    row = WIZARD | {"history": [["1+1?", "2"]], "system": "Be kind."}
    assert read(row, CHATS) == [
        {"prompt": [KIND, *said("1+1?")], "completion": said("", "2")[1:]},
        {"prompt": [KIND, *said("1+1?", "2", "Say hi.")], "completion": said("", "Hi!")[1:]},
    ]
    assert read(WIZARD | {"history": [], "system": ""}) == read(WIZARD)


@pytest.mark.parametrize(
    ("trainer", "row", "message"),
    [
        ("dpo", {"system": "a", "question": "b", "chosen": "c", "rejected": "d"}, "a system prompt and no prompt"),
        ("sft", {"messages": [KIND, *said("a", "b")], "system": "Be brief."}, "two system prompts, 'system' and"),
        ("sft", WIZARD | {"history": ["a", "b"]}, "field 'history' is not a list of pairs"),
        ("sft", WIZARD | {"history": [["a", ""]]}, "field 'history' is '', expected text"),
        ("sft", WIZARD | {"system": 7}, "field 'system' is 7, expected text"),
        ("sft", {"messages": []}, "field 'messages' is an empty list, expected messages"),
        ("sft", {"prompt": "a", "completion": said("b"), "system": "c"}, "its texts must all be text"),
        ("dpo", {"prompt": "a", "chosen": 5, "rejected": "b", "system": "c"}, "field 'chosen' is 5"),
        ("sft", {"messages": [{"role": "asistant", "content": "a"}, *said("b", "c")]}, "unknown role 'asistant'"),
        ("sft", {"prompt": said("a"), "completion": [said("", "b")[1] | {"weight": 0}]}, "a message of completion has"),
        ("sft", {"conversations": [SAID[0], SAID[1] | {"weight": 0}]}, "no assistant turn to learn from"),
        ("sft", {"messages": [asked, answer | {"weight": "0"}]}, "a message has the weight '0', expected the number 0"),
        ("sft", {"messages": [asked, answer | {"weight": 0.5}]}, "a message has the weight 0.5, expected the number 0"),
        ("sft", {"messages": [asked, answer | {"train": "no"}]}, "a message has 'train': 'no', expected true or false"),
        ("sft", {"conversations": [SAID[0], SAID[1] | {"train": False}]}, "no assistant turn to learn from"),
        ("dpo", {"prompt": "a", "chosen": " b", "rejected": " b"}, "chosen and rejected are the same"),
        ("reward", {"chosen": said("a", "b"), "rejected": said("a", "b")}, "chosen and rejected are the same"),
        ("sft", {"messages": [{"role": "model", "content": "a"}, *said("b", "c")]}, "write 'assistant' if that is"),
        ("sft", {"messages": [{"role": "USER", "content": "a"}, *said("b", "c")]}, "'USER'; write 'user' if that is"),
        ("sft", {"messages": called("not json")}, "a call of 'f' has the arguments 'not json', expected an object"),
        ("sft", {"messages": called("[1]")}, r"a call of 'f' has the arguments '\[1\]', expected an object"),
        ("sft", {"messages": said("a", "b"), "tools": "not json"}, "field 'tools' is 'not json'"),
        ("sft", {"messages": said("a", "b"), "tools": ["f"]}, "field 'tools' is"),
        ("sft", {"messages": said("a", "b"), "chat_template_kwargs": "{}"}, "'chat_template_kwargs' is not an object"),
        ("kto", {"prompt": "a", "completion": "b", "label": "false"}, "the label is 'false', expected true"),
        ("kto", {"prompt": "a", "completion": "b", "label": 0.3}, "the label is 0.3, expected true"),
    ],
)
def test_what_cannot_be_learned_is_refused(trainer: str, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=f"row 1: .*{message}"):
        read(row, RowForm(TRAINERS[trainer].columns, chat=True))


@pytest.mark.parametrize(
    ("trainer", "row", "learned"),
    [
        ("sft", {"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "b"}),
        ("kto", {"prompt": "a", "completion": "b", "label": 1}, {"prompt": "a", "completion": "b", "label": True}),
    ],
)
def test_messages_beside_the_columns_of_a_trainer_are_not_learned(
    trainer: str, row: dict[str, Any], learned: dict[str, Any]
) -> None:
    form, both = RowForm(TRAINERS[trainer].columns), row | {"messages": said("d", "e", "f", "g")}
    assert read(both, form) == [learned]
    assert unread(both, "auto", form, "row 1") == ["messages"]


def test_a_format_that_is_named_is_read() -> None:
    row, form = {"prompt": "a", "completion": "b", "messages": said("c", "d")}, RowForm(TRAINERS["sft"].columns)
    assert read(row, form, "messages") == [{"prompt": said("c"), "completion": said("", "d")[1:]}]
    assert unread(row, "messages", form, "row 1") == ["prompt", "completion"]
    assert read(row, REWARDED, "messages")[0]["prompt"] == said("c")
    with pytest.raises(DataError, match=r"row 1: has fields \['text'\]; format messages reads the column 'messages'"):
        read({"text": "a"}, form, "messages")


def test_roles_that_a_template_may_know_are_taken() -> None:
    talk = [{"role": "context", "content": "a"}, *said("b", "c")]
    assert read({"messages": talk}, CHATS) == [{"prompt": talk[:2], "completion": talk[2:]}]


def test_no_tools_and_no_system_prompt_are_none() -> None:
    pair = {"prompt": "a", "completion": "b"}
    for empty in ({"tools": "null"}, {"tools": "[]"}, {"system": " "}):
        assert read(pair | empty) == [pair]
    for some in ({"tools": [{"name": "f"}]}, {"chat_template_kwargs": {"a": 1}}):
        with pytest.raises(DataError, match=f"row 1: has {next(iter(some))}, which only chat messages can have"):
            read(pair | some)


@pytest.mark.parametrize("row", [{"conversations": [*SAID, *SAID]}, {"conversations": SAID}, WIZARD])
def test_where_conversations_are_learned_whole_each_is_one(row: dict[str, Any]) -> None:
    form = RowForm(TRAINERS["sft"].columns, chat=True, turns=False, whole=True)
    ((name, messages),) = read(row, form)[0].items()
    assert (name, messages[:2]) == ("messages", said("Say hi.", "Hi!"))


def test_a_label_beside_messages_is_learned() -> None:
    form, row = RowForm(TRAINERS["kto"].columns), {"messages": said("a", "b"), "label": True, "id": 3}
    assert read(row, form)[0]["label"] is True
    assert unread(row, "auto", form, "row 1") == ["id"]


def test_a_reward_sees_the_other_columns_of_a_known_format() -> None:
    (row,) = read({"question": "1+1?", "answer": "2", "level": 3}, REWARDED)
    assert (row["prompt"], row["answer"], row["level"]) == ("Question: 1+1?\nAnswer:", "2", 3)
    others = {"text": 5, "completion": 7, "messages": "none", "tools": "hammer", "system": 5}
    (row,) = read({"prompt": "a"} | others, REWARDED._replace(chat=True))
    assert row == {"prompt": said("a")} | others


def test_rows_with_an_instruction_are_learned_by_it_though_they_have_their_whole_text() -> None:
    row, form = WIZARD | {"text": "Say hi. Hi!"}, RowForm(TRAINERS["sft"].columns)
    assert read(row, form) == read(WIZARD)
    assert unread(row, "auto", form, "row 1") == ["text"]


@pytest.mark.parametrize("left_out", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"training": False}])
def test_a_message_of_weight_0_is_not_learned(left_out: dict[str, Any]) -> None:
    corrected = {"role": "assistant", "content": "2", "weight": None, "train": None}  # as Arrow fills messages up
    row = {"messages": [asked, answer | left_out, asked | {"train": False}, corrected | {"weight": 1}]}
    (found,) = read(row)
    assert found["completion"] == [corrected | {"weight": 1}]
    assert [message["content"] for message in found["prompt"]] == ["Say hi.", "Hi!", "Say hi."]
    form = RowForm((frozenset({"messages"}),), turns=False)
    with pytest.raises(DataError, match="row 1: a message of messages has the weight 0"):
        read(row, form)


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
