"""Prompts on which two models are compared, and a model's logits on them, in pieces that memory can hold."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loraover.common.errors import ConfigError, DataError
from loraover.common.reporter import Reporter
from loraover.models.load import ModelSource, load_config, load_tokenizer

MAX_TOKENS = 256
SEQUENCE = 32
"""Number of tokens in a prompt that is made without a text."""

BUILT_IN_PROMPTS = (
    "The train leaves at nine and arrives at noon, so the journey takes three hours.",
    "A farmer has 17 sheep and buys 25 more. How many sheep are there now?",
    "def is_even(number):\n    return number % 2 == 0\n",
    "Water boils at a lower temperature on a mountain because the air pressure is lower.",
    "Dear all,\nplease find the minutes of Tuesday's meeting below.",
    "Question: which planet is closest to the sun?\nAnswer: Mercury.",
    "Der Zug fährt um neun Uhr ab. Le train part à neuf heures.",
    "1, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89",
)


@dataclass(frozen=True)
class Prompts:
    """Token ids to compare outputs on.

    Args:
        batches: Token ids, each of shape (prompts, tokens).
        source: Origin of the prompts, in words.
        cut: Number of prompts of which only the first tokens are used.
    """

    batches: tuple[Tensor, ...]
    source: str
    cut: int = 0

    @property
    def tokens(self) -> int:
        """Number of tokens in all prompts."""
        return sum(ids.numel() for ids in self.batches)


def read_prompts(
    source: ModelSource,
    file: Path | None = None,
    *,
    at_once: int = 1,
    longest: int = MAX_TOKENS,
    tokens: Iterable[int] = (),
) -> Prompts:
    """Return token ids: of a file's lines, of a built-in set, or at random if the model has no tokenizer.

    Tokens that are asked for and that none of these contain make further prompts, whose only tokens they are.

    Args:
        source: The base model, with its tokenizer.
        file: Text file with one prompt a line; None means a built-in set.
        at_once: Largest number of tokens in a batch of several prompts of one length.
        longest: Number of tokens to which longer prompts are cut.
        tokens: Ids of tokens that the prompts have to contain.

    Raises:
        DataError: No usable prompt in the file.
        ConfigError: A file of prompts for a model without a tokenizer.
    """
    lines, name = list(BUILT_IN_PROMPTS), "the built-in prompts"
    if file is not None:
        lines = prompt_lines(file)
        name = f"the prompts of {file.name}"
    try:
        tokenizer = load_tokenizer(source)
        encoded = [tokenizer(line, return_tensors="pt").input_ids for line in lines]
    except ConfigError:
        if file is not None:
            raise
        encoded = []
    fewest = 1 if file is not None else 2  # transformers makes tokenizers without a vocabulary for some classes
    prompts = [ids[:, :longest] for ids in encoded if ids.numel() >= fewest]
    if prompts:
        cut = sum(ids.numel() > longest for ids in encoded)
        shown = f", {cut} of them cut to their first {longest} tokens" if cut else ""
        return _prompts(prompts, f"{len(prompts)} of {name}{shown}", cut, tokens, min(SEQUENCE, longest), at_once)
    if file is not None:
        raise DataError(f"{file}: holds no prompt; expected one a line.")
    vocabulary = load_config(source).get_text_config().vocab_size
    ids = torch.randint(vocabulary, (8, SEQUENCE), generator=torch.Generator().manual_seed(0))[:, :longest]
    name = "8 random token sequences (the base model has no tokenizer)"
    return _prompts(list(torch.split(ids, 1)), name, 0, tokens, min(SEQUENCE, longest), at_once)


def prompt_lines(file: Path) -> list[str]:
    """Return the lines of a UTF-8 text file that are not blank; nothing but a line break ends a line."""
    try:
        return [line for line in file.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read as UTF-8 text: {error}.") from error


def _prompts(
    prompts: Sequence[Tensor], name: str, cut: int, tokens: Iterable[int], length: int, at_once: int
) -> Prompts:
    """Return prompts in batches, with further ones of at most `length` tokens for those that they lack."""
    found = {token for ids in prompts for token in ids.flatten().tolist()}
    lacking = torch.tensor(sorted({*tokens} - found), dtype=torch.long)
    more = [ids[None] for ids in torch.split(lacking, length) if ids.numel()]
    shown = f", and {lacking.numel()} trained tokens that they lack" if more else ""
    by_length: dict[int, list[Tensor]] = {}  # prompts of one length run together, so that nothing is padded
    for ids in (*prompts, *more):
        by_length.setdefault(ids.shape[1], []).append(ids)
    batches = (
        torch.split(torch.cat(alike), max(1, at_once // found_length)) for found_length, alike in by_length.items()
    )
    return Prompts(tuple(chain.from_iterable(batches)), name + shown, cut)


LOGITS_AT_ONCE = {"cpu": 2**24, "cuda": 2**27, "mps": 2**26}
"""Logits of what runs at once, by device: 64 MiB in float32 on the CPU. At most four such pieces are held."""


def tokens_at_once(config: Any, device: torch.device, task_type: str | None = None) -> int:
    """Tokens whose logits may be held at once, from a model's configuration.

    A classifier without a padding token gets 1, so that each prompt runs alone: it finds the last token by the padding.
    """
    if task_type == "SEQ_CLS" and config.pad_token_id is None:
        return 1
    vocabulary: int = config.get_text_config().vocab_size
    return max(1, LOGITS_AT_ONCE[device.type] // vocabulary)


def pieces(model: Any, ids: Tensor) -> Iterator[Tensor | None]:
    """Positions whose logits are compared together, at most LOGITS_AT_ONCE elements; None means all.

    Each piece costs a forward pass over the entire prompt. Models that cannot leave logits out take all at once.
    """
    at_once = tokens_at_once(model.config, model.device)
    if ids.numel() <= at_once or "logits_to_keep" not in inspect.signature(model.forward).parameters:
        yield None
        return
    yield from torch.split(torch.arange(ids.shape[1], device=model.device), at_once)


@contextmanager
def walked(
    prompts: Prompts, model: Any, work: str, report: Reporter
) -> Iterator[Iterator[tuple[Tensor, Tensor | None]]]:
    """Walk over prompts on a model's device, with the positions of `pieces`, and report how many tokens are done."""
    with report.task(f"running {work} on {prompts.source}, tokens", prompts.tokens) as advance:

        def steps() -> Iterator[tuple[Tensor, Tensor | None]]:
            done = 0
            for batch in prompts.batches:
                ids = batch.to(model.device)
                for positions in pieces(model, batch):
                    yield ids, positions
                    done += ids.numel() if positions is None else len(positions)
                    advance(done)

        yield steps()


@torch.no_grad()
def logits_of(model: Any, ids: Tensor, positions: Tensor | None) -> Tensor:
    """Logits of prompts of one length, (positions, vocabulary)."""
    extra: dict[str, Tensor] = {}
    if model.config.is_encoder_decoder:
        extra["decoder_input_ids"] = ids
    if positions is not None:
        extra["logits_to_keep"] = positions
    logits: Tensor = model(input_ids=ids, **extra).logits
    return logits.reshape(-1, logits.shape[-1])
