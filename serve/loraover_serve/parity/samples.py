"""The arms that a parity run compares, the requests that every arm answers, and the answers of one engine."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraover.adapters.prompts import prompt_lines
from loraover.common.errors import DataError
from loraover_serve.engines.base import Sample, TokenRequest

VANILLA, CONTROL, FOLDED = "vanilla", "control", "folded"
"""Names of the arms beside the base model: a plain LoRA (the baseline), a copy of that LoRA, and the folded adapter."""

SWITCHING, MIXED = "switching", "mixed"
"""Names of the arms that several adapters answer: one after the other, and together in one batch."""
ALSO = "adapter{}"
"""Name under which an engine has each further adapter."""
TEXT = (
    "The train leaves at nine and arrives at noon, so the journey takes three hours. A farmer has 17 sheep and buys 25 "
    "more; two of them are lost on the way home. Water boils at a lower temperature on a mountain because the air "
    "pressure is lower, and so an egg takes longer there. Please find the minutes of Tuesday's meeting below. "
)
SPREAD = 0.5  # standard deviation of the logarithms of a mixed workload's lengths


@dataclass(frozen=True)
class Measurement:
    """Answers of one engine at one concurrency.

    Args:
        engine: Name of the engine.
        concurrency: Number of simultaneous requests.
        blocks: Number of complete blocks.
        samples: Answers of the complete blocks, without warm-up.
        failure: Reason why the measurement ended early; None if it did not.
        waves: Number of waves of simultaneous requests that an arm answers in a row.
    """

    engine: str
    concurrency: int
    blocks: int
    samples: tuple[Sample, ...]
    failure: str | None = None
    waves: int = 1


def make_requests(
    kind: str,
    tokenizer: Any,
    count: int,
    *,
    prompt_tokens: int,
    new_tokens: int,
    seed: int,
    file: Path | None = None,
) -> list[TokenRequest]:
    """Requests, which every arm answers alike.

    Args:
        kind: "fixed" for one length of prompts and answers, "mixed" for log-normal lengths, as real traffic has them,
            or "file" for the prompts of a file, in order and from the start again.
        tokenizer: Tokenizer of the base model.
        count: Number of requests.
        prompt_tokens: Length of a prompt, in tokens; the median if `kind` is "mixed".
        new_tokens: Length of an answer, in tokens; the median if `kind` is "mixed".
        seed: Seed of the lengths.
        file: UTF-8 text file with one prompt in each line, if `kind` is "file".

    Raises:
        DataError: A file that cannot be read or holds no prompt.
    """
    if file is not None:
        prompts = [prompt for line in prompt_lines(file) if (prompt := tuple(tokenizer(line).input_ids))]
        if not prompts:
            raise DataError(f"{file}: the file has no prompt; expected one in each line.")
        return [TokenRequest(prompts[i % len(prompts)], new_tokens) for i in range(count)]
    ids: list[int] = list(tokenizer(TEXT, add_special_tokens=False).input_ids)
    stream = ids * ((count + 8 * prompt_tokens) // len(ids) + 2)
    draw = random.Random(seed)
    requests = []
    for i in range(count):
        lengths = [prompt_tokens, new_tokens]
        if kind == "mixed":
            lengths = [max(2, round(length * draw.lognormvariate(0, SPREAD))) for length in lengths]
            lengths[0] = min(lengths[0], 8 * prompt_tokens)
        requests.append(TokenRequest(tuple(stream[i : i + lengths[0]]), lengths[1]))
    return requests
