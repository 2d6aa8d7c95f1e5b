"""Parts of a run, loaded, made and checked before its first step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, Trainer, set_seed

from loraover.callbacks.loraover_callback import LoraOverCallback
from loraover.callbacks.step_norm import Factors, factors
from loraover.checkpoint.files import TRAINER_FOLDER
from loraover.common.errors import ConfigError
from loraover.common.ranks import launched
from loraover.common.reporter import Reporter
from loraover.models.device import choose_device, prefers_bf16
from loraover.models.load import ModelSource, is_encoder_decoder, load_model, load_tokenizer, resolve_model
from loraover.overparam.parameterization import OverParameterization
from loraover.overparam.schedule import Schedule
from loraover.overparam.sites import find_sites
from loraover.sources.hub import check_repository
from loraover.training.launch.defaults import Settled, settle
from loraover.training.launch.distribution import end_preparation
from loraover.training.launch.settings import check_names, make_arguments, weights_dtype, with_adapter
from loraover.training.method import count_trained
from loraover.training.push import check_login, pushed_base
from loraover.training.recipe import Recipe
from loraover.training.rows.data import Examples, count_classes, read_examples
from loraover.training.rows.template import own_template, with_template
from loraover.training.run.folder import keep_digests, write_recipe
from loraover.training.run.log import METRICS_FILE
from loraover.training.run.trainer import TrainingProgress, leaves_out_repeated, make_sets, make_trainer
from loraover.training.run_result import StartedFrom
from loraover.training.start import pin_start, start_from_adapter
from loraover.training.trainers import TRAINERS, trainer_name


@dataclass(frozen=True)
class Prepared(Settled):
    """Everything that a run needs before its first step.

    Args:
        output: The run's folder.
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


def build(recipe: Recipe, output: Path, report: Reporter) -> Prepared:
    """Load, make and check everything that a run needs, and write the recipe with its commits into the run's folder."""
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
    ranks.write(check_login, make_arguments(recipe, name, output / TRAINER_FOLDER).report_to)  # before what is large
    if recipe.push_to_hub is not None:
        ranks.write(check_repository, recipe.push_to_hub)

    tokenizer = with_template(recipe, load_tokenizer(source))
    read = read_examples(recipe, name, source, tokenizer, report)
    settled = settle(recipe, name, source, tokenizer, read, report)
    recipe, method, examples = settled.recipe, settled.method, settled.examples or read
    sets = make_sets(examples)
    note_slow_precision(recipe, report)
    held_out = None if examples.test is None else examples.test.revision
    pinned = recipe.changed("data", revision=examples.train.revision or held_out)
    if recipe.distributed.processes == 1:
        pinned = pinned.changed("distributed", processes=None)  # so that other recipes stay as they are
    pinned = pinned.model_copy(update={"model": source.name, "model_revision": source.revision})
    ranks.write(write_recipe, output, pinned)
    ranks.write(keep_digests, output, examples, own_template(recipe))
    ranks.meet()

    arguments = make_arguments(recipe, name, output / TRAINER_FOLDER, report)  # there while ZeRO 3 loads the model
    if examples.test is None and (arguments.eval_on_start or arguments.eval_strategy != "no"):
        raise ConfigError(
            "training.eval_strategy or training.eval_on_start asks for an evaluation during training, and nothing is "
            "held out. Leave them out, set evaluation.examples above 0, or name held-out rows in data.test."
        )
    set_seed(recipe.training.seed)
    model: Any = _load_base(settled, examples)
    start = None
    if recipe.method != "full":
        model = with_adapter(model, recipe, TRAINERS[name].task, source, method)
        start = start_from_adapter(model, recipe, source, output, report)
    known = vars(settled) | {"examples": examples, "output": output, "report": report, "pushed_base": named}
    known |= {"model": model, "untrained": factors(model) if recipe.trains_only_products else None}
    method.freeze(model)
    method.start(model)
    _check_precision(model, report)
    known |= {"trained": count_trained(model, method), "started_from": start}

    over = LoraOverCallback(recipe.over) if recipe.method == "lora-over" else None
    progress = TrainingProgress(report, output / METRICS_FILE if ranks.is_first else None)
    trainer = make_trainer(settled, model, sets, arguments, progress, over)
    end_preparation(recipe)
    _check_steps(trainer, settled, model, report)
    method.check(planned_steps(recipe, trainer), len(trainer.train_dataset))
    return Prepared(**known, trainer=trainer, progress=progress, callback=over)


def note_slow_precision(recipe: Recipe, report: Reporter) -> None:
    """Report a run in bf16 on an x86 CPU on which float32 is faster."""
    device, capability = choose_device(), torch.backends.cpu.get_cpu_capability()
    if recipe.training.bf16 and device.type == "cpu" and "AVX" in capability and not prefers_bf16(device):
        report.line(
            f"training.bf16 is true, and this CPU ({capability}, without AMX) is slow in it: float32 takes twice the "
            "memory for the base model, and less time"
        )


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


def _check_precision(model: torch.nn.Module, report: Reporter) -> None:
    """Check that nothing is trained in float16, and report what is trained in bfloat16.

    A bfloat16 has 8 bits, so that a change of less than 1 / 512 is always rounded off.
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


def _check_steps(trainer: Trainer, settled: Settled, model: Any, report: Reporter) -> None:
    """Fit a trainer's schedules to the steps of its run, and report where several processes differ from one."""
    recipe, training, size = settled.recipe, settled.recipe.training, launched().size
    steps, rows, at_once = planned_steps(recipe, trainer), len(trainer.train_dataset), training.micro_batch * size
    has_ended = steps * training.gradient_accumulation_steps * at_once >= rows
    name, repeated = settled.trainer_name, -rows % at_once
    is_complete = name == "grpo" or trainer.args.dataloader_drop_last or leaves_out_repeated(name, trainer)
    if size > 1 and has_ended and not is_complete and repeated:  # Accelerate repeats them, and they count twice
        report.line(
            f"the last step of an epoch repeats {repeated} of its first examples, since {rows} examples do not divide "
            f"into micro-batches of {training.micro_batch} in {size} processes; a single process repeats none"
        )
    share = trainer.args.warmup_steps
    if 0 < share < 1 and share * steps < 1:  # a rise that is shorter than a step would leave this step without effect
        trainer.args.warmup_steps = 0
        report.line(f"training.warmup_steps: none, since {share:g} of {steps} steps is less than one")
    given = trainer.optimizer
    try:
        trainer.create_optimizer_and_scheduler(steps)
    except ConfigError:
        raise
    except (ImportError, ValueError, TypeError, RuntimeError) as error:  # TypeError: lr_scheduler_kwargs are missing
        chosen = f"training.optim {training.optim!r} with lr_scheduler_type {training.lr_scheduler_type!r}"
        raise ConfigError(f"{chosen} cannot be used here: {error}") from error
    trainer.optimizer, trainer.lr_scheduler = given, None  # the Trainer makes them where it has placed the model
    if recipe.method == "lora-over":
        Schedule(recipe.over, find_sites(model), steps=steps, probe=None)


def planned_steps(recipe: Recipe, trainer: Trainer) -> int:
    """Return the optimizer steps of the run; a trainer may leave out examples that have no room for a completion."""
    training = recipe.training
    if recipe.trainer == "grpo" and training.num_train_epochs is not None:  # a prompt is in several micro-batches
        per_epoch: int = math.ceil(len(trainer.get_train_dataloader()) / trainer.args.gradient_accumulation_steps)
        return math.ceil(training.num_train_epochs * per_epoch)
    return recipe.steps(len(trainer.train_dataset))
