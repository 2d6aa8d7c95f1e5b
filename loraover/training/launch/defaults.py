"""Values that a recipe leaves to its method, its rows and this machine; a run and its plan settle them alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from loraover.common.errors import ConfigError, DataError
from loraover.common.reporter import Reporter
from loraover.data.sources import BadRows
from loraover.models.device import choose_device, prefers_bf16, total_memory
from loraover.models.load import ModelSource, load_config, load_processor
from loraover.models.memory import ROOM
from loraover.training.launch.distribution import CUTS_WEIGHTS
from loraover.training.launch.memory import Gpus, estimate_memory
from loraover.training.method import TrainingMethod
from loraover.training.method_table import METHODS, make_method
from loraover.training.recipe import Recipe
from loraover.training.recipe_parts import AUTO, BATCH
from loraover.training.rows.data import Examples, check_rows, report_skipped
from loraover.training.rows.lengths import Tokens, check_fit, count_tokens, is_left_out
from loraover.training.rows.template import with_template
from loraover.training.run_result import Lengths

LEARNING_RATES = {"lora": 3e-3, "lora-over": 3e-3, "lora+": 1.5e-3, "full": 1e-4}
LEARNING_RATES |= {name: method.learning_rate for name, method in METHODS.items()}
"""Rates by method that the kept studies (docs/study) chose on most tasks; that of full was not studied."""

STUDIED_RANKS = {"lora": "ranks 2, 8 and 32"}
"""Ranks at which a method's rate was studied, if it was not rank 8 alone: the same rate was best at each."""

STUDIED_WIDTH = 576
"""Hidden size of SmolLM2-135M, which the studies trained; wider models need less (Yang et al., arXiv:2203.03466)."""

WARMUP = 0.03
"""Share of the steps in which the learning rate rises."""


@dataclass(frozen=True)
class Settled:
    """A recipe without open values, and what it trains on.

    Args:
        recipe: The recipe, with values in place of those that it left to this machine and its data.
        trainer_name: Key of `TRAINERS`.
        source: The base model.
        examples: Its rows, without those that are skipped; None if a plan does not read them.
        tokenizer: Its tokenizer; None if a plan finds none.
        processor: Processor that reads the images of its rows; None for rows without any.
        tokens: Lengths of the training rows; empty if a plan cannot count them.
        lengths: Numbers of rows and tokens that are cut; None if none can be cut, or they are not counted.
        method: The recipe's method.
    """

    recipe: Recipe
    trainer_name: str
    source: ModelSource
    examples: Examples | None
    tokenizer: Any
    processor: Any | None
    tokens: list[Tokens]
    lengths: Lengths | None
    method: TrainingMethod

    @property
    def reads(self) -> Any:
        """Reader that turns rows into tokens: the processor if any row holds images, else the tokenizer."""
        return self.tokenizer if self.processor is None else self.processor


def settle(
    recipe: Recipe,
    name: str,
    source: ModelSource,
    tokenizer: Any,
    examples: Examples | None,
    report: Reporter,
    gpus: Gpus | None = None,
) -> Settled:
    """Check a recipe's rows, and choose the values that it leaves open by its rows, its method and this machine.

    A plan may have no tokenizer and no rows, and may be for `gpus` in place of this machine.
    """
    processor, counted = None, list[list[Tokens]]()
    if examples is not None and tokenizer is not None:
        if examples.have_pictures:
            processor = with_template(recipe, load_processor(source))
            tokenizer = with_template(recipe, processor.tokenizer)
        check_rows(recipe, name, tokenizer, examples)
        answers_only = recipe.training.assistant_only_loss
        bad = [BadRows() for _ in examples.parts]
        counted = [
            count_tokens(part, name, tokenizer, answers_only=answers_only, processor=processor, bad=one)
            for part, one in zip(examples.parts, bad, strict=True)
        ]
        if any(one.examples for one in bad):
            examples, counted = _without(recipe, examples, counted, bad, report)
    lasting = [one for part in (counted[:1] if processor is None else counted) for one in part]
    config = load_config(source)
    recipe = with_batch(with_defaults(recipe, config, lasting, report, gpus), source, report, gpus)
    method, lengths = make_method(recipe, is_seq2seq=bool(config.is_encoder_decoder)), None
    if examples is not None and counted:
        method.check_rows(examples.train.rows)
        lengths = check_fit(recipe, name, examples, counted, report)
    tokens = counted[0] if counted else []
    return Settled(recipe, name, source, examples, tokenizer, processor, tokens, lengths, method)


def _without(
    recipe: Recipe, examples: Examples, counted: list[list[Tokens]], bad: list[BadRows], report: Reporter
) -> tuple[Examples, list[list[Tokens]]]:
    """Leave out the rows that a chat template refuses, with their lengths, or raise DataError with their faults."""
    faults = list[str]()
    for part, one in zip(examples.parts, bad, strict=True):
        if not recipe.data.skip_bad_rows or len(one.examples) == len(part.rows):
            try:
                one.refuse(part.origin)
            except DataError as error:
                faults.append(str(error))
    if faults:
        raise DataError("\n".join(faults))
    for one in bad:
        report_skipped(one.rows, report)
    kept = [[t for i, t in enumerate(part) if i not in one.examples] for part, one in zip(counted, bad, strict=True)]
    return examples.without(bad), kept


def with_defaults(
    recipe: Recipe, config: Any, tokens: list[Tokens], report: Reporter, gpus: Gpus | None = None
) -> Recipe:
    """Give the values that a recipe leaves open, except its batch size."""
    training, values = recipe.training, dict[str, Any]()
    text = config.get_text_config()
    if training.bf16 is None:
        device, values["bf16"] = choose_device(), False
        if training.fp16:
            why = "training.fp16 is true"
        elif METHODS.get(recipe.method, TrainingMethod).needs_fp32:
            why = f"method {recipe.method} computes in float32"
        elif gpus:
            values["bf16"], why = True, "the GPUs of a plan are taken to have it"
        elif prefers_bf16(device):
            values["bf16"], why = True, f"this machine's {device.type} is faster in it than in float32"
        else:
            why = f"this machine's {device.type} is not known to be faster in it"
        report.line(f"training.bf16: {str(values['bf16']).lower()}, since {why}")
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
    """Return a recipe with micro-batches of another size, and steps of as nearly so many examples as possible."""
    values: dict[str, Any] = {
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": max(1, in_a_step // (batch * (recipe.distributed.processes or 1))),
        "gradient_checkpointing": checkpointing,
    }
    return recipe.changed("training", **values)
