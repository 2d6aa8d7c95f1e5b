"""What a run needs before its first step: loaded, made and checked."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, Trainer, set_seed
from transformers.training_args import OptimizerNames

from loraover.callbacks.loraover_callback import LoraOverCallback
from loraover.callbacks.step_norm import Factors, factors
from loraover.common.errors import ConfigError, DataError
from loraover.common.reporter import Reporter
from loraover.models.load import ModelSource, is_encoder_decoder, load_model, load_tokenizer, resolve_model
from loraover.overparam.parameterization import OverParameterization
from loraover.overparam.schedule import Schedule
from loraover.overparam.sites import find_sites
from loraover.training.adapter import with_adapter
from loraover.training.examples import Examples, load_examples
from loraover.training.hf_trainer import make_trainer
from loraover.training.methods import make_method
from loraover.training.methods.base import TrainingMethod, count_trained
from loraover.training.progress import TrainingProgress
from loraover.training.push import pushed_base
from loraover.training.recipe import Recipe
from loraover.training.recipe_parts import SOAP
from loraover.training.row_digests import keep_digests
from loraover.training.run_folder import METRICS_FILE, write_recipe


@dataclass(frozen=True)
class Prepared:
    """Everything that a run needs before its first step.

    Args:
        source: The base model.
        tokenizer: Its tokenizer.
        examples: Training and held-out rows.
        model: What the trainer trains.
        untrained: A and B of every module before training; None where more than their product is trained.
        trainer: Trainer of transformers or TRL.
        progress: Writer of its log, and of its steps.
        callback: Owner of the cores while training; None unless the method is LoRA-Over.
        method: The recipe's method.
        trained: Numbers in the parameters that the optimizer has before any cores.
        pushed_base: Model that a pushed adapter names in place of the stand-in that it was trained on.
    """

    source: ModelSource
    tokenizer: Any
    examples: Examples
    model: PreTrainedModel | PeftModel
    untrained: dict[str, Factors] | None
    trainer: Trainer
    progress: TrainingProgress
    callback: LoraOverCallback | None
    method: TrainingMethod
    trained: int
    pushed_base: ModelSource | None

    @property
    def over(self) -> OverParameterization | None:
        """Owner of the cores, once training has begun; None for plain LoRA."""
        return None if self.callback is None else self.callback.over


def prepare(recipe: Recipe, output: Path, report: Reporter) -> Prepared:
    """Load and make everything that a run needs, and check it before the first step.

    Args:
        recipe: The recipe of the run.
        output: The run's folder, into which the recipe is written with the commits of model and data.
        report: Receiver of progress.

    Raises:
        ConfigError: The recipe does not fit its model, its data or this machine.
        DataError: The data cannot be read, have changed since a run that is resumed, or hold no example to learn from.
    """
    check_names(recipe)
    source = resolve_model(recipe.model, recipe.model_revision)
    report.line(f"base model: {source.origin}")
    _note_slow_precision(recipe, report)
    named = pushed_base(recipe, source, report.line)
    is_seq2seq = is_encoder_decoder(source)
    method = make_method(recipe, is_seq2seq=is_seq2seq)
    tokenizer = load_tokenizer(source)
    examples = load_examples(recipe, chat=_use_chat(recipe, tokenizer, is_seq2seq))
    if tokenizer.chat_template is None and not isinstance(examples.train.rows[0]["prompt"], str):
        raise DataError(
            f"{recipe.data.train}: holds chat messages, but the tokenizer of {recipe.model} has no chat template."
        )
    method.check_rows(examples.train.rows)
    report.line(f"training data: {examples.train.origin}, {len(examples.train.rows)} examples")
    if examples.shared and examples.test is not None:
        report.line(f"{examples.shared} of {len(examples.test.rows)} held-out examples are also trained on")
    write_recipe(output, _pinned(recipe, source, examples))
    keep_digests(output, examples)

    set_seed(recipe.training.seed)
    task = "SEQ_2_SEQ_LM" if is_seq2seq else "CAUSAL_LM"
    base = load_model(source, dtype="bf16" if recipe.training.precision == "bf16" else "fp32", task_type=task)
    model = base if recipe.method == "full" else with_adapter(base, recipe, task, source, method)
    untrained = factors(model) if recipe.trains_only_products else None
    method.freeze(model)
    method.start(model)
    trained = count_trained(model, method)
    over = LoraOverCallback(recipe.over) if recipe.method == "lora-over" else None
    progress = TrainingProgress(report, output / METRICS_FILE)
    trainer = make_trainer(recipe, model, tokenizer, examples, output, is_seq2seq, progress, over, method)
    _check_trainer(trainer, recipe, len(examples.train.rows), report)
    method.check(planned_steps(recipe, trainer), len(trainer.train_dataset))
    if over is not None:
        Schedule(recipe.over, find_sites(model), steps=planned_steps(recipe, trainer), probe=None)
    return Prepared(source, tokenizer, examples, model, untrained, trainer, progress, over, method, trained, named)


def check_names(recipe: Recipe) -> None:
    """Check before anything is loaded what the recipe's types do not.

    Raises:
        ConfigError: An unknown optimizer, or a precision that this machine does not have.
    """
    known = [SOAP, *(str(name.value) for name in OptimizerNames)]
    if recipe.training.optim not in known:
        near = difflib.get_close_matches(recipe.training.optim, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f", expected one of {', '.join(known)}."
        raise ConfigError(f"training.optim is {recipe.training.optim!r}{hint}")
    if recipe.training.precision == "fp16" and not torch.accelerator.is_available():
        raise ConfigError("training.precision is fp16, which needs an accelerator; use fp32 or bf16 on a CPU.")


def _note_slow_precision(recipe: Recipe, report: Reporter) -> None:
    """Report a run in bf16 on a CPU that has no instructions for it.

    Without AVX-512, oneDNN has no matrix product in bfloat16, and PyTorch's own takes 5 to 45 times as long as that in
    float32.
    """
    is_cpu = not torch.accelerator.is_available()
    capability = torch.backends.cpu.get_cpu_capability()
    if recipe.training.precision == "bf16" and is_cpu and capability in ("NO AVX", "AVX2"):
        report.line(
            f"training.precision is bf16, for which this CPU ({capability}) has no instructions: fp32 takes twice the "
            "memory for the base model, and a fraction of the time"
        )


def _check_trainer(trainer: Trainer, recipe: Recipe, rows: int, report: Reporter) -> None:
    """Check a trainer before its first step.

    Raises:
        ConfigError: An optimizer or a schedule that cannot be made.
        DataError: No example to learn from.
    """
    taken = len(trainer.train_dataset)
    if taken < rows:
        report.line(
            f"{rows - taken} of {rows} examples have no room for their completion within training.max_length = "
            f"{recipe.training.max_length} and are left out"
        )
    if not taken:
        raise DataError(f"{recipe.data.train}: no example fits training.max_length = {recipe.training.max_length}.")
    given = trainer.optimizer
    try:
        trainer.create_optimizer_and_scheduler(planned_steps(recipe, trainer))
    except (ImportError, ValueError) as error:
        chosen = (
            f"training.optim {recipe.training.optim!r} with lr_scheduler_type {recipe.training.lr_scheduler_type!r}"
        )
        raise ConfigError(f"{chosen} cannot be used here: {error}") from error
    trainer.optimizer, trainer.lr_scheduler = given, None  # the Trainer makes them where it has placed the model


def _pinned(recipe: Recipe, source: ModelSource, examples: Examples) -> Recipe:
    """The recipe with the commits of model and data that the run uses."""
    held_out = None if examples.test is None else examples.test.revision
    data = recipe.data.model_copy(update={"revision": examples.train.revision or held_out})
    return recipe.model_copy(update={"model": source.name, "model_revision": source.revision, "data": data})


def _use_chat(recipe: Recipe, tokenizer: Any, is_seq2seq: bool) -> bool:
    has_template = tokenizer.chat_template is not None
    if recipe.data.chat and not has_template:
        raise ConfigError(f"data.chat is true, but the tokenizer of {recipe.model} has no chat template.")
    return has_template and not is_seq2seq if recipe.data.chat is None else recipe.data.chat


def planned_steps(recipe: Recipe, trainer: Trainer) -> int:
    """Return the optimizer steps of the run; a trainer may leave out examples that have no room for a completion."""
    return recipe.steps(len(trainer.train_dataset))
