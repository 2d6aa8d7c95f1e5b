"""Tokenizers of models in folders and GGUF files, compared by the ids of their tokens and their special tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from loraover.common.strict_json import read_json

PARTS = ("normalizer", "pre_tokenizer", "post_processor")
TEMPLATE = "chat_template.jinja"
FILE, CONFIG = "tokenizer.json", "tokenizer_config.json"
OTHER_FILES = ("tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
SPECIAL = ("bos_token", "eos_token")
NO_TOKENIZER = "no_vocab"
"""Kind of tokenizer that llama.cpp writes into a file without one."""


class _Model(BaseModel):
    model_config = ConfigDict(extra="allow")

    vocab: dict[str, int] | list[tuple[str, float]] = {}
    merges: list[Any] | None = None


class _Added(BaseModel):
    model_config = ConfigDict(extra="allow")

    id: int
    content: str


class _File(BaseModel):
    model_config = ConfigDict(extra="allow")

    model: _Model
    added_tokens: list[_Added] = []


class _TokenizerConfig(BaseModel):
    model_config = ConfigDict(extra="allow")


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer, in the form to which folders and GGUF files are both reduced.

    Args:
        origin: Where it is, in words.
        numbers: Id of each token.
        merges: Pairs of tokens that are joined, in order; None if they are not known.
        special: Special tokens by their roles, without roles that no token has.
        may_have_more: Whether its further tokens may only pad the vocabulary.
        parts: Other parts that change the tokens of a text, by their names, as far as they are known.
    """

    origin: str
    numbers: Mapping[str, int]
    merges: Sequence[str] | None
    special: Mapping[str, str]
    may_have_more: bool = False
    parts: Mapping[str, Any] = field(default_factory=dict)

    def other_parts(self, expected: Tokenizer) -> Iterator[str]:
        """Describe each part that differs from the tokenizer that this one should be."""
        for name in self.parts.keys() & expected.parts.keys():
            if self.parts[name] != expected.parts[name]:
                yield f"the effect of the {name} of {self.origin}, which differs from that of {expected.origin}"

    def differences(self, expected: Tokenizer) -> Iterator[str]:
        """Yield a sentence for each difference from the tokenizer that this one should be."""
        mine, theirs = self.numbers, expected.numbers
        kinds = {
            f"lacks {{}} tokens of {expected.origin}": [token for token in theirs if token not in mine],
            f"gives {{}} tokens other ids than {expected.origin}": [
                token for token, number in theirs.items() if mine.get(token, number) != number
            ],
            f"has {{}} tokens more than {expected.origin}": [
                token for token in mine if token not in theirs and not self.may_have_more
            ],
        }
        for text, tokens in kinds.items():
            if tokens:
                yield f"the tokenizer of {self.origin} {text.format(len(tokens))}, such as {tokens[0]!r:.40}"
        if None not in (self.merges, expected.merges) and self.merges != expected.merges:
            yield f"the tokenizer of {self.origin} has other merges than that of {expected.origin}"
        for role in SPECIAL:
            found, wanted = self.special.get(role), expected.special.get(role)
            if None not in (found, wanted) and found != wanted:
                yield f"the {role} of {self.origin} is {found!r:.40}, expected {wanted!r:.40}"


def in_folder(folder: Path, origin: str) -> Tokenizer | None:
    """Read the tokenizer in a folder; None if it holds no `tokenizer.json`."""
    if not (folder / FILE).is_file():
        return None
    found = read_json(folder / FILE, _File, finite=False)
    vocabulary = found.model.vocab
    numbers = dict(vocabulary) if isinstance(vocabulary, dict) else {t: k for k, (t, _) in enumerate(vocabulary)}
    numbers |= {token.content: token.id for token in found.added_tokens}
    merges = found.model.merges
    pairs = None if merges is None else [pair if isinstance(pair, str) else " ".join(pair) for pair in merges]
    special: dict[str, str] = {}
    extra = found.model_extra or {}
    parts = {name: extra.get(name) for name in PARTS} | {"chat template": None}
    if (folder / CONFIG).is_file():
        config = read_json(folder / CONFIG, _TokenizerConfig, finite=False).model_extra or {}
        for role in SPECIAL:
            value = config.get(role)
            value = value.get("content") if isinstance(value, dict) else value
            if isinstance(value, str):
                special[role] = value
        parts["chat template"] = config.get("chat_template")
    if (folder / TEMPLATE).is_file():
        parts["chat template"] = (folder / TEMPLATE).read_text(encoding="utf-8", errors="replace")
    return Tokenizer(origin, numbers, pairs, special, parts=parts)


def in_gguf(fields: Mapping[str, Any], origin: str) -> Tokenizer | None:
    """Return the tokenizer in the metadata of a GGUF file; None if it holds none."""
    tokens = fields.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or fields.get("tokenizer.ggml.model") == NO_TOKENIZER:
        return None
    special = {}
    for role in SPECIAL:
        number = fields.get(f"tokenizer.ggml.{role}_id")
        if isinstance(number, int) and number < len(tokens):
            special[role] = tokens[number]
    return Tokenizer(origin, {token: k for k, token in enumerate(tokens)}, None, special, may_have_more=True)


def has_other_form(folder: Path) -> bool:
    """Whether a folder holds a tokenizer in a form that is not read here."""
    return not (folder / FILE).is_file() and any((folder / name).is_file() for name in OTHER_FILES)
