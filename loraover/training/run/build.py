"""Parts of a run, loaded, made and checked before its first step."""

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
from loraover.models.load import ModelSource, is_encoder_decoder, load_model, load_tokenizer, resolve_model
from loraover.overparam.parameterization import OverParameterization
from loraover.overparam.schedule import Schedule
from loraover.overparam.sites import find_sites
from loraover.sources.hub import check_repository
from loraover.training.adapter import with_adapter
from loraover.training.checks import (
    check_evaluated,
    check_names,
    check_trained,
    count_classes,
    note_slow_precision,
    weights_dtype,
)
from loraover.training.launch.distribution import end_preparation
from loraover.training.method import count_trained
from loraover.training.progress import TrainingProgress
from loraover.training.push import pushed_base
from loraover.training.recipe import Recipe
from loraover.training.row_digests import keep_digests
from loraover.training.rows.data import Examples
from loraover.training.rows.template import own_template, with_template
from loraover.training.run.folder import write_recipe
from loraover.training.run.log import METRICS_FILE
from loraover.training.run.trainer import leaves_out_repeated, make_sets, make_trainer
from loraover.training.run_result import StartedFrom
from loraover.training.settle import Settled, read_examples, settle
from loraover.training.start import pin_start, start_from_adapter
from loraover.training.trackers import check_login
from loraover.training.trainers import TRAINERS, make_arguments, trainer_name


@dataclass(frozen=True)
class Prepared(Settled):
    """Everything that a run needs before its first step.

    Args:
        output: The run's folder.
        report: Receiver of progress.
        examples: Training and held-out rows.
        model: What the trainer trains.
        untrained: A and B of every module before training; None where more than their product is trained.
        trainer: Trainer of transformers or TRL.
        progress: Writer of its log, and of its steps.
        callback: Owner of the cores while training; None unless the method is LoRA-Over.
        trained: Numbers in the parameters that the optimizer has before any cores.
        pushed_base: Model that a pushed adapter names in place of the stand-in that it was trained on.
        started_from: Adapters that A and B start from; None: PEFT draws them.
    """

    output: Path
    report: Reporter
    examples: Examples
    model: PreTrainedModel | PeftModel
    untrained: dict[str, Factors] | None
    trainer: Trainer
    progress: TrainingProgress
    callback: LoraOverCallback | None
    trained: int
    pushed_base: ModelSource | None
    started_from: StartedFrom | None

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
        recipe = recipe.changed("distributed", processes=ranks.size)
    with ranks.first_then_others():  # which finds what rank 0 has downloaded
        source = resolve_model(recipe.model, recipe.model_revision)
        is_seq2seq = is_encoder_decoder(source)
        recipe = pin_start(recipe, output, report)
    report.line(f"base model: {source.origin}")
    named = pushed_base(recipe, source, report.line)
    name = trainer_name(recipe, is_seq2seq=is_seq2seq)
    ranks.write(check_login, make_arguments(recipe, name, output).report_to)  # before anything large is loaded
    if recipe.push_to_hub is not None:
        ranks.write(check_repository, recipe.push_to_hub)
    tokenizer = with_template(recipe, load_tokenizer(source))
    examples = read_examples(recipe, name, source, tokenizer, report)
    settled = settle(recipe, name, source, tokenizer, examples, report)
    recipe, method, examples = settled.recipe, settled.method, settled.examples or examples
    sets = make_sets(examples)
    note_slow_precision(recipe, report)
    _keep(recipe, source, examples, output)
    arguments = make_arguments(recipe, name, output, report)  # which exist while the model is loaded, for ZeRO 3
    check_evaluated(arguments, examples)
    model, start = _load_model(settled, examples, output, report)
    untrained = factors(model) if recipe.trains_only_products else None
    method.freeze(model)
    method.start(model)
    check_trained(model, report)
    trained = count_trained(model, method)
    over = LoraOverCallback(recipe.over) if recipe.method == "lora-over" else None
    progress = TrainingProgress(report, output / METRICS_FILE if ranks.is_first else None)
    trainer = make_trainer(settled, model, sets, arguments, progress, over)
    end_preparation(recipe)
    if ranks.size > 1:
        _note_repeated(recipe, name, trainer, report)
    _leave_out_short_warmup(trainer.args, planned_steps(recipe, trainer), report)
    _check_trainer(trainer, recipe, model)
    method.check(planned_steps(recipe, trainer), len(trainer.train_dataset))
    return Prepared(
        **vars(settled) | {"examples": examples},
        output=output,
        report=report,
        model=model,
        untrained=untrained,
        trainer=trainer,
        progress=progress,
        callback=over,
        trained=trained,
        pushed_base=named,
        started_from=start,
    )


def _keep(recipe: Recipe, source: ModelSource, examples: Examples, output: Path) -> None:
    """Keep the recipe and the digests of its rows in the run's folder, before any process goes on."""
    ranks = launched()
    ranks.write(write_recipe, output, _pinned(recipe, source, examples))
    ranks.write(keep_digests, output, examples, own_template(recipe))
    ranks.meet()


def _load_model(settled: Settled, examples: Examples, output: Path, report: Reporter) -> tuple[Any, StartedFrom | None]:
    """Seed the run, load the base model with its adapter, and return what the adapter starts from."""
    recipe, name, source = settled.recipe, settled.trainer_name, settled.source
    set_seed(recipe.training.seed)
    model = _load_base(settled, examples)
    if recipe.method == "full":
        return model, None
    model = with_adapter(model, recipe, TRAINERS[name].task, source, settled.method)
    return model, start_from_adapter(model, recipe, source, output, report)


def _leave_out_short_warmup(arguments: Any, steps: int, report: Reporter) -> None:
    """Let the rate begin at its peak where its rise would be shorter than a step, which would then change nothing."""
    share = arguments.warmup_steps
    if 0 < share < 1 and share * steps < 1:
        arguments.warmup_steps = 0
        report.line(f"training.warmup_steps: none, since {share:g} of {steps} steps is less than one")


def _note_repeated(recipe: Recipe, name: str, trainer: Trainer, report: Reporter) -> None:
    """Report the rows that Accelerate repeats where the trainer's loss cannot leave them out."""
    rows, training, size = len(trainer.train_dataset), recipe.training, launched().size
    at_once = training.micro_batch * size
    has_ended = planned_steps(recipe, trainer) * training.gradient_accumulation_steps * at_once >= rows
    is_complete = name == "grpo" or trainer.args.dataloader_drop_last or leaves_out_repeated(name, trainer)
    if has_ended and not is_complete and (repeated := -rows % at_once):
        report.line(
            f"the last step of an epoch takes its first {repeated} examples again, since {rows} examples do not divide "
            f"into micro-batches of {training.micro_batch} in {size} processes; one process takes none again"
        )


def _check_trainer(trainer: Trainer, recipe: Recipe, model: Any) -> None:
    """Raise ConfigError for an optimizer, or a schedule of rates or of cores, that cannot be made."""
    given = trainer.optimizer
    try:
        trainer.create_optimizer_and_scheduler(planned_steps(recipe, trainer))
    except ConfigError:
        raise
    except (ImportError, ValueError, TypeError, RuntimeError) as error:  # TypeError: lr_scheduler_kwargs are missing
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
    if recipe.distributed.processes == 1:
        recipe = recipe.changed("distributed", processes=None)  # so that other recipes stay as they are
    recipe = recipe.changed("data", revision=examples.train.revision or held_out)
    return recipe.model_copy(update={"model": source.name, "model_revision": source.revision})


def _load_base(settled: Settled, examples: Examples) -> PreTrainedModel:
    recipe, name = settled.recipe, settled.trainer_name
    init = recipe.model_init
    labels = {"reward": 1}
    if name == "classification":
        labels[name] = count_classes(examples)
    base: PreTrainedModel = load_model(
        settled.source,
        dtype=weights_dtype(recipe),
        task_type=TRAINERS[name].task,
        num_labels=labels.get(name),
        attention=init.attn_implementation,
        quantization=init.quantization,
    )
    config = base.config.get_text_config()
    if not base.can_generate():  # a classifier finds the last token by it; the Trainer sets it when training begins
        config.pad_token_id = settled.tokenizer.pad_token_id
    elif config.pad_token_id is None:
        config.pad_token_id = base.generation_config.pad_token_id
    return base


def planned_steps(recipe: Recipe, trainer: Trainer) -> int:
    """Return the optimizer steps of the run; a trainer may leave out examples that have no room for a completion."""
    training = recipe.training
    if recipe.trainer == "grpo" and training.num_train_epochs is not None:  # a prompt is in several micro-batches
        per_epoch: int = math.ceil(len(trainer.get_train_dataloader()) / trainer.args.gradient_accumulation_steps)
        return math.ceil(training.num_train_epochs * per_epoch)
    return recipe.steps(len(trainer.train_dataset))
