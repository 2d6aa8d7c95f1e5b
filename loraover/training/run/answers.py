"""Greedy answers from a model in memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from loraover.common.errors import DataError, EngineError

TOKEN_IDS = ("bos", "eos", "pad", "decoder_start", "forced_bos", "forced_eos")
AS_WRITTEN = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
"""Transformers 4 cleans up by default, which takes the space from " ." and " n't"; code and prompts need it."""


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
        max_new_tokens: Largest number of tokens in an answer. It is lower in a batch whose longest prompt leaves less
            room in the context of a causal model.
        batch_size: Number of prompts continued together, left-padded.
        stop: Texts after which an answer may end; it may also be longer.
        on_batch: Called with the number of prompts that are done.

    Raises:
        DataError: A prompt leaves no room in the model's context; nothing has been answered yet.
        EngineError: The model's scores of the next token are not finite.
    """
    rooms = answer_rooms(model, tokenizer, prompts)
    texts, adds = _as_texts(prompts, tokenizer)
    was_training = model.training
    model.eval()
    answers: list[str] = []
    for start in range(0, len(prompts), batch_size):
        batch = slice(start, start + batch_size)
        encoded = tokenizer(
            texts[batch], return_tensors="pt", padding=True, padding_side="left", add_special_tokens=adds
        ).to(model.device)
        with greedy_settings(model):
            generated = model.generate(
                input_ids=encoded.input_ids,
                attention_mask=encoded.attention_mask,
                max_new_tokens=min(max_new_tokens, *rooms[batch]),
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
                logits_processor=LogitsProcessorList([FiniteScores()]),
                **({"stop_strings": list(stop), "tokenizer": tokenizer} if stop else {}),
            )
        found = tokenizer.batch_decode(generated, **AS_WRITTEN)
        if not model.config.is_encoder_decoder:  # decoded alone, a continuation may lose its first space (LLaMA 2)
            asked = tokenizer.batch_decode(encoded.input_ids, **AS_WRITTEN)
            found = [text[len(prompt) :] for text, prompt in zip(found, asked, strict=True)]
        answers += found
        on_batch(len(answers))
    model.train(was_training)
    return answers


def answer_rooms(model: Any, tokenizer: Any, prompts: Sequence[str | list[dict[str, Any]]]) -> list[float]:
    """Largest number of tokens in the answer to each prompt, as far as the model's context limits it."""
    texts, adds = _as_texts(prompts, tokenizer)
    context = getattr(model.config, "max_position_embeddings", None)  # T5 and Bloom have no such limit
    if context is None:
        return [math.inf] * len(texts)
    counts = [len(ids) for ids in tokenizer(texts, add_special_tokens=adds).input_ids]
    for number, count in enumerate(counts, 1):
        if count >= context:
            raise DataError(
                f"question {number}: its {count} tokens leave no room in the model's context of {context}; leave it "
                "out of the data, or take a model with a longer context."
            )
    is_apart = model.config.is_encoder_decoder  # the decoder's answer takes no room in the encoder
    return [math.inf if is_apart else context - count for count in counts]


def _as_texts(prompts: Sequence[str | list[dict[str, Any]]], tokenizer: Any) -> tuple[list[str], bool]:
    """Return the texts of prompts, and whether special tokens are added; a chat template writes them by itself."""
    return [prompt_text(prompt, tokenizer) for prompt in prompts], all(isinstance(prompt, str) for prompt in prompts)


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
    A mixture of experts does not compute the loss of its routers, which TRL asks for and which cannot be computed from
    a cache.
    """
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    own = inner.generation_config
    ids = {f"{name}_token_id": getattr(own, f"{name}_token_id") for name in TOKEN_IDS}
    inner.generation_config = GenerationConfig(**ids)
    config = inner.config.get_text_config()
    asks_routers = getattr(config, "output_router_logits", None)
    if asks_routers:
        config.output_router_logits = False
    try:
        yield
    finally:
        inner.generation_config = own
        if asks_routers:
            config.output_router_logits = True


class FiniteScores(LogitsProcessor):
    """Raises EngineError where the likeliest token has no finite score, and any token would be generated."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if not bool(scores.amax(-1).isfinite().all()):  # a forced token leaves the others at minus infinity
            raise EngineError(
                "the model's scores of the next token hold NaN or infinity, so they mean no answer; check its weights, "
                "or compute in fp32."
            )
        return scores
