"""Texts of tokens, for servers that take or name tokens by their texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from loraover.client.dialects import alone_with_text


def ids_by_text(tokenizer: Any) -> dict[str, int]:
    """Ids of the tokens whose text no other token has, in any of the spellings that servers use.

    Args:
        tokenizer: Tokenizer of the base model.
    """
    return alone_with_text(_spelled(tokenizer))


def _spelled(tokenizer: Any) -> Iterator[tuple[str, int]]:
    for index in range(len(tokenizer)):
        piece = str(tokenizer.convert_ids_to_tokens(index))
        for text in {tokenizer.decode([index]), piece, piece.replace("▁", " ")}:  # as sentencepiece has it
            yield text, index


def text_of(tokenizer: Any, tokens: Sequence[int]) -> str | None:
    """The text that a tokenizer turns into these tokens; None if there is none."""
    for skips in (True, False):  # special tokens, such as that at the beginning, which servers add
        text = str(tokenizer.decode(list(tokens), skip_special_tokens=skips))
        if text and tokenizer(text).input_ids == list(tokens):
            return text
    return None
