"""Measures of a language model on held-out examples."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from inspect import signature
from typing import Any, Literal, NamedTuple

import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy

from loraover.training.final_number import final_number
from loraover.training.generation import greedy_answers


def exact_match(
    model: Any,
    tokenizer: Any,
    rows: Sequence[dict[str, Any]],
    *,
    max_new_tokens: int,
    batch_size: int,
    answer: Literal["number", "text"] = "number",
    on_batch: Callable[[int], None] = lambda done: None,
) -> float:
    """Share of examples whose greedily generated answer equals the reference.

    Args:
        model: A causal model or an encoder-decoder.
        tokenizer: Its tokenizer.
        rows: Examples with `prompt` and `completion`, each a text or chat messages.
        max_new_tokens: Largest number of tokens in an answer.
        batch_size: Number of examples generated together, left-padded.
        answer: What is compared: the final number, or the text without white space around it.
        on_batch: Called with the number of examples that are done.

    Returns:
        A share from 0 to 1; 0 without examples. Where numbers are compared, an answer without one is wrong.
    """
    if not rows:
        return 0.0
    answers = greedy_answers(
        model,
        tokenizer,
        [row["prompt"] for row in rows],
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        on_batch=on_batch,
    )
    read: Callable[[str], object] = final_number if answer == "number" else str.strip
    found = [read(text) for text in answers]
    wanted = [read(_content(row["completion"])) for row in rows]
    return sum(one is not None and one == other for one, other in zip(found, wanted, strict=True)) / len(rows)


def any_number(rows: Iterable[dict[str, Any]]) -> bool:
    """Whether the completion of any example has a number to compare.

    Args:
        rows: Examples with `completion`, each a text or chat messages.
    """
    return any(final_number(_content(row["completion"])) is not None for row in rows)


class Scored(NamedTuple):
    """Negative log-likelihood of one completion, in nats, and its number of tokens."""

    nats: float
    tokens: int


@torch.no_grad()
def example_losses(
    model: Any, batches: Iterable[dict[str, Any]], on_batch: Callable[[int], None] = lambda done: None
) -> list[Scored]:
    """Loss of each example on its completion, in order.

    Args:
        model: A causal model or an encoder-decoder.
        batches: Collated batches, whose `labels` are -100 where a token does not count.
        on_batch: Called with the number of examples that are done.
    """
    was_training = model.training
    model.eval()
    is_causal = not model.config.is_encoder_decoder
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    may_keep = is_causal and "logits_to_keep" in signature(inner.forward).parameters
    found = []
    for batch in batches:
        labels = batch["labels"][:, is_causal:]  # a causal model does not predict its first label
        # Given labels, a causal model under TRL 1.9 returns no logits; an encoder-decoder makes its input of them.
        inputs = {name: value for name, value in batch.items() if name != "labels"} if is_causal else batch
        counts = labels != -100
        if may_keep and counts.any():  # else the logits of prompts, which nothing reads, take most of the memory
            first = int(counts.any(0).nonzero()[0])
            labels, counts = labels[:, first:], counts[:, first:]
            inputs["logits_to_keep"] = counts.shape[1] + 1
        logits = model(**inputs).logits[:, : labels.shape[1]]
        # A softmax over a dimension that is not the last, as for all positions at once, is off by 1e-4 nats a token.
        nats = cross_entropy(logits[counts].float(), labels[counts], reduction="none").cpu().double()
        found += [Scored(float(part.sum()), len(part)) for part in torch.split(nats, counts.sum(1).tolist())]
        on_batch(len(found))
    model.train(was_training)
    return found


def token_loss(scored: Sequence[Scored]) -> float:
    """Mean loss over all completion tokens, in nats; NaN where no token counts."""
    tokens = sum(example.tokens for example in scored)
    return sum(example.nats for example in scored) / tokens if tokens else math.nan


def _content(completion: Any) -> str:
    content = completion if isinstance(completion, str) else completion[-1].get("content") or ""
    return str(content) if not isinstance(content, list) else "".join(part.get("text", "") for part in content)
