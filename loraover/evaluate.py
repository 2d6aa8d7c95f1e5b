"""Held-out measures of a causal language model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn.functional import cross_entropy

from loraover.answers import final_number


@torch.no_grad()
def exact_match(
    model: Any,
    tokenizer: Any,
    rows: Sequence[dict[str, Any]],
    *,
    max_new_tokens: int,
    batch_size: int,
    on_batch: Callable[[int], None] = lambda done: None,
) -> float:
    """Share of examples whose greedily generated final number equals the reference's.

    Args:
        rows: with `prompt` and `completion`, strings or chat messages.
        max_new_tokens: per example.
        batch_size: examples generated together, left-padded.
        on_batch: told how many examples are done.
    Returns:
        0 to 1. An answer without a number is wrong.
    """
    was_training = model.training
    model.eval()
    correct = 0
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        is_chat = not isinstance(batch[0]["prompt"], str)  # a chat template writes special tokens by itself
        encoded = tokenizer(
            [_text(row["prompt"], tokenizer) for row in batch],
            return_tensors="pt",
            padding=True,
            padding_side="left",
            add_special_tokens=not is_chat,
        ).to(model.device)
        generated = model.generate(
            input_ids=encoded.input_ids,
            attention_mask=encoded.attention_mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
        new = generated if model.config.is_encoder_decoder else generated[:, encoded.input_ids.shape[1] :]
        for row, answer in zip(batch, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True):
            found, wanted = final_number(answer), final_number(_content(row["completion"]))
            correct += found is not None and found == wanted
        on_batch(min(start + batch_size, len(rows)))
    model.train(was_training)
    return correct / len(rows)


class Scored(NamedTuple):
    """One example's completion under a model: its negative log-likelihood in nats, and its tokens."""

    nats: float
    tokens: int


@torch.no_grad()
def example_losses(model: Any, batches: Iterable[dict[str, Any]]) -> list[Scored]:
    """Every example's loss on its completion, in order.

    Args:
        batches: collated, with `labels` of -100 where a token does not count.
    """
    was_training = model.training
    model.eval()
    shift = 0 if model.config.is_encoder_decoder else 1  # the first label of a causal model is predicted by nothing
    found = []
    for batch in batches:
        labels = batch["labels"][:, shift:]
        logits = model(**batch).logits[:, : labels.shape[1]].float()
        nats = cross_entropy(logits.mT, labels, ignore_index=-100, reduction="none").double().sum(1)
        found += [Scored(*pair) for pair in zip(nats.tolist(), (labels != -100).sum(1).tolist(), strict=True)]
    model.train(was_training)
    return found


def token_loss(scored: Sequence[Scored]) -> float:
    """Mean loss over all completion tokens, in nats; NaN where no token counts."""
    tokens = sum(example.tokens for example in scored)
    return sum(example.nats for example in scored) / tokens if tokens else math.nan


def _text(prompt: Any, tokenizer: Any) -> str:
    if isinstance(prompt, str):
        return prompt
    return str(tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True))


def _content(completion: Any) -> str:
    return completion if isinstance(completion, str) else str(completion[-1]["content"])
