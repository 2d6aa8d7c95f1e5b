"""Values that a recipe leaves to its method, its data and this machine, each said with its reason."""

from __future__ import annotations

from typing import Any

import torch

from loraover.common.errors import ConfigError
from loraover.common.reporter import Reporter
from loraover.models.device import choose_device, prefers_bf16, total_memory
from loraover.models.load import ModelSource
from loraover.models.memory import ROOM
from loraover.training.launch.distribution import CUTS_WEIGHTS
from loraover.training.launch.memory import Gpus, estimate_memory
from loraover.training.method import TrainingMethod
from loraover.training.method_table import METHODS
from loraover.training.recipe import Recipe
from loraover.training.recipe_parts import AUTO, BATCH
from loraover.training.rows.lengths import Tokens, is_left_out

LEARNING_RATES = {"lora": 3e-3, "lora-over": 3e-3, "lora+": 1.5e-3, "full": 1e-4}
LEARNING_RATES |= {name: method.learning_rate for name, method in METHODS.items()}
"""Rates by method that the kept studies (docs/study) chose on most tasks; that of full was not studied."""

STUDIED_RANKS = {"lora": "ranks 2, 8 and 32"}
"""Ranks at which a method's rate was studied, if it was not rank 8 alone: the same rate was best at each."""

STUDIED_WIDTH = 576
"""Hidden size of SmolLM2-135M, which the studies trained; wider models need less (Yang et al., arXiv:2203.03466)."""

WARMUP = 0.03
"""Share of the steps in which the learning rate rises."""


def with_defaults(
    recipe: Recipe, config: Any, tokens: list[Tokens], report: Reporter, gpus: Gpus | None = None
) -> Recipe:
    """Give the values that a recipe leaves open, but for its batch size.

    Args:
        recipe: The recipe.
        config: Configuration of its base model.
        tokens: Lengths of its training examples; empty if they are not known.
        report: Receiver of the values with their reasons.
        gpus: GPUs that a plan is for; None: this machine.
    """
    training, values = recipe.training, dict[str, Any]()
    text = config.get_text_config()
    if training.bf16 is None:
        device = choose_device()
        why_not = _against_bf16(recipe, None if gpus else device)
        values["bf16"] = why_not is None
        why = why_not or (
            "the GPUs of a plan are taken to have it"
            if gpus
            else f"this machine's {device.type} is faster in it than in float32"
        )
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


def with_batch(recipe: Recipe, source: ModelSource, report: Reporter, gpus: Gpus | None = None) -> Recipe:
    """Choose the micro-batch of a recipe whose batch size is auto: the largest that the plan says fits.

    A step has as many examples as without auto, since micro-batches are accumulated, so that the result of a run does
    not depend on the machine's memory. Where processes cannot share them evenly, another number is reported and taken.
    If not even one example fits, activations are recomputed.

    Args:
        recipe: The recipe.
        source: The base model.
        report: Receiver of what is chosen.
        gpus: GPUs that a plan is for, which may be too small; None: this machine.

    Raises:
        ConfigError: Not even one example fits on this machine.
    """
    training = recipe.training
    if training.per_device_train_batch_size != AUTO:
        return recipe
    memory = gpus.memory if gpus else total_memory(choose_device("auto").type)
    processes, in_a_step = recipe.distributed.processes or 1, training.gradient_accumulation_steps * BATCH
    tries = [
        in_micro_batches(recipe, batch, in_a_step, checkpointing)
        for checkpointing in sorted({training.gradient_checkpointing, True})
        for batch in (8, 4, 2, 1)
        if batch == 1 or batch * processes <= in_a_step
    ]
    for tried in tries:
        in_all = estimate_memory(tried, source, training.max_steps or 1).in_all
        if memory is None or in_all <= ROOM * memory:
            break
    else:
        if gpus is None:
            cut = "" if recipe.distributed.engine in CUTS_WEIGHTS else ", or cut the weights with distributed.engine"
            raise ConfigError(
                f"training.per_device_train_batch_size is auto, and not even one example of {training.tokens} tokens "
                f"fits: it needs about {in_all / 1e9:.3g} GB, and this machine has {(memory or 0) / 1e9:.3g} GB. Lower "
                f"training.max_length, or set model_init.quantization{cut}."
            )
    batch, accumulated = tried.training.micro_batch, tried.training.gradient_accumulation_steps
    if (step := batch * accumulated * processes) != in_a_step:
        report.line(f"a step has {step} examples, since {processes} processes cannot share {in_a_step}")
    known = f"{in_all / 1e9:.3g} GB" + ("" if memory is None else f" of {memory / 1e9:.3g} GB")
    report.line(
        f"training.per_device_train_batch_size: {batch}, which needs about {known}; "
        f"gradient_accumulation_steps: {accumulated}"
        + (", with gradient_checkpointing" if tried.training.gradient_checkpointing else "")
    )
    return tried


def in_micro_batches(recipe: Recipe, batch: int, in_a_step: int, checkpointing: bool) -> Recipe:
    """Return a recipe with micro-batches of another size, and as nearly as may be with steps of so many examples."""
    values: dict[str, Any] = {
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": max(1, in_a_step // (batch * (recipe.distributed.processes or 1))),
        "gradient_checkpointing": checkpointing,
    }
    return recipe.changed("training", **values)


def _against_bf16(recipe: Recipe, device: torch.device | None) -> str | None:
    """Return why a run that leaves it open computes in float32; None if it computes in bfloat16.

    Args:
        recipe: The recipe.
        device: Device of the run; None: a GPU that is not here.
    """
    if recipe.training.fp16:
        return "training.fp16 is true"
    if METHODS.get(recipe.method, TrainingMethod).needs_fp32:
        return f"method {recipe.method} computes in float32"
    if device is None or prefers_bf16(device):
        return None
    return f"this machine's {device.type} is not known to be faster in it"
