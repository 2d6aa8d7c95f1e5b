"""Checks of a recipe against its machine, its tokenizer and its rows, before anything large is loaded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, get_args, get_type_hints

import torch
from peft import LoraConfig
from torch import nn
from transformers.training_args import OptimizerNames

from loraover.common.dtypes import DTYPES
from loraover.common.errors import ConfigError, DataError
from loraover.common.reporter import Reporter
from loraover.data.formats import PAIRS, TEXTS, RowForm
from loraover.data.sources import Rows
from loraover.models.device import choose_device, prefers_bf16
from loraover.training.recipe import Recipe, hint
from loraover.training.recipe_parts import SOAP
from loraover.training.rows.data import Examples
from loraover.training.rows.template import learned, takes_objects
from loraover.training.trainers import TRAINERS, check_keys


def check_names(recipe: Recipe) -> None:
    """Check before anything is loaded what the recipe's types do not.

    Raises:
        ConfigError: An unknown key, optimizer or start of A and B, or float16 on a machine that does not have it.
    """
    check_keys(recipe)
    _check_known("training.optim", recipe.training.optim, [SOAP, *(str(name.value) for name in OptimizerNames)])
    start = recipe.lora.init_lora_weights
    if isinstance(start, str) and not start.lower().startswith("pissa_niter_"):
        forms = get_args(get_type_hints(LoraConfig)["init_lora_weights"])
        _check_known("lora.init_lora_weights", start.lower(), [name for form in forms for name in get_args(form)])
    if recipe.training.fp16 and not torch.accelerator.is_available():
        raise ConfigError("training.fp16 needs an accelerator; use bf16, or neither, on a CPU.")


def _check_known(key: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        meant = hint(value, known) or f", expected one of {', '.join(known)}."
        raise ConfigError(f"{key} is {value!r}{meant}")


def note_slow_precision(recipe: Recipe, report: Reporter) -> None:
    """Report a run in bf16 on an x86 CPU on which float32 is faster."""
    device, capability = choose_device(), torch.backends.cpu.get_cpu_capability()
    if recipe.training.bf16 and device.type == "cpu" and "AVX" in capability and not prefers_bf16(device):
        report.line(
            f"training.bf16 is true, and this CPU ({capability}, without AMX) is slow in it: float32 takes twice the "
            "memory for the base model, and less time"
        )


def row_form(recipe: Recipe, name: str, tokenizer: Any, *, takes_images: bool) -> RowForm:
    """Return the form of rows that a recipe's trainer takes.

    Conversations stay as they are where the loss can be told which tokens are the assistant's, or where the recipe says
    what it counts; else each turn of the assistant is one example.

    Raises:
        ConfigError: Chat messages are asked for, and the tokenizer has no chat template.
    """
    has_template = tokenizer.chat_template is not None
    if recipe.data.chat and not has_template:
        raise ConfigError(f"data.chat is true, but the tokenizer of {recipe.model} has no chat template.")
    kind = TRAINERS[name]
    chat = has_template and kind.library == "trl" if recipe.data.chat is None else recipe.data.chat
    answers_only = recipe.training.assistant_only_loss
    pictures = takes_images and name == "sft"
    return RowForm(
        kind.columns,
        chat=chat,
        turns=answers_only is None,
        whole=answers_only is True,
        keeps_all=name == "grpo",
        pictures=pictures,
        text=recipe.training.text_column,
        text_calls=not takes_objects(tokenizer),
    )


def check_rows(recipe: Recipe, name: str, tokenizer: Any, examples: Examples) -> None:
    """Check that a recipe's trainer can learn the chat messages, margins and images among its rows.

    Raises:
        ConfigError: Answers are to be generated, and rows hold images, tools or no prompt and completion.
        DataError: Chat messages that the trainer or the tokenizer does not take, or that only some rows have; a margin
            that is no number, or that only some rows have; or rows with images and tools, which TRL leaves out.
    """
    for part in examples.parts:
        _check_chat(recipe, name, tokenizer, part)
        _check_margins(part)
    if examples.test is not None and recipe.evaluation.exact_match:
        _check_answers(examples.test)
    _check_pictures(recipe, examples)


def _check_chat(recipe: Recipe, name: str, tokenizer: Any, part: Rows) -> None:
    part = learned(part, name)
    columns = [TEXTS & row.keys() for row in part.rows]
    if other := next((i for i, found in enumerate(columns) if found != columns[0]), 0):
        pair = " (each turn of messages is a prompt and a completion)" if PAIRS[0] in columns else ""
        raise DataError(
            f"{part.place(other)} is learned as {sorted(columns[other])}, and row {part.number(0)} as "
            f"{sorted(columns[0])}{pair}; write all rows in one form."
        )
    is_text = [all(isinstance(row[column], str) for column in columns[0]) for row in part.rows]
    if all(is_text):
        return
    where = f"{part.place(is_text.index(False))} holds chat messages"
    if TRAINERS[name].library == "transformers":
        raise DataError(f"{where}, which cannot train {recipe.model} with {name}; use text.")
    if tokenizer.chat_template is None:
        raise DataError(f"{where}, but the tokenizer of {recipe.model} has no chat template.")
    if any(is_text):
        raise DataError(
            f"{where}, and row {part.number(is_text.index(True))} text; set data.chat to true, so that all "
            "become chat messages."
        )


def _check_answers(part: Rows) -> None:
    for i, row in enumerate(part.rows):
        others = sorted({"images", "tools", "chat_template_kwargs"} & row.keys())
        if others or not (row.keys() >= {"prompt", "completion"} or "messages" in row):
            found = f"has {others[0]}" if others else f"has {sorted(row)} and no prompt with a completion"
            raise ConfigError(
                f"evaluation.exact_match generates answers to prompts, and {part.place(i)} {found}. Set it to false."
            )


def check_evaluated(arguments: Any, examples: Examples) -> None:
    """Check that there are rows where the trainer is to evaluate during training.

    Args:
        arguments: Settings of the trainer.
        examples: The rows.

    Raises:
        ConfigError: There are none.
    """
    if examples.test is None and (arguments.eval_on_start or arguments.eval_strategy != "no"):
        raise ConfigError(
            "training.eval_strategy or training.eval_on_start asks for an evaluation during training, and nothing is "
            "held out. Leave them out, set evaluation.examples above 0, or name held-out rows in data.test."
        )


def _check_margins(part: Rows) -> None:
    margins = [row.get("margin") for row in part.rows]
    fault = next((i for i, margin in enumerate(margins) if not _is_finite(margin)), None)
    if fault is not None and any(margin is not None for margin in margins):
        raise DataError(
            f"{part.place(fault)}: the margin is {margins[fault]!r}, expected a number in every row, or in none."
        )


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_pictures(recipe: Recipe, examples: Examples) -> None:
    if not examples.have_pictures:
        return
    for part in examples.parts:
        for i, row in enumerate(part.rows):
            if found := sorted({"tools", "chat_template_kwargs"} & row.keys()):
                raise DataError(
                    f"{part.place(i)} has {found[0]}, and TRL leaves this column out where rows hold images; train "
                    "such rows apart."
                )


def count_classes(examples: Examples) -> int:
    """Return the number of classes of training and held-out rows, whose labels are 0, 1 and so on; at least two."""
    most: int = max(row["label"] for rows in examples.parts for row in rows.rows)
    return max(2, 1 + most)


def check_trained(model: nn.Module, report: Reporter) -> None:
    """Check that nothing is trained in float16, and report what is trained in bfloat16.

    A bfloat16 has 8 bits, so that a change of less than 1 / 512 is always rounded off.

    Args:
        model: Model to train.
        report: Receiver of a line.

    Raises:
        ConfigError: All weights, modules to save or biases of a base model in float16 are trained.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if coarse := sum(one.numel() for one in trained.values() if one.dtype == torch.bfloat16):
        report.line(
            f"{coarse:,} numbers are trained in bfloat16, where a step of less than 1/512 of a number is lost; set "
            "model_init.dtype to float32 to keep it"
        )
    for name, parameter in trained.items():
        if parameter.dtype == torch.float16:
            raise ConfigError(
                f"{name} would be trained in float16, in which AdamW's epsilon is zero and its steps are too long; set "
                "model_init.dtype to float32 or bfloat16."
            )


def weights_dtype(recipe: Recipe) -> str:
    """Return the data type of a recipe's base weights, as `load_model` names it."""
    chosen = recipe.model_init.dtype
    if chosen == "auto":
        return "bf16" if recipe.training.bf16 else "fp32"
    return next(name for name, spelt in DTYPES.items() if spelt == chosen)
