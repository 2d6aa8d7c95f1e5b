"""Texts of training examples, as their trainer gives them to the tokenizer: chat messages through the chat template."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2

from loraover.common.errors import ConfigError, DataError
from loraover.common.paths import kind_of
from loraover.data.formats import Row
from loraover.data.sources import BadRows, Rows
from loraover.training.recipe import Recipe


def answers(row: Row) -> list[str | None]:
    """Return the columns with an example's answers; None if the example is a prompt alone."""
    return [name for name in ("completion", "chosen", "rejected", "messages", "text") if name in row] or [None]


def is_chat(row: Row) -> bool:
    """Whether any part of an example is chat messages."""
    return not all(isinstance(row[part], str) for part in (*filter(None, answers(row)), *({"prompt"} & row.keys())))


def spelt(row: Row, part: str | None, reads: Any) -> str:
    """Return the text of a prompt, with one of its answers unless that is None."""
    pieces = [row[name] for name in ("prompt", part) if name is not None and name in row]
    if all(isinstance(piece, str) for piece in pieces):
        return "".join(pieces)
    options = {"tools": row.get("tools"), **row.get("chat_template_kwargs", {})}
    messages = []
    for message in (message for piece in pieces for message in piece):
        content = message.get("content")
        if isinstance(content, list) and any(part["type"] == "image" for part in content):
            content = [part for part in content if part["type"] != "image"]  # whose tokens `picture_tokens` counts
            message = message | {"content": content or [{"type": "text", "text": ""}]}
        messages.append(message)
    text: str = reads.apply_chat_template(messages, tokenize=False, add_generation_prompt=part is None, **options)
    return text


def own_template(recipe: Recipe) -> str | None:
    """Return the chat template that a recipe names in place of its model's; None if it names none."""
    named = recipe.training.chat_template_path
    if named is None:
        return None
    path = Path(named)
    if path.suffix not in (".jinja", ".j2") or kind_of(path) != "file":
        raise ConfigError(
            f"training.chat_template_path is {named!r}, expected a file on this machine that ends in .jinja or .j2. To "
            "use another model's template, write that model's tokenizer.chat_template into a file; it must not need "
            "tokens that this model lacks."
        )
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"training.chat_template_path: {path} cannot be read: {error}") from error


def with_template(recipe: Recipe, reads: Any) -> Any:
    """Return a tokenizer or a processor with the chat template that a recipe names."""
    if (template := own_template(recipe)) is not None:
        reads.chat_template = template
    return reads


REFUSALS = (jinja2.TemplateError, TypeError, ValueError)
"""Errors that a chat template raises for messages that it does not expect."""


def learned(rows: Rows, name: str) -> Rows:
    """Return rows without the columns that `grpo` keeps for its rewards; other trainers keep none."""
    return rows if name != "grpo" else replace(rows, rows=[{"prompt": row["prompt"]} for row in rows.rows])


def checked(row: Row, part: str | None, reads: Any, where: str) -> str:
    """Return the text as `spelt` does, or raise DataError that names the row whose messages the template refuses."""
    try:
        return spelt(row, part, reads)
    except REFUSALS as error:
        raise DataError(f"{where}: the model's chat template refuses it: {error}") from error


def whole_texts(rows: Rows, reads: Any, bad: BadRows) -> list[list[str]]:
    """Return the texts of each example, one for each of its answers."""
    found = []
    for i, row in enumerate(rows.rows):
        where, parts = rows.place(i), answers(row)
        found.append([""] * len(parts))
        with bad.of(rows.number(i), i):
            texts = [checked(row, part, reads, where) for part in parts]
            for part, text in zip(parts, texts, strict=True) if is_chat(row) else ():
                for kind, other in _changed(row, part, text):
                    if _text_or_none(other, part, reads) == text:
                        raise DataError(f"{where} has {kind}, which the model's chat template leaves out; remove it.")
            found[-1] = texts
    return found


CALLED = {"query": "lora"}


def takes_objects(reads: Any) -> bool:
    """Whether a chat template writes the arguments of a tool's call that are an object; a few take JSON text alone."""

    def said(arguments: Any) -> str | None:
        call = {"id": "call00001", "type": "function", "function": {"name": "find", "arguments": arguments}}
        asked, answer = {"role": "user", "content": "?"}, {"role": "assistant", "content": "", "tool_calls": [call]}
        return _text_or_none({"messages": [asked, answer]}, "messages", reads)

    as_object = said(CALLED)
    return said(json.dumps(CALLED)) is None or (as_object is not None and str(CALLED) not in as_object)


def _text_or_none(row: Row, part: str | None, reads: Any) -> str | None:
    try:
        return spelt(row, part, reads)
    except REFUSALS:
        return None


def _changed(row: Row, part: str | None, text: str) -> Iterator[tuple[str, Row]]:
    """Yield each part of a row that its text may lack, with the row as it is after a change of that part."""
    if row.get("tools"):
        yield "a column 'tools'", row | {"tools": None}
    names = [name for name in ("prompt", part) if name is not None and name in row]
    said = [(name, k, message) for name in names for k, message in enumerate(row[name])]
    for name, k, message in said:
        others = " ".join(str(one.get("content")) for _, _, one in said if one is not message)
        for kind, other in _otherwise(message, text, others):
            yield kind, row | {name: [*row[name][:k], other, *row[name][k + 1 :]]}


def _otherwise(message: Row, text: str, others: str) -> Iterator[tuple[str, Row]]:
    """Yield each part of a message that a template may leave out: its name, and the message with that part changed."""
    calls = message.get("tool_calls") or ()
    for k in range(len(calls)):
        yield "a call of a tool", message | {"tool_calls": [*calls[:k], *calls[k + 1 :]] or None}
    role, content = message["role"], message.get("content")
    if role in ("user", "assistant") or not content:
        return
    if not (isinstance(content, str) and len(content) >= SURE and content.strip() in text and content not in others):
        yield f"a message of the role {role!r}", message | {"content": "another"}


SURE = 16
"""Characters of a message that, if they stand in a text, come from this message."""
