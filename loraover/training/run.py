"""Run a recipe: load, train, measure, and leave a run folder (see `run_folder`)."""

from __future__ import annotations

import difflib
import json
import shlex
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
from safetensors.torch import load_model as load_weights
from transformers import PreTrainedModel, Trainer, set_seed
from transformers.training_args import OptimizerNames

from loraover.callbacks.loraover_callback import LoraOverCallback
from loraover.callbacks.seal_checkpoints import last_whole_checkpoint
from loraover.callbacks.step_norm import Factors, factors, step_norm
from loraover.checkpoint.checkpoint import write_checkpoint
from loraover.common.atomic_output import publish_directory, publish_text
from loraover.common.errors import ConfigError, DataError, DivergedError
from loraover.common.provenance import environment, hardware, peak_bytes
from loraover.common.quiet import quiet_libraries_within
from loraover.evaluation.held_out import exact_match, example_losses, token_loss
from loraover.models.licence import known_licence
from loraover.models.load import ModelSource, is_encoder_decoder, load_model, load_tokenizer, resolve_model
from loraover.overparam.parameterization import OverParameterization
from loraover.overparam.schedule import Schedule
from loraover.overparam.sites import find_sites
from loraover.reporting.model_card import model_card
from loraover.reporting.reporter import SILENT, Reporter, log_shown
from loraover.training.adapter import with_adapter
from loraover.training.examples import Examples, load_examples
from loraover.training.failure import FAILURE_FILE, record_failure
from loraover.training.hf_trainer import make_trainer
from loraover.training.methods import make_method
from loraover.training.methods.base import Method, count_trained, served_size
from loraover.training.push import moved_copy, push, pushed_base
from loraover.training.recipe import SOAP, Recipe, load_recipe
from loraover.training.run_folder import (
    HELD_OUT_FILE,
    METRICS_FILE,
    RECIPE_FILE,
    TRAINER_FOLDER,
    claim,
    log_measures,
    product,
    step_of,
    trim_metrics,
    write_recipe,
)
from loraover.training.run_result import RUN_FILE, Measures, RunResult

BEFORE, AFTER = "before training", "after training"


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
        callback: Owner of the cores while training; None unless the method is LoRA-Over.
        method: What is done beside plain LoRA; None for plain LoRA, LoRA-Over and full fine-tuning.
        trained: Numbers in the parameters that the optimizer has before any cores.
        pushed_base: Model that a pushed adapter names in place of the stand-in that it was trained on.
    """

    source: ModelSource
    tokenizer: Any
    examples: Examples
    model: PreTrainedModel | PeftModel
    untrained: dict[str, Factors] | None
    trainer: Trainer
    callback: LoraOverCallback | None
    method: Method | None
    trained: int
    pushed_base: ModelSource | None

    @property
    def over(self) -> OverParameterization | None:
        """Owner of the cores, once training has begun; None for plain LoRA."""
        return None if self.callback is None else self.callback.over


class Timed(NamedTuple):
    """Steps that this process has taken, and their seconds; a resumed run has more steps than these."""

    steps: int
    seconds: float


def train(
    recipe: Recipe | str | Path,
    output: str | Path,
    *,
    overrides: Mapping[str, Any] | None = None,
    resume: bool = False,
    report: Reporter = SILENT,
    command: str | None = None,
) -> RunResult:
    """Train an adapter as a recipe says.

    Args:
        recipe: A recipe, the name of one that ships, or a YAML file.
        output: A new folder; with `resume`, the folder of the run to continue. A run that fails leaves `failure.json`
            in it, see `record_failure`.
        overrides: Values in place of the recipe's, by dotted key, e.g. `{"training.seed": 1}`.
        resume: Continue from the last complete checkpoint in `output`, or from the start if there is none.
        report: Receiver of progress.
        command: Command line for the model card; None: the one of `loraover train` with these arguments.

    Returns:
        The contents of `run.json`. What was trained is in `output/adapter`, or `output/model` for method full.

    Raises:
        ConfigError, DataError, CheckpointError, OutputError: The request cannot be used; the message says what was
            found and what was expected. A run that is refused before its first step leaves no folder.
        DivergedError: Weights are no longer finite at the end, or in the checkpoint to resume from.
    """
    output = Path(output)
    loaded = load_recipe(recipe, overrides)
    if command is None:
        command = _command(recipe, output, overrides)
    with quiet_libraries_within(bars=report.shows_bars):
        return _train(loaded, output, resume, report, command)


def _command(recipe: Recipe | str | Path, output: Path, overrides: Mapping[str, Any] | None) -> str:
    """Command line that does the same; a recipe in memory is named by the copy that the run keeps."""
    if isinstance(recipe, Recipe):
        return shlex.join(["loraover", "train", str(output / RECIPE_FILE)])
    settings = [word for key, value in (overrides or {}).items() for word in ("--set", f"{key}={json.dumps(value)}")]
    return shlex.join(["loraover", "train", str(recipe), "-o", str(output), *settings])


def _train(recipe: Recipe, output: Path, resume: bool, report: Reporter, command: str) -> RunResult:
    if resume and not recipe.can_resume:
        raise ConfigError(
            f"--resume: a run of method {recipe.method} keeps no checkpoints, since a step taken twice with other "
            "noise would spend privacy that is not accounted for. Start a new run in another folder."
        )
    claim(output, resume=resume)
    run = None
    try:
        run = _prepare(recipe, output, report)
        before = _measure(run, recipe, output, report, BEFORE)
        checkpoint = last_whole_checkpoint(output / TRAINER_FOLDER) if resume else None
        (output / FAILURE_FILE).unlink(missing_ok=True)
        trim_metrics(output, checkpoint)
        with log_shown(report):
            timed = _take_steps(run, recipe, checkpoint, report)
        if not all(bool(p.isfinite().all()) for p in run.model.parameters() if p.requires_grad):
            raise DivergedError(
                "training diverged: the loss is no longer a number at learning rate "
                f"{recipe.training.learning_rate:g}; lower it. The log is {output / METRICS_FILE}."
            )
        left_out = None if run.method is None else run.method.finish(run.model)
        after = _measure(run, recipe, output, report, AFTER)
        result = _result(run, recipe, timed, before, after, left_out)
        _publish(run, recipe, output, result, command)
    except BaseException as error:
        has_stepped = run is not None and run.trainer.state.global_step > 0
        record_failure(output, error, has_stepped=has_stepped, is_resumed=resume)
        raise
    if recipe.push_to_hub is not None:
        _push(recipe.push_to_hub, run, recipe, output, result, command)
        report.line(f"uploaded to {recipe.push_to_hub}")
    return result


def _result(
    run: Prepared,
    recipe: Recipe,
    timed: Timed,
    before: Measures | None,
    after: Measures | None,
    left_out: float | None,
) -> RunResult:
    cores, matrices = (0, 0) if run.over is None else run.over.num_parameters()
    served = served_size(run.model)
    return RunResult(
        method=recipe.method,
        model=recipe.model,
        model_origin=run.source.origin,
        data_origin=run.examples.train.origin,
        learning_rate=recipe.training.learning_rate,
        seed=recipe.training.seed,
        steps=run.trainer.state.global_step,
        train_seconds=timed.seconds,
        timed_steps=timed.steps,
        peak_bytes=peak_bytes(),
        lora_parameters=sum(p.numel() for p in run.model.parameters() if p.requires_grad),
        served_rank=None if served is None else served[0],
        served_bytes=None if served is None else served[1],
        served_error=left_out,
        trained_parameters=run.trained + cores - matrices,
        privacy=None if run.method is None else run.method.privacy,
        added_parameters=cores - matrices,
        gauge_numbers=0 if run.over is None else run.over.gauge_numbers(),
        update_norm=None if run.untrained is None else step_norm(run.untrained, factors(run.model)),
        before=before,
        after=after,
        versions=environment(),
        hardware=hardware(),
    )


def _publish(run: Prepared, recipe: Recipe, output: Path, result: RunResult, command: str) -> None:
    """Write the adapter folder, then the run's result."""
    card = _card(recipe, result, run.source, command)
    with publish_directory(product(recipe, output)) as draft:
        run.model.save_pretrained(draft)
        run.tokenizer.save_pretrained(draft)
        if run.over is not None:
            write_checkpoint(draft, run.over, step=result.steps)
        (draft / "README.md").write_text(card, encoding="utf-8")
    publish_text(output / RUN_FILE, result.model_dump_json(indent=1) + "\n")


def _card(recipe: Recipe, result: RunResult, base: ModelSource, command: str) -> str:
    licence = known_licence(base.name, base.revision)
    title, kind, library = "LoRA adapter", f"A {'DoRA' if recipe.lora.use_dora else 'plain LoRA'} adapter", "peft"
    if recipe.method == "full":
        title, kind, library = "Fine-tuned model", "A fine-tuned copy", "transformers"
    facts = result.facts() | base.facts()
    return model_card(title, base.name, facts, command, licence=licence, kind=kind, library=library)


def _push(repository: str, run: Prepared, recipe: Recipe, output: Path, result: RunResult, command: str) -> None:
    folder = product(recipe, output)
    if run.pushed_base is None:
        push(repository, folder, folder)
        return
    with moved_copy(folder, run.pushed_base, _card(recipe, result, run.pushed_base, command)) as copy:
        push(repository, copy, folder)


def _prepare(recipe: Recipe, output: Path, report: Reporter) -> Prepared:
    _check_names(recipe)
    source = resolve_model(recipe.model, recipe.model_revision)
    report.line(f"base model: {source.origin}")
    named = pushed_base(recipe, source, report.line)
    is_seq2seq = is_encoder_decoder(source)
    method = make_method(recipe, is_seq2seq=is_seq2seq)
    tokenizer = load_tokenizer(source)
    examples = load_examples(recipe, chat=_use_chat(recipe, tokenizer, is_seq2seq))
    if tokenizer.chat_template is None and not isinstance(examples.train.rows[0]["prompt"], str):
        raise DataError(
            f"{recipe.data.train}: holds chat messages, but the tokenizer of {recipe.model} has no chat template."
        )
    report.line(f"training data: {examples.train.origin}, {len(examples.train.rows)} examples")
    write_recipe(output, _pinned(recipe, source, examples))

    set_seed(recipe.training.seed)
    task = "SEQ_2_SEQ_LM" if is_seq2seq else "CAUSAL_LM"
    base = load_model(source, dtype="bf16" if recipe.training.precision == "bf16" else "fp32", task_type=task)
    model = base if recipe.method == "full" else with_adapter(base, recipe, task, source, method)
    untrained = factors(model) if recipe.trains_only_products else None
    if method is not None:
        method.start(model)
    trained = count_trained(model, method)
    over = LoraOverCallback(recipe.over) if recipe.method == "lora-over" else None
    trainer = make_trainer(recipe, model, tokenizer, examples, output, is_seq2seq, report, over, method)
    _check_trainer(trainer, recipe, len(examples.train.rows), report)
    if method is not None:
        method.check(_steps(recipe, trainer), len(trainer.train_dataset))
    if over is not None:
        Schedule(recipe.over, find_sites(model), steps=_steps(recipe, trainer), probe=None)
    return Prepared(source, tokenizer, examples, model, untrained, trainer, over, method, trained, named)


def _check_names(recipe: Recipe) -> None:
    """Check before anything is loaded what the recipe's types do not.

    Raises:
        ConfigError: an unknown optimizer, or a precision that this machine does not have.
    """
    known = [SOAP, *(str(name.value) for name in OptimizerNames)]
    if recipe.training.optim not in known:
        near = difflib.get_close_matches(recipe.training.optim, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f", expected one of {', '.join(known)}."
        raise ConfigError(f"training.optim is {recipe.training.optim!r}{hint}")
    if recipe.training.precision == "fp16" and not torch.accelerator.is_available():
        raise ConfigError("training.precision is fp16, which needs an accelerator; use fp32 or bf16 on a CPU.")


def _check_trainer(trainer: Trainer, recipe: Recipe, rows: int, report: Reporter) -> None:
    """Check a trainer before its first step.

    Raises:
        ConfigError: an optimizer or a schedule that cannot be made.
        DataError: no example to learn from.
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
        trainer.create_optimizer_and_scheduler(_steps(recipe, trainer))
    except (ImportError, ValueError) as error:
        chosen = (
            f"training.optim {recipe.training.optim!r} with lr_scheduler_type {recipe.training.lr_scheduler_type!r}"
        )
        raise ConfigError(f"{chosen} cannot be used here: {error}") from error
    trainer.optimizer, trainer.lr_scheduler = given, None  # the Trainer makes them where it has placed the model


def _steps(recipe: Recipe, trainer: Trainer) -> int:
    """Optimizer steps of the run; a trainer may leave out examples that have no room for a completion."""
    return recipe.steps(len(trainer.train_dataset))


def _take_steps(run: Prepared, recipe: Recipe, checkpoint: Path | None, report: Reporter) -> Timed:
    """Train from the start, from a checkpoint, or not at all where the checkpoint holds the last step."""
    if run.callback is not None:
        run.callback.resume_from = checkpoint
    steps = _steps(recipe, run.trainer)
    step = step_of(checkpoint)
    if checkpoint is None or step < steps:
        started = time.perf_counter()
        if run.method is None:
            run.trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        else:
            run.method.train(run.trainer, checkpoint, steps, report)
        return Timed(run.trainer.state.global_step - step, time.perf_counter() - started)
    if isinstance(run.model, PeftModel):
        set_peft_model_state_dict(run.model, load_peft_weights(str(checkpoint)))
    else:
        load_weights(run.model, checkpoint / "model.safetensors")
    if run.callback is not None:
        run.callback.restore(run.model, checkpoint, recipe.training.seed, steps=steps)
    if run.method is not None:
        run.method.restore(checkpoint)
    run.trainer.state.global_step = step
    return Timed(0, 0.0)


def _pinned(recipe: Recipe, source: ModelSource, examples: Examples) -> Recipe:
    """The recipe with the commits of model and data that the run uses."""
    data = recipe.data.model_copy(update={"revision": examples.train.revision})
    return recipe.model_copy(update={"model": source.name, "model_revision": source.revision, "data": data})


def _use_chat(recipe: Recipe, tokenizer: Any, is_seq2seq: bool) -> bool:
    has_template = tokenizer.chat_template is not None
    if recipe.data.chat and not has_template:
        raise ConfigError(f"data.chat is true, but the tokenizer of {recipe.model} has no chat template.")
    return has_template and not is_seq2seq if recipe.data.chat is None else recipe.data.chat


def _measure(run: Prepared, recipe: Recipe, output: Path, report: Reporter, when: str) -> Measures | None:
    """Measure loss and exact match on the held-out rows, and log them."""
    if run.examples.test is None or (when == BEFORE and not recipe.evaluation.before):
        return None
    rows = run.examples.test.rows
    scored = example_losses(run.model, run.trainer.get_eval_dataloader())
    loss = token_loss(scored)
    fitting = sum(example.tokens > 0 for example in scored)
    if not fitting:
        raise DataError(
            "no held-out example has room for its completion within training.max_length = "
            f"{recipe.training.max_length}; raise it."
        )
    accuracy = None
    if recipe.evaluation.exact_match:
        with report.task(f"held-out answers {when}", len(rows)) as advance:
            accuracy = exact_match(
                run.model,
                run.tokenizer,
                rows,
                max_new_tokens=recipe.evaluation.max_new_tokens,
                batch_size=recipe.evaluation.batch_size,
                answer=recipe.evaluation.answer,
                on_batch=advance,
            )
    measures = Measures(examples=fitting, loss=loss, exact_match=accuracy)
    if fitting < len(rows):
        report.line(
            f"{len(rows) - fitting} of {len(rows)} held-out examples have no room for their completion within "
            f"training.max_length = {recipe.training.max_length}: the loss leaves them out"
        )
    if when == AFTER:
        publish_text(output / HELD_OUT_FILE, json.dumps(scored) + "\n")
    report.line(f"{when}: {measures}")
    log_measures(output, run.trainer.state.global_step, eval_loss=loss, exact_match=accuracy)
    return measures
