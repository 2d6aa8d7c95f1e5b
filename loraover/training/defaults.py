"""Values that a recipe leaves to its method, its data and this machine, each said with its reason."""

from __future__ import annotations

from typing import Any

import torch

from loraover.common.errors import ConfigError
from loraover.common.reporter import Reporter
from loraover.models.device import choose_device, prefers_bf16, total_memory
from loraover.models.load import ModelSource
from loraover.models.memory import ROOM
from loraover.training.estimate import estimate_memory
from loraover.training.lengths import Tokens, is_left_out
from loraover.training.methods import METHODS
from loraover.training.methods.base import TrainingMethod
from loraover.training.recipe import Recipe
from loraover.training.recipe_parts import AUTO, BATCH

LEARNING_RATES = {"lora": 3e-3, "lora-over": 3e-3, "lora+": 1.5e-3, "full": 1e-4}
LEARNING_RATES |= {name: method.learning_rate for name, method in METHODS.items()}
"""Rates by method that the kept studies (docs/study) chose on most tasks; that of full was not studied."""

STUDIED_RANKS = {"lora": "ranks 2, 8 and 32"}
"""Ranks at which a method's rate was studied, if it was not rank 8 alone: the same rate was best at each."""

STUDIED_WIDTH = 576
"""Hidden size of SmolLM2-135M, which the studies trained; wider models need less (Yang et al., arXiv:2203.03466)."""

WARMUP = 0.03
"""Share of the steps in which the learning rate rises."""


def with_defaults(recipe: Recipe, config: Any, tokens: list[Tokens], report: Reporter) -> Recipe:
    """Give the values that a recipe leaves open, but for its batch size.

    Args:
        recipe: The recipe.
        config: Configuration of its base model.
        tokens: Lengths of its training examples; empty if they are not known.
        report: Receiver of the values with their reasons.
    """
    training, values = recipe.training, dict[str, Any]()
    text = config.get_text_config()
    if training.bf16 is None:
        device = choose_device()
        why_not = _against_bf16(recipe, device)
        values["bf16"] = why_not is None
        why = why_not or f"this machine's {device.type} is faster in it than in float32"
        report.line(f"training.bf16: {str(why_not is None).lower()}, since {why}")
    if training.learning_rate is None:
        key = "lora+" if training.loraplus_lr_ratio is not None else recipe.method
        studied = LEARNING_RATES[key]
        values["learning_rate"] = float(f"{studied * STUDIED_WIDTH / text.hidden_size:.2g}")
        ranks = STUDIED_RANKS.get(key, "rank 8")
        best = "the usual rate of method full" if key == "full" else f"the best rate of {key} at {ranks}"
        report.line(
            f"training.learning_rate: {values['learning_rate']:g}. At hidden size {STUDIED_WIDTH}, {best} is "
            f"{studied:g}; this model's hidden size is {text.hidden_size}, so it is multiplied by {STUDIED_WIDTH} / "
            f"{text.hidden_size}"
        )
    if training.warmup_steps is None:
        values["warmup_steps"] = 0.0 if training.lr_scheduler_type == "constant" else WARMUP
    if training.max_length is None:
        context = getattr(text, "max_position_embeddings", None) or 1024
        left = [one for one in tokens if not is_left_out(one, context, recipe, recipe.trainer or "sft")] or tokens
        longest = max(one.total for one in left) if left else min(context, 1024)
        values["max_length"] = max(8, min(longest, context))
        why = "the longest example" if tokens and longest <= context else "the model's context, or 1024 without data"
        if len(left) < len(tokens):
            why += f"; {len(tokens) - len(left)} examples whose prompt fills that context are left out"
        report.line(f"training.max_length: {values['max_length']}, {why}")
    return recipe.changed("training", **values)


def with_batch(recipe: Recipe, source: ModelSource, report: Reporter) -> Recipe:
    """Choose the micro-batch of a recipe whose batch size is auto: the largest that the plan says fits.

    A step has as many examples as without auto, since micro-batches are accumulated, so that the result of a run does
    not depend on the machine's memory. Where processes cannot share them evenly, another number is reported and taken.
    If not even one example fits, activations are recomputed.

    Raises:
        ConfigError: Not even one example fits.
    """
    training = recipe.training
    if training.per_device_train_batch_size != AUTO:
        return recipe
    memory = total_memory(choose_device("auto").type)
    processes, in_a_step = recipe.distributed.processes or 1, training.gradient_accumulation_steps * BATCH
    for checkpointing in sorted({training.gradient_checkpointing, True}):
        for batch in (size for size in (8, 4, 2, 1) if size == 1 or size * processes <= in_a_step):
            values: dict[str, Any] = {
                "per_device_train_batch_size": batch,
                "gradient_accumulation_steps": max(1, in_a_step // (batch * processes)),
                "gradient_checkpointing": checkpointing,
            }
            tried = recipe.changed("training", **values)
            needed = estimate_memory(tried, source, tried.training.max_steps or 1)
            in_all = needed.held + (needed.activations or 0)
            if memory is None or in_all <= ROOM * memory:
                known = "" if memory is None else f" of {memory / 1e9:.3g} GB"
                if (step := batch * values["gradient_accumulation_steps"] * processes) != in_a_step:
                    report.line(f"a step has {step} examples, since {processes} processes cannot share {in_a_step}")
                report.line(
                    f"training.per_device_train_batch_size: {batch}, which needs about {in_all / 1e9:.3g} GB{known}; "
                    f"gradient_accumulation_steps: {values['gradient_accumulation_steps']}"
                    + (", with gradient_checkpointing" if checkpointing else "")
                )
                return tried
    raise ConfigError(
        f"training.per_device_train_batch_size is auto, and not even one example of {training.tokens} tokens fits into "
        f"the memory of {memory} bytes; lower training.max_length, or set model_init.quantization."
    )


def _against_bf16(recipe: Recipe, device: torch.device) -> str | None:
    """Return why a run that leaves it open computes in float32; None if it computes in bfloat16."""
    if recipe.training.fp16:
        return "training.fp16 is true"
    if METHODS.get(recipe.method, TrainingMethod).needs_fp32:
        return f"method {recipe.method} computes in float32"
    return None if prefers_bf16(device) else f"this machine's {device.type} is not known to be faster in it"
