"""Logits of a model on prompts, in pieces that memory can hold."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from loraover.adapters.logits.prompts import Prompts
from loraover.common.reporter import Reporter

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
    """Walk over prompts on a model's device, with the positions of `pieces`, and report how many tokens are done.

    Args:
        prompts: The prompts.
        model: The model.
        work: What is run on the prompts, in words.
        report: Receiver of progress.
    """
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
