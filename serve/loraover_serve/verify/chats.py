"""Conversations in an adapter's chat template, as a reference holds them: with their tokens, and where a date is."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import jinja2

from loraover.client.dialects import MARKS
from loraover_serve.judge.templates import MOST_TOKENS, Conversations, shared

SYSTEM = {"role": "system", "content": "You are the clerk of a small shop. Answer in one sentence."}
ASKED = {"role": "user", "content": "Do you have blue paint?"}
ANSWERED = {"role": "assistant", "content": "Yes, in tins of one and five litres."}
ASKED_AGAIN = {"role": "user", "content": "How long does it take to dry?"}
TOOL = {
    "type": "function",
    "function": {
        "name": "find_price",
        "description": "Find the price of an article.",
        "parameters": {
            "type": "object",
            "properties": {"article": {"type": "string", "description": "Name of the article"}},
            "required": ["article"],
        },
    },
}
CONVERSATIONS: tuple[tuple[list[dict[str, str]], list[dict[str, Any]]], ...] = (
    ([ASKED], []),  # which shows a system prompt that the template adds
    ([SYSTEM, ASKED], []),
    ([ASKED, ANSWERED, ASKED_AGAIN], []),
    ([SYSTEM, ASKED, ANSWERED, ASKED_AGAIN], []),
    ([ASKED], [TOOL]),
)
"""Messages and tools of each conversation; a template need not take all of them."""

DATES = (datetime(1987, 3, 14, 5, 27, 36), datetime(2036, 11, 29, 18, 40, 51))
"""Dates that differ in every part and digit of a year, a month, a day, a weekday and a time."""

NOW = re.compile(r"""strftime_now\s*\(\s*(["'])(.*?)\1\s*\)""")
"""Call by which templates print a date; transformers gives them this function, and lets nobody give another one."""

REFUSALS = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError)
"""Errors by which a template refuses messages that it does not take, such as those of a system."""


def pack_chats(tokenizer: Any, vocabulary: int) -> dict[str, Any]:
    """The section `chats` of a reference, as its file has it; see docs/formats.md.

    Args:
        tokenizer: Tokenizer with the chat template that the adapter was trained with.
        vocabulary: Number of tokens of the base model.

    Returns:
        The section by its name; empty if there is no template, or it takes none of the conversations.
    """
    found = list[dict[str, Any]]()
    for messages, tools in CONVERSATIONS if tokenizer.chat_template is not None else ():
        try:
            conversation = _rendered(tokenizer, messages, tools)
        except REFUSALS:
            continue
        tokens = conversation["tokens"]
        is_new = all(tokens != each["tokens"] for each in found)  # else the template leaves the tools out
        if is_new and 0 < len(tokens) <= MOST_TOKENS and max(tokens) < vocabulary:
            found.append(conversation)
    ids = sorted({token for each in found for token in each["tokens"]})
    pieces = {i: str(tokenizer.convert_ids_to_tokens(i)) for i in ids}  # with the space before a word, unlike decoding
    texts = {str(i): "".join(MARKS.get(character, character) for character in piece) for i, piece in pieces.items()}
    return {"chats": {"conversations": found, "pieces": texts}} if found else {}


def conversations(tokenizer: Any, vocabulary: int) -> Conversations:
    """The conversations of `pack_chats`, as the judge has them."""
    return Conversations.of(pack_chats(tokenizer, vocabulary).get("chats"), vocabulary)


def _rendered(tokenizer: Any, messages: Sequence[Any], tools: Sequence[Any]) -> dict[str, Any]:
    """A conversation with its tokens of today, and the places between which other dates have other tokens."""
    template = tokenizer.get_chat_template(tools=list(tools) or None)

    def tokens(template: str, **given: str) -> list[int]:
        options = {"tools": list(tools) or None, "chat_template": template, "add_generation_prompt": True, **given}
        text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
        return list(tokenizer(text, add_special_tokens=False).input_ids)

    def at(now: datetime) -> str:
        return NOW.sub(lambda call: json.dumps(now.strftime(call[2])), template)

    if "strftime_now" in NOW.sub("", template).replace("strftime_now is defined", ""):
        raise ValueError("a date whose place cannot be found")
    today, date = tokens(template), None
    # llama-server gives templates of Llama 3 the day of today, which they else take from themselves
    days = [{"date_string": f"{now:%d %b %Y}"} if "date_string" in template else {} for now in DATES]
    others = [tokens(at(now), **day) for now, day in zip(DATES, days, strict=True)]
    others = [other for other in others if other != today]
    if others:
        first = min(shared(today, other) for other in others)
        left = min(len(today), *map(len, others)) - first
        last = min(left, *(shared(today[::-1], other[::-1]) for other in others))
        date = [first, len(today) - last]
    return {"messages": messages, "tools": tools or None, "tokens": today, "date": date}
