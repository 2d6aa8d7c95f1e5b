"""Greedy answers from a model in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from loraover.common.errors import EngineError

TOKEN_IDS = ("bos", "eos", "pad", "decoder_start", "forced_bos", "forced_eos")


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
    """Continue every prompt with the most likely token at each position; special tokens are left out.

    Args:
        model: A causal model or an encoder-decoder.
        tokenizer: Its tokenizer.
        prompts: Only texts, or only chats, to which the tokenizer's template is applied.
        max_new_tokens: Largest number of tokens in an answer.
        batch_size: Number of prompts continued together, left-padded.
        stop: Texts after which an answer may end; it may also be longer.
        on_batch: Called with the number of prompts that are done.

    Raises:
        EngineError: The model's scores of the next token are not finite.
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
        with greedy_settings(model):
            generated = model.generate(
                input_ids=encoded.input_ids,
                attention_mask=encoded.attention_mask,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
                logits_processor=LogitsProcessorList([FiniteScores()]),
                **({"stop_strings": list(stop), "tokenizer": tokenizer} if stop else {}),
            )
        texts = tokenizer.batch_decode(generated, skip_special_tokens=True)
        if not model.config.is_encoder_decoder:  # decoded alone, a continuation may lose its first space (LLaMA 2)
            asked = tokenizer.batch_decode(encoded.input_ids, skip_special_tokens=True)
            texts = [text[len(prompt) :] for text, prompt in zip(texts, asked, strict=True)]
        answers += texts
        on_batch(len(answers))
    model.train(was_training)
    return answers


def prompt_text(prompt: str | list[dict[str, Any]], tokenizer: Any) -> str:
    """Text that a model reads: the prompt, or the chat in the tokenizer's template."""
    if isinstance(prompt, str):
        return prompt
    return str(tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True))


@contextmanager
def greedy_settings(model: Any) -> Iterator[None]:
    """Leave only token ids in a model's generation settings while this is open.

    A repetition penalty, beams, suppressed tokens or a smallest length, which many models' folders set, would make the
    answers other than greedy. They cannot be put aside by arguments: transformers fills in what these leave open.
    """
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    own = inner.generation_config
    ids = {f"{name}_token_id": getattr(own, f"{name}_token_id") for name in TOKEN_IDS}
    inner.generation_config = GenerationConfig(**ids)
    try:
        yield
    finally:
        inner.generation_config = own


class FiniteScores(LogitsProcessor):
    """Raises EngineError where the likeliest token has no finite score, and any token would be generated."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if not bool(scores.amax(-1).isfinite().all()):  # a forced token leaves the others at minus infinity
            raise EngineError(
                "the model's scores of the next token hold NaN or infinity, so they mean no answer; check its weights, "
                "or compute in fp32."
            )
        return scores
