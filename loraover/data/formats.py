"""Formats of data sets, and their conversion into prompt and completion."""

from __future__ import annotations

import difflib
import json
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from itertools import cycle, pairwise
from typing import Any, NamedTuple

from loraover.common.errors import DataError
from loraover.data.glue import GLUE_TASKS, glue_reader
from loraover.data.pictures import CHATS, MEDIA, PARTS, PICTURES, has_media, has_others, placed, places

Row = dict[str, Any]

# Taori et al. 2023, Stanford Alpaca
ALPACA_TURN = "### Instruction:\n{}\n\n### Response:\n"
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    + ALPACA_TURN
)
SPEAKERS = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


ROLES = ("system", "developer", "user", "assistant", "tool")
"""Roles that most chat templates know; others are taken as they are, unless one of these seems to be meant."""
PAIRS = (frozenset({"prompt", "completion"}),)
TURNS = frozenset({"messages"})
TEXTS = frozenset({*CHATS, "text"})
"""Columns whose texts are learned."""
SYSTEM = "system"
"""Column whose text is learned before the prompt or the messages of a row."""


class RowForm(NamedTuple):
    """Rows that a trainer takes.

    Args:
        columns: Columns that a row has to have; one of these sets.
        chat: Whether to write text as chat messages, for a tokenizer with a chat template.
        turns: Whether each turn of the assistant in `messages` is one example, with all messages before it as prompt.
        whole: Whether a question and its answer are one conversation too, of which only the answer is learned.
        keeps_all: Whether columns that no trainer knows stay, for rewards that read them.
        pictures: Whether rows may hold images, in the form of `loraover.data.pictures`.
        text: Column of the source that becomes the column `text`.
        text_calls: Whether arguments of a tool's call stay JSON text, for a chat template that takes no objects.
    """

    columns: tuple[frozenset[str], ...] = PAIRS
    chat: bool = False
    turns: bool = True
    whole: bool = False
    keeps_all: bool = False
    pictures: bool = False
    text: str = "text"
    text_calls: bool = False


class RowFormat(NamedTuple):
    """Format of rows that TRL does not read itself.

    Args:
        read: Function that yields the prompt and completion, or the messages, of a row; its second argument is the
            row's place, for messages.
        fields: Fields by which the format is recognised; None means that it is used only by name.
        template: Template around a prompt of text that is not written as chat messages.
        reads: Fields that are learned; none where they are those that the trainer takes.
    """

    read: Callable[[Mapping[str, Any], str], Iterator[Row]]
    fields: frozenset[str] | None = None
    template: str = "{}"
    reads: tuple[str, ...] = ()


def read_row(row: Any, format: str, form: RowForm, where: str) -> Iterator[Row]:
    """Yield the examples of a row as a trainer takes them.

    Args:
        row: The row, as its source holds it.
        format: Key of `FORMATS`, or "auto" to recognise the format by the fields.
        form: What the trainer takes.
        where: Place of the row, for messages.

    Raises:
        DataError: The row does not fit the format or the trainer.
    """
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected an object, found {type(row).__name__}.")
    row = {name: value for name, value in row.items() if value is not None}
    if has_others(row) if form.pictures else has_media(row):
        raise DataError(
            f"{where}: holds images or other media, which this run cannot learn. A model that takes images learns them "
            f"with trainer sft, from the column {PICTURES[0]!r}; remove rows with other media."
        )
    name = _recognised(row, form, where) if format == "auto" else format
    row = {name: value for name, value in row.items() if name not in MEDIA or value}
    kept = {column for column in row if form.keeps_all and (name == PASSED or column != "prompt")} | {"images"}
    others = {column: row[column] for column in row if column in kept}
    for example in FORMATS[name].read(row, where):
        for column in ("prompt",) if form.keeps_all else CHATS:
            if isinstance(example.get(column), list):
                example[column] = [_read_message(message, form, where) for message in example[column]]
        is_whole = form.whole or (name == "conversations" and not form.turns)
        if name != PASSED and is_whole and "completion" in example and form.chat and TURNS in form.columns:
            chat = as_chat(example)  # one conversation, as longer ones of the same data are
            example = {column: value for column, value in example.items() if column not in PARTS}
            example["messages"] = chat["prompt"] + chat["completion"]
        yield from _examples(others | example, row.get(SYSTEM), FORMATS[name].template, form, where)


TRAINED = ("train", "training")
"""Keys of a message by which other tools leave a turn out, where they are false."""


def _read_message(message: Any, form: RowForm, where: str) -> Any:
    """Return a message with weight 0 if it is not to be learned, and with the arguments of its calls read from JSON."""
    if not isinstance(message, dict):
        return message
    for key in TRAINED:
        if message.get(key) not in (None, True, False):
            raise DataError(f"{where}: a message has {key!r}: {reprlib.repr(message[key])}, expected true or false.")
        if message.get(key) is False:
            message = message | {"weight": 0}
    if message.get("weight") not in (None, 0, 1):
        raise DataError(
            f"{where}: a message has the weight {reprlib.repr(message['weight'])}, expected the number 0 or 1: a turn "
            "is learned or not."
        )
    calls = message.get("tool_calls")
    if form.text_calls or not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        return message
    return message | {"tool_calls": [_with_object(call, where) for call in calls]}


def _with_object(call: Row, where: str) -> Row:
    if isinstance(call.get("function"), dict):
        return call | {"function": _with_object(call["function"], where)}
    given = call.get("arguments")
    if not isinstance(given, str):
        return call
    try:
        found = parse_json(given.strip() or "{}")
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise DataError(
            f"{where}: a call of {reprlib.repr(call.get('name'))} has the arguments {reprlib.repr(given)}, expected an "
            "object or its JSON text."
        )
    return call | {"arguments": found}


def parse_json(text: str | bytes) -> Any:
    """Return the value of a JSON text; ValueError if it is not JSON, or an object has a key twice."""
    from loraover.common.strict_json import unique_keys  # with pydantic, which is slow to import

    return json.loads(text, object_pairs_hook=unique_keys)


def unread(row: Mapping[str, Any], format: str, form: RowForm, where: str) -> list[str]:
    """Return the columns of a row that are not learned; the arguments are those of `read_row`."""
    if form.keeps_all:
        return []
    row = {column: value for column, value in row.items() if value is not None}
    name = _recognised(row, form, where) if format == "auto" else format
    found = row if name == PASSED else {column: value for column, value in row.items() if column not in PARTS}
    read = {*FORMATS[name].reads} or _taken(_matched(found, form) or TURNS.union(*form.columns) - {*PARTS})
    if FORMATS[name].reads or {"messages", "prompt", "chosen"} & read & row.keys():
        read.add(SYSTEM)
    return [column for column in row if column not in read.union(MEDIA)]


def _matched(row: Mapping[str, Any], form: RowForm) -> frozenset[str] | None:
    """Return the set of columns that a trainer needs and a row has."""
    return next((needed for needed in form.columns if needed <= row.keys()), None)


def _taken(columns: Set[str]) -> set[str]:
    """Return the columns that a trainer takes from a row, given those that it needs."""
    taken = {*columns, "images"}
    if columns & {*CHATS}:
        taken |= {"tools", "chat_template_kwargs"}
    return taken | {"prompt"} if "chosen" in columns else taken


def _examples(example: Row, system: Any, template: str, form: RowForm, where: str) -> Iterator[Row]:
    """Yield what a trainer takes of an example: its columns, checked, in chat messages where they are wanted."""
    columns = _matched(example, form)
    if "messages" in example and (columns is None or (columns == TURNS and form.turns)):
        if form.pictures:
            _field(example, "messages", where)
            example = placed(example, where)
        for turn in _turns(example, where):
            yield from _examples(turn, system, template, form, where)
        return
    if columns is None:
        raise DataError(f"{where}: has fields {sorted(example)}; expected {_spelt(form.columns)}.")
    taken = {name: example[name] for name in example if form.keeps_all or name in _taken(columns)}
    texts = {name: taken[name] for name in TEXTS & _taken(columns) & taken.keys()}
    _check_texts(texts, where)
    if columns >= {"completion", "label"}:
        if taken["label"] not in (0, 1):
            raise DataError(
                f"{where}: the label is {taken['label']!r}, expected true for a good completion and false for a bad "
                "one."
            )
        taken["label"] = bool(taken["label"])
    if columns >= {"text", "label"} and (type(taken["label"]) is not int or taken["label"] < 0):
        raise DataError(f"{where}: the label is {taken['label']!r}, expected a number from 0 on; number the classes.")
    if not form.keeps_all:
        _check_options(taken, where)
    if isinstance(texts.get("prompt"), str):
        taken |= as_chat(texts) if form.chat else {"prompt": template.format(texts["prompt"])}
    options = [name for name in ("tools", "chat_template_kwargs") if taken.get(name) and not form.keeps_all]
    if options and all(isinstance(taken[name], str) for name in texts):
        raise DataError(
            f"{where}: has {options[0]}, which only chat messages can have; this run learns the row as text."
        )
    is_said = isinstance(system, str) or not form.keeps_all  # a column of a reward may be anything
    if is_said and system not in (None, "") and str(system).strip() and {*CHATS} & columns:
        taken = _after(_text({SYSTEM: system}, SYSTEM, where), taken, where)
    yield placed(taken, where) if form.pictures else taken


def _after(system: str, example: Row, where: str) -> Row:
    """Put a system prompt before the prompt or the messages of an example."""
    part = next(name for name in ("messages", "prompt", "chosen") if name in example)
    start = example[part]
    if isinstance(start, list) and start[0]["role"] == "system":
        if _texts_of(start[0]) == system.strip():
            return example
        raise DataError(f"{where}: has two system prompts, {SYSTEM!r} and the first of its messages; remove one.")
    if part == "chosen":
        raise DataError(f"{where}: has a system prompt and no prompt; call the column of the questions 'prompt'.")
    said = f"{system}\n\n" if isinstance(start, str) else [{"role": "system", "content": system}]
    return example | {part: said + start}


def _texts_of(message: Row) -> str:
    content = message.get("content") or ""
    return (content if isinstance(content, str) else "".join(part.get("text") or "" for part in content)).strip()


def _says(message: Row) -> str:
    """Return a text that is empty if a message says nothing: a call of a tool counts, and so does an image."""
    return _texts_of(message) or str(message.get("tool_calls") or places([message]) or "")


def said(turns: list[Any]) -> str | None:
    """Return the texts of all turns of a conversation, one a line; None if the value is not a list of turns."""
    try:
        return "\n".join(turn["value"] if "value" in turn else _texts_of(turn) for turn in turns)
    except (TypeError, AttributeError):
        return None


def _check_texts(taken: Row, where: str) -> None:
    """Raise DataError for texts or messages that nothing can be learned from, or that are not alike."""
    for name, part in taken.items():
        _field(taken, name, where)
        said = [part] if isinstance(part, str) else map(_says, part)
        if not any(text.strip() for text in said):
            raise DataError(f"{where}: the {name} is empty; leave such rows out with data.keep.")
        _check_roles([] if isinstance(part, str) else part, where)
    if len({type(taken[name]) for name in PARTS if name in taken}) > 1:
        raise DataError(f"{where}: its texts must all be text or all be chat messages, such as prompt and completion.")
    if "chosen" in taken and taken["chosen"] == taken.get("rejected"):
        raise DataError(f"{where}: chosen and rejected are the same, so nothing is preferred; remove such rows.")
    for name in taken.keys() - {"prompt"}:
        if isinstance(taken[name], list) and any(message.get("weight") == 0 for message in taken[name]):
            raise DataError(
                f"{where}: a message of {name} has the weight 0, but this run would learn all messages. Remove the "
                "message, or learn "
                "the turns of messages one by one, without training.assistant_only_loss."
            )


def _check_roles(messages: Sequence[Row], where: str) -> None:
    """Raise DataError for a role that no template knows, and that seems to mean one which templates know."""
    for role in {message["role"] for message in messages}.difference(ROLES):
        near = difflib.get_close_matches(MEANT.get(role.lower(), role.lower()), ROLES, n=1, cutoff=0.8)
        if near:
            raise DataError(f"{where}: unknown role {reprlib.repr(role)}; write {near[0]!r} if that is meant.")


MEANT = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant", "ai": "assistant"}
"""Roles by the names that other forms of chats give them."""


def _check_options(taken: Row, where: str) -> None:
    """Check what a row gives its chat template; parse tools that are written as JSON, and drop an empty list."""
    if "tools" in taken:
        value = taken.pop("tools")
        try:
            tools = parse_json(value or "[]") if isinstance(value, str) else value
        except ValueError:
            tools = value
        if not isinstance(tools or [], list) or not all(isinstance(tool, dict) for tool in tools or ()):
            raise DataError(f"{where}: field 'tools' is {reprlib.repr(value)}, expected a list of objects.")
        if tools:
            taken["tools"] = tools
    if not isinstance(taken.get("chat_template_kwargs", {}), dict):
        raise DataError(f"{where}: field 'chat_template_kwargs' is not an object.")


def _spelt(columns: Iterable[frozenset[str]]) -> str:
    return " or ".join(str(sorted(names)) for names in columns)


def as_chat(example: Row) -> Row:
    """Write a prompt of text as the user's message, and each answer as the assistant's, without a space before it."""
    answers = {name: example[name] for name in ("completion", "chosen", "rejected") if name in example}
    asked = {"prompt": [{"role": "user", "content": example["prompt"]}]} if "prompt" in example else {}
    said = {name: text[1:] if text[0] == " " and not text[1].isspace() else text for name, text in answers.items()}
    return example | asked | {name: [{"role": "assistant", "content": text}] for name, text in said.items()}


def _recognised(row: Mapping[str, Any], form: RowForm, where: str) -> str:
    known = {name: format.fields for name, format in FORMATS.items() if format.fields is not None}
    found = next((name for name, fields in known.items() if fields <= row.keys()), PASSED)
    matched = _matched(row, form)
    if matched is not None and (matched != {"text"} or found == PASSED):  # Alpaca's rows have their whole text, too
        return PASSED
    if found != PASSED:
        return found
    named = " or ".join(f"{sorted(fields)} ({name})" for name, fields in known.items())
    raise DataError(f"{where}: has fields {sorted(row)}; expected {_spelt(form.columns)} or {named}.")


def _messages(row: Mapping[str, Any], where: str) -> Iterator[Row]:
    if "messages" not in row:
        raise DataError(f"{where}: has fields {sorted(row)}; format messages reads the column 'messages'.")
    yield {name: value for name, value in row.items() if name not in PARTS}


def _turns(row: Mapping[str, Any], where: str) -> Iterator[Row]:
    """Yield one example per assistant turn whose weight is not 0, with all messages before it as its prompt."""
    messages = _field(row, "messages", where)
    if isinstance(messages, str):
        raise DataError(f"{where}: messages is text, expected a list of objects with role and content.")
    _check_roles(messages, where)
    turns = [i for i, one in enumerate(messages) if one["role"] == "assistant" and i > 0 and one.get("weight") != 0]
    if not turns:
        raise DataError(f"{where}: messages holds no assistant turn to learn from.")
    others = {name: value for name, value in row.items() if name != "messages"}
    for i in turns:
        seen = {"images": row["images"][: places(messages[:i])]} if "images" in row else {}
        yield others | seen | {"prompt": messages[:i], "completion": [messages[i]]}


def _conversations(row: Mapping[str, Any], where: str) -> Iterator[Row]:
    """Yield text for one question and its answer, and messages for a longer conversation."""
    turns = row.get("conversations")
    if not isinstance(turns, list) or not all(isinstance(t, dict) and {"from", "value"} <= t.keys() for t in turns):
        raise DataError(f"{where}: field 'conversations' is not a list of objects with from and value.")
    if unknown := [turn["from"] for turn in turns if turn["from"] not in SPEAKERS]:
        raise DataError(f"{where}: unknown speaker {reprlib.repr(unknown[0])}, expected one of {', '.join(SPEAKERS)}.")
    weights = [{key: turn[key] for key in ("weight", *TRAINED) if turn.get(key) not in (None, 1)} for turn in turns]
    messages = [
        {"role": SPEAKERS[turn["from"]], "content": _field(turn, "value", where), **weight}
        for turn, weight in zip(turns, weights, strict=True)
    ]
    tools = {"tools": row["tools"]} if row.get("tools") not in (None, "", "[]", []) else {}
    if [message["role"] for message in messages] == ["user", "assistant"] and not tools and not any(weights):
        yield {"prompt": messages[0]["content"], "completion": messages[1]["content"]}
    else:
        yield {"messages": messages, **tools}


def _instruction(row: Mapping[str, Any], where: str) -> Iterator[Row]:
    """Yield text for an instruction and its output, and messages where earlier exchanges stand before them."""
    prompt, answer, history = _text(row, "instruction", where), _text(row, "output", where), row.get("history") or []
    if row.get("input"):
        prompt += f"\n\n### Input:\n{_text(row, 'input', where)}"
    if not history:
        yield {"prompt": prompt, "completion": answer}
        return
    if not isinstance(history, list) or not all(isinstance(one, list) and len(one) == 2 for one in history):
        raise DataError(f"{where}: field 'history' is not a list of pairs, an instruction and its output.")
    said = [_text({"history": text}, "history", where) for pair in [*history, (prompt, answer)] for text in pair]
    yield {"messages": [{"role": role, "content": text} for role, text in zip(cycle(("user", "assistant")), said)]}


def _gsm8k(row: Mapping[str, Any], where: str) -> Iterator[Row]:
    question, answer = _field(row, "question", where), _field(row, "answer", where)
    yield {"prompt": f"Question: {question}\nAnswer:", "completion": f" {answer}"}


def _metamath(row: Mapping[str, Any], where: str) -> Iterator[Row]:
    """Yield a question as in `gsm8k`, and its answer without the repetition "The answer is: 42" at its end."""
    answer = _text(row, "response", where).partition("\nThe answer is:")[0]
    yield {"prompt": f"Question: {_text(row, 'query', where)}\nAnswer:", "completion": f" {answer}"}


def _codefeedback(row: Mapping[str, Any], where: str) -> Iterator[Row]:
    """Yield the answer up to the end of its first block of code."""
    before, fence, rest = _text(row, "answer", where).partition("```")
    if not fence:
        raise DataError(f"{where}: field 'answer' holds no block of code; leave such rows out with data.keep.")
    yield {"prompt": _text(row, "query", where), "completion": before + fence + rest.partition("```")[0] + fence}


PASSED = "trl"
FORMATS: dict[str, RowFormat] = {
    PASSED: RowFormat(lambda row, where: iter([dict(row)])),
    "messages": RowFormat(_messages, frozenset({"messages"})),
    "gsm8k": RowFormat(_gsm8k, frozenset({"question", "answer"}), reads=("question", "answer")),
    "instruction": RowFormat(
        _instruction, frozenset({"instruction", "output"}), ALPACA, reads=("instruction", "input", "output", "history")
    ),
    "conversations": RowFormat(_conversations, frozenset({"conversations"}), ALPACA, reads=("conversations", "tools")),
    "metamath": RowFormat(_metamath, reads=("query", "response")),
    "codefeedback": RowFormat(_codefeedback, template=ALPACA, reads=("query", "answer")),
    **{f"glue-{name}": RowFormat(glue_reader(t), reads=(*t.columns, "label")) for name, t in GLUE_TASKS.items()},
}


def _text(row: Mapping[str, Any], name: str, where: str) -> str:
    value = _field(row, name, where)
    if not isinstance(value, str):
        raise DataError(f"{where}: field {name!r} is a list, expected text.")
    return value


def _field(row: Mapping[str, Any], name: str, where: str) -> Any:
    value = row.get(name)
    if not isinstance(value, str | list) or not value or (isinstance(value, str) and not value.strip()):
        wrong = "is an empty list, expected messages" if value == [] else f"is {reprlib.repr(value)}, expected text"
        raise DataError(f"{where}: field {name!r} {wrong}.")
    if isinstance(value, list) and not all(map(_is_message, value)):
        raise DataError(f"{where}: field {name!r} is not a list of objects with role and content, both text.")
    check_encodes(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str), name, where)
    return value


def _is_message(value: Any) -> bool:
    """Whether a value is a chat message: a role, with text, parts such as images, or calls of tools."""
    if not isinstance(value, dict) or not isinstance(value.get("role"), str):
        return False
    content = value.get("content")
    is_parts = isinstance(content, list) and all(isinstance(part, dict) and "type" in part for part in content)
    return isinstance(content, str) or is_parts or ("content" in value and content is None) or "tool_calls" in value


def check_encodes(text: str, name: str, where: str) -> None:
    """Raise DataError if a text holds half a character (a lone surrogate, from an escape in JSON)."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start]
        raise DataError(
            f"{where}: field {name!r} holds the lone surrogate {half!a}; correct or leave out the row."
        ) from error


def later_turn(rows: Sequence[Row]) -> int | None:
    """Return the index of the first example that is a later turn of the conversation before it, or None."""
    for i, (one, following) in enumerate(pairwise(rows), 1):
        if {"prompt", "completion"} <= one.keys() & following.keys():
            messages = [*one["prompt"], *one["completion"]]
            if list(following["prompt"][: len(messages)]) == messages:
                return i
    return None
