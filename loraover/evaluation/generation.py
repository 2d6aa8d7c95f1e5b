"""Greedy answers of a model in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch


@torch.no_grad()
def greedy_answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str | list[dict[str, Any]]],
    *,
    max_new_tokens: int,
    batch_size: int,
    stop: Sequence[str] = (),
    on_batch: Callable[[int], None] = lambda done: None,
) -> list[str]:
    """The most likely continuation of every prompt, token by token, without special tokens.

    Args:
        prompts: all text, or all chats, which the tokenizer's template writes out.
        max_new_tokens: per prompt.
        batch_size: prompts continued together, left-padded.
        stop: texts after which an answer need not go on; it may hold more.
        on_batch: told how many prompts are done.
    """
    was_training = model.training
    model.eval()
    answers: list[str] = []
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        is_chat = not isinstance(batch[0], str)  # a chat template writes special tokens by itself
        encoded = tokenizer(
            [prompt_text(prompt, tokenizer) for prompt in batch],
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
            **({"stop_strings": list(stop), "tokenizer": tokenizer} if stop else {}),
        )
        whole = tokenizer.batch_decode(generated, skip_special_tokens=True)
        if not model.config.is_encoder_decoder:  # decoded alone, a continuation may lose its first space, as of LLaMA 2
            asked = tokenizer.batch_decode(encoded.input_ids, skip_special_tokens=True)
            whole = [text[len(prompt) :] for text, prompt in zip(whole, asked, strict=True)]
        answers += whole
        on_batch(len(answers))
    model.train(was_training)
    return answers


def prompt_text(prompt: str | list[dict[str, Any]], tokenizer: Any) -> str:
    """What a model reads: the text, or the chat as the tokenizer's template writes it out."""
    if isinstance(prompt, str):
        return prompt
    return str(tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True))
