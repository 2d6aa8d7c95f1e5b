"""What a run needs before its first step: loaded, made and checked."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, Trainer, set_seed

from loraover.callbacks.loraover_callback import LoraOverCallback
from loraover.callbacks.step_norm import Factors, factors
from loraover.common.errors import ConfigError
from loraover.common.ranks import launched
from loraover.common.reporter import Reporter
from loraover.models.load import (
    ModelSource,
    is_encoder_decoder,
    load_config,
    load_model,
    load_processor,
    load_tokenizer,
    resolve_model,
    takes_images,
)
from loraover.overparam.parameterization import OverParameterization
from loraover.overparam.schedule import Schedule
from loraover.overparam.sites import find_sites
from loraover.sources.push import check_repository
from loraover.training.adapter import with_adapter
from loraover.training.checks import (
    check_names,
    check_rows,
    check_trained,
    count_classes,
    note_slow_precision,
    row_form,
    weights_dtype,
)
from loraover.training.defaults import with_batch, with_defaults
from loraover.training.engines import end_preparation
from loraover.training.examples import Examples, load_examples, report_rows, without_evaluation
from loraover.training.hf_trainer import find_reward, make_trainer
from loraover.training.lengths import check_fit, count_all
from loraover.training.methods import make_method
from loraover.training.methods.base import TrainingMethod, count_trained
from loraover.training.progress import TrainingProgress
from loraover.training.push import pushed_base
from loraover.training.recipe import Recipe
from loraover.training.row_digests import keep_digests
from loraover.training.run_folder import with_processes, write_recipe
from loraover.training.run_log import METRICS_FILE
from loraover.training.run_result import Lengths, StartedFrom
from loraover.training.start import pin_start, start_from_adapter
from loraover.training.trackers import check_login
from loraover.training.trainers import TRAINERS, make_arguments, trainer_name


@dataclass(frozen=True)
class Prepared:
    """Everything that a run needs before its first step.

    Args:
        output: The run's folder.
        report: Receiver of progress.
        recipe: The recipe, with values in place of those that it left to this machine and its data.
        source: The base model.
        tokenizer: Its tokenizer.
        processor: What reads the images of its rows; None for rows without any.
        examples: Training and held-out rows.
        model: What the trainer trains.
        untrained: A and B of every module before training; None where more than their product is trained.
        trainer: Trainer of transformers or TRL.
        progress: Writer of its log, and of its steps.
        callback: Owner of the cores while training; None unless the method is LoRA-Over.
        method: The recipe's method.
        trained: Numbers in the parameters that the optimizer has before any cores.
        pushed_base: Model that a pushed adapter names in place of the stand-in that it was trained on.
        started_from: Adapters that A and B start from; None: PEFT draws them.
        trainer_name: Key of `TRAINERS`.
        lengths: Lengths of the training rows; None for trainers that cut none.
    """

    output: Path
    report: Reporter
    recipe: Recipe
    source: ModelSource
    tokenizer: Any
    processor: Any | None
    examples: Examples
    model: PreTrainedModel | PeftModel
    untrained: dict[str, Factors] | None
    trainer: Trainer
    progress: TrainingProgress
    callback: LoraOverCallback | None
    method: TrainingMethod
    trained: int
    pushed_base: ModelSource | None
    started_from: StartedFrom | None
    trainer_name: str
    lengths: Lengths | None

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
    ranks = launched()
    check_names(recipe)
    if recipe.distributed.processes is None and ranks.size > 1:
        recipe = with_processes(recipe, ranks.size)
    with ranks.first_then_others():  # which finds what rank 0 has downloaded
        source = resolve_model(recipe.model, recipe.model_revision)
        is_seq2seq = is_encoder_decoder(source)
        recipe = pin_start(recipe, output, report)
    report.line(f"base model: {source.origin}")
    named = pushed_base(recipe, source, report.line)
    name = trainer_name(recipe, is_seq2seq=is_seq2seq)
    _check_settings(recipe, name, output)
    tokenizer, processor, examples = _read(recipe, name, source)
    report_rows(examples, report, measures=bool(recipe.evaluation.examples) and name != "grpo")
    counted, seen = count_all(recipe, name, tokenizer, processor, examples)
    lasting = counted + ([] if processor is None else seen)
    recipe = with_batch(with_defaults(recipe, load_config(source), lasting, report), source, report)
    method = make_method(recipe, is_seq2seq=is_seq2seq)
    method.check_rows(examples.train.rows)
    note_slow_precision(recipe, report)
    lengths = check_fit(recipe, name, examples, counted, seen, report)
    ranks.write(write_recipe, output, _pinned(recipe, source, examples))
    ranks.write(keep_digests, output, examples)
    ranks.meet()

    arguments = make_arguments(recipe, name, output, report)  # which exist while the model is loaded, for ZeRO 3
    set_seed(recipe.training.seed)
    model: Any = _load_base(recipe, name, source, examples)
    start = None
    if recipe.method != "full":
        model = with_adapter(model, recipe, TRAINERS[name].task, source, method)
        start = start_from_adapter(model, recipe, source, output, report)
    untrained = factors(model) if recipe.trains_only_products else None
    method.freeze(model)
    method.start(model)
    check_trained(model, report)
    trained = count_trained(model, method)
    over = LoraOverCallback(recipe.over) if recipe.method == "lora-over" else None
    progress = TrainingProgress(report, output / METRICS_FILE if ranks.is_first else None)
    reads = tokenizer if processor is None else processor
    trainer = make_trainer(recipe, name, model, reads, examples, arguments, progress, over, method)
    end_preparation(recipe)
    _leave_out_short_warmup(trainer.args, planned_steps(recipe, trainer), report)
    _check_trainer(trainer, recipe, model)
    method.check(planned_steps(recipe, trainer), len(trainer.train_dataset))
    made = source, tokenizer, processor, examples, model, untrained, trainer
    return Prepared(output, report, recipe, *made, progress, over, method, trained, named, start, name, lengths)


def _check_settings(recipe: Recipe, name: str, output: Path) -> None:
    """Check before anything large is loaded what the trainer, its rewards, its trackers and the hub would refuse."""
    arguments = make_arguments(recipe, name, output)
    for reward in recipe.reward_funcs:
        find_reward(reward)
    launched().write(check_login, arguments.report_to)
    if recipe.push_to_hub is not None:
        launched().write(check_repository, recipe.push_to_hub)


def _read(recipe: Recipe, name: str, source: ModelSource) -> tuple[Any, Any | None, Examples]:
    """Load the tokenizer, the processor if any row holds images, and the rows, and check that they fit together."""
    tokenizer, images = load_tokenizer(source), takes_images(source)
    measured = without_evaluation(recipe) if name == "grpo" else recipe  # its loss says nothing; its log has rewards
    with launched().first_then_others():
        examples = load_examples(measured, row_form(recipe, name, tokenizer, takes_images=images))
    processor = load_processor(source) if examples.have_pictures else None
    tokenizer = tokenizer if processor is None else processor.tokenizer
    check_rows(recipe, name, tokenizer, examples)
    return tokenizer, processor, examples


def _leave_out_short_warmup(arguments: Any, steps: int, report: Reporter) -> None:
    """Let the rate begin at its peak where its rise would be shorter than a step, which would then change nothing."""
    share = arguments.warmup_steps
    if 0 < share < 1 and share * steps < 1:
        arguments.warmup_steps = 0
        report.line(f"training.warmup_steps: none, since {share:g} of {steps} steps is less than one")


def _check_trainer(trainer: Trainer, recipe: Recipe, model: Any) -> None:
    """Raise ConfigError for an optimizer, or a schedule of rates or of cores, that cannot be made."""
    given = trainer.optimizer
    try:
        trainer.create_optimizer_and_scheduler(planned_steps(recipe, trainer))
    except ConfigError:
        raise
    except (ImportError, ValueError) as error:
        chosen = (
            f"training.optim {recipe.training.optim!r} with lr_scheduler_type {recipe.training.lr_scheduler_type!r}"
        )
        raise ConfigError(f"{chosen} cannot be used here: {error}") from error
    trainer.optimizer, trainer.lr_scheduler = given, None  # the Trainer makes them where it has placed the model
    if recipe.method == "lora-over":
        Schedule(recipe.over, find_sites(model), steps=planned_steps(recipe, trainer), probe=None)


def _pinned(recipe: Recipe, source: ModelSource, examples: Examples) -> Recipe:
    """The recipe with the commits of model and data that the run uses, and the number of its processes if several."""
    held_out = None if examples.test is None else examples.test.revision
    data = recipe.data.model_copy(update={"revision": examples.train.revision or held_out})
    processes = recipe.distributed.processes
    recipe = with_processes(recipe, None if processes == 1 else processes)  # so that other recipes stay as they are
    return recipe.model_copy(update={"model": source.name, "model_revision": source.revision, "data": data})


def _load_base(recipe: Recipe, name: str, source: ModelSource, examples: Examples) -> PreTrainedModel:
    init = recipe.model_init
    labels = {"reward": 1}
    if name == "classification":
        labels[name] = count_classes(examples)
    base: PreTrainedModel = load_model(
        source,
        dtype=weights_dtype(recipe),
        task_type=TRAINERS[name].task,
        num_labels=labels.get(name),
        attention=init.attn_implementation,
        quantization=init.quantization,
    )
    config = base.config.get_text_config()
    if config.pad_token_id is None:  # by which a classifier finds the last token
        config.pad_token_id = base.generation_config.pad_token_id if base.can_generate() else 0
    return base


def planned_steps(recipe: Recipe, trainer: Trainer) -> int:
    """Return the optimizer steps of the run; a trainer may leave out examples that have no room for a completion."""
    training = recipe.training
    if recipe.trainer == "grpo" and training.num_train_epochs is not None:  # a prompt is in several micro-batches
        per_epoch: int = math.ceil(len(trainer.get_train_dataloader()) / trainer.args.gradient_accumulation_steps)
        return math.ceil(training.num_train_epochs * per_epoch)
    return recipe.steps(len(trainer.train_dataset))
