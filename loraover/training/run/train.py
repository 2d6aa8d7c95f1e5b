"""Run a recipe: load, train, measure, and leave a run folder (see `run_folder`)."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
from safetensors.torch import load_model as load_weights
from torch import Tensor
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from loraover.callbacks.seal_checkpoints import last_whole_checkpoint, remove_incomplete
from loraover.callbacks.step_norm import factors, step_norm
from loraover.checkpoint.carried_files import record_beside
from loraover.checkpoint.files import TRAINER_FOLDER
from loraover.checkpoint.training_state import write_checkpoint
from loraover.common.atomic_output import publish_directory, publish_text, unwritable
from loraover.common.errors import ConfigError, DivergedError, FoldError
from loraover.common.paths import without_secrets
from loraover.common.provenance import environment, hardware, peak_bytes
from loraover.common.quiet import quiet_libraries_within
from loraover.common.ranks import launched
from loraover.common.reporter import SILENT, Reporter
from loraover.common.request import as_written
from loraover.models.load import ModelSource
from loraover.models.model_file import known_licence
from loraover.overparam.eigenbases import with_measured_bases
from loraover.overparam.optimizers import ordinary_optimizer
from loraover.overparam.sharding import trainable_state_dict, whole
from loraover.reporting.model_card import model_card
from loraover.reporting.reporter import log_shown
from loraover.training.launch.distribution import CUTS_WEIGHTS, convert_for_processes
from loraover.training.method import served_size
from loraover.training.method_table import METHODS
from loraover.training.push import attach, upload
from loraover.training.recipe import Recipe, load_recipe
from loraover.training.run.build import Prepared, build, planned_steps
from loraover.training.run.failure import FAILURE_FILE, explained, record_failure
from loraover.training.run.folder import (
    LOCK_FILE,
    RECIPE_FILE,
    claim,
    has_begun,
    is_finished,
    product,
    with_commits,
)
from loraover.training.run.log import METRICS_FILE, logged_losses, step_of, trim_metrics
from loraover.training.run.measure import AFTER, BEFORE, LOWER, check_finite, check_room, measure
from loraover.training.run_result import RUN_FILE, Measures, RunResult, read_run


class TimedSteps(NamedTuple):
    """Steps that this process has taken, and their seconds; a resumed run has more steps than these.

    Args:
        steps: Number of steps.
        seconds: Their time.
        best: Step of the best checkpoint, whose weights the model has at the end; None: it has those of the last step.
    """

    steps: int
    seconds: float
    best: int | None


def train(
    recipe: Recipe | str | Path | None,
    output: str | Path,
    *,
    overrides: Mapping[str, Any] | None = None,
    resume: bool | Literal["auto"] = False,
    report: Reporter = SILENT,
    command: str | None = None,
    record: bool = False,
) -> RunResult:
    """Train an adapter as a recipe says, and return the contents of `run.json`.

    Args:
        recipe: A recipe, the name of one that ships, or a YAML file; None: see `load_recipe`.
        output: A new folder; with `resume`, the folder of the run to continue. It gets the folder `adapter`, or `model`
            for method full. A run that fails leaves `failure.json` in it.
        overrides: Values in place of the recipe's, by dotted key, e.g. `{"training.seed": 1}`.
        resume: Continue from the last complete checkpoint in `output`, or from the start if there is none. "auto": also
            begin a run that is not there, and return the result of one that is finished.
        report: Receiver of progress.
        command: Command line for the model card; None: the one of `loraover train` with these arguments.
        record: Also record the adapter's reference beside it, as `loraover record` does, before it is pushed.

    Raises:
        ConfigError, DataError, CheckpointError, OutputError: The request cannot be used. A run that is refused before
            its first step leaves no folder. If only the record or the push failed, the run is finished.
        DivergedError: Weights, the held-out loss or the norm of the change are not finite.
        FoldError: The result is the untrained model, although the training loss fell.
        ProcessError: Another process of the run has failed or does not answer.
    """
    output, ranks = Path(output), launched()
    with ranks.together(), quiet_libraries_within(bars=report.shows_bars and ranks.is_first):
        report = ranks.heard(report)
        asked = load_recipe(recipe, overrides)
        if record and asked.method == "full":
            raise ConfigError(f"{as_written('record')}: method full trains no adapter; leave this out.")
        command = command or _command(recipe, output, overrides, record)
        ranks.meet()  # before rank 0 makes a folder
        if resume == "auto" and ranks.of_first(lambda: is_finished(output)):
            report.line(f"{output}: the run is finished already")
            return read_run(output)
        continues = ranks.of_first(lambda: has_begun(output)) if resume == "auto" else resume
        if continues and not asked.can_resume:
            raise ConfigError(
                f"a run of method {asked.method} cannot be resumed: it keeps no checkpoints, since "
                f"{METHODS[asked.method].no_resume}. Start a new run in another folder."
            )
        with ranks.held(lambda: claim(output, resume=continues)):
            run, result = _run(asked, output, report, continues, command)
            asked, arguments, base = run.recipe, run.trainer.args, run.pushed_base
            del run  # and with it the trained model, before another one is loaded
            ranks.meet()
            adapter = product(asked, output)
            if record:
                ranks.write(record_beside, adapter, model=asked.model, report=report)
            ranks.write(attach, arguments, adapter, report)
            if asked.push_to_hub is not None:
                card = "" if base is None else _card(asked, result, base, command)
                ranks.write(upload, asked, adapter, report, base, card)
            return result


def _run(recipe: Recipe, output: Path, report: Reporter, continues: bool, command: str) -> tuple[Prepared, RunResult]:
    """Build and fit a run in its claimed folder, which keeps the reason where that fails."""
    ranks = launched()
    ranks.meet()
    if not (output / LOCK_FILE).exists():
        raise ConfigError(
            f"{output}: process {ranks.rank} does not see this folder, which process 0 has made. Name one on a disk "
            "that all machines of the run share."
        )
    recipe, run = with_commits(recipe, output) if continues else recipe, None
    try:
        run = build(recipe, output, report)
        return run, fit(run, resume=continues, command=command)
    except BaseException as error:
        has_stepped = run is not None and run.trainer.state.global_step > 0
        agreed = ranks.agreed(unwritable(error, output))
        ranks.write(record_failure, output, agreed, has_stepped=has_stepped, is_resumed=continues)
        shown = explained(agreed, has_stepped)
        if shown is error:
            raise
        raise shown from error


def _command(
    recipe: Recipe | str | Path | None, output: Path, overrides: Mapping[str, Any] | None, record: bool
) -> str:
    """Command line that repeats the run; a recipe in memory is named by the copy that the run keeps."""
    asked = ["--record"] if record else []
    if isinstance(recipe, Recipe):
        return shlex.join(["loraover", "train", str(output / RECIPE_FILE), *asked])
    settings = [word for key, value in (overrides or {}).items() for word in ("--set", f"{key}={json.dumps(value)}")]
    named = [] if recipe is None else [str(recipe)]
    return shlex.join(map(without_secrets, ["loraover", "train", *named, "-o", str(output), *settings, *asked]))


def fit(run: Prepared, *, resume: bool, command: str) -> RunResult:
    """Measure, take the steps, measure again, and publish what was trained with its result."""
    recipe, output, report, ranks = run.recipe, run.output, run.report, launched()
    check_room(run)
    before = measure(run, BEFORE, has_begun=False)
    step = ranks.of_first(lambda: step_of(last_whole_checkpoint(output / TRAINER_FOLDER)) if resume else 0)
    checkpoint = output / TRAINER_FOLDER / f"checkpoint-{step}" if step else None
    ranks.write((output / FAILURE_FILE).unlink, missing_ok=True)
    ranks.write(trim_metrics, output, checkpoint)
    ranks.write(remove_incomplete, output / TRAINER_FOLDER, step)
    if resume:
        from_step = f"resumed after step {step}" if step else "no complete checkpoint yet, so begun again at step 0"
        report.line(f"{output}: {from_step} of {planned_steps(recipe, run.trainer)}")
    with log_shown(report):
        timed = _take_steps(run, checkpoint)
    if not all(bool(whole(p).isfinite().all()) for p in run.model.parameters() if p.requires_grad):
        raise DivergedError(
            "training diverged: the loss is no longer a number at learning rate "
            f"{recipe.training.peak_rate:g}; lower it. The log is {output / METRICS_FILE}."
        )
    if timed.best is not None:
        report.line(f"weights: those of step {timed.best}, the best (training.load_best_model_at_end)")
    left_out = run.method.finish(run.model)
    after = measure(run, AFTER, has_begun=timed.steps > 0)
    result = _result(run, timed, before, after, left_out)
    ranks.meet()  # before rank 0 reads and publishes what all have trained
    ranks.write(_check_trained, result, logged_losses(output))
    if result.update_norm == 0:
        steps = f"{result.steps} step{'s' * (result.steps != 1)}"
        report.line(f"warning: {steps} changed nothing: the adapter computes the same as before")
    weights = trainable_state_dict(run.model) if recipe.distributed.engine in CUTS_WEIGHTS else None
    ranks.write(_publish, run, result, command, resume, weights)
    return result


def _take_steps(run: Prepared, checkpoint: Path | None) -> TimedSteps:
    """Train from the start, from a checkpoint, or not at all where the checkpoint holds the last step."""
    if run.callback is not None:
        run.callback.resume_from = checkpoint
    steps = planned_steps(run.recipe, run.trainer)
    step = step_of(checkpoint)
    if checkpoint is None or step < steps:
        if checkpoint is not None:
            convert_for_processes(checkpoint, run.trainer, run.report)
        started = time.perf_counter()
        with run.report.task("training steps", steps) as run.progress.advance:
            run.method.train(run.trainer, checkpoint, steps, run.progress)
        seconds = time.perf_counter() - started
        best = _best_checkpoint(run, run.trainer.state)
        return TimedSteps(run.trainer.state.global_step - step, seconds, step_of(best) if best else None)
    best = _best_checkpoint(run, TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME)))
    checkpoint = best or checkpoint
    if isinstance(run.model, PeftModel):
        set_peft_model_state_dict(run.model, load_peft_weights(str(checkpoint)))
    else:
        load_weights(run.model, checkpoint / "model.safetensors")
    if run.callback is not None:
        config = with_measured_bases(run.callback.config, ordinary_optimizer(run.trainer.create_optimizer()))
        run.callback.restore(run.model, checkpoint, run.recipe.training.seed, steps=steps, config=config)
    run.method.restore(checkpoint)
    run.trainer.state.global_step = step
    return TimedSteps(0, 0.0, step_of(best) if best else None)


def _best_checkpoint(run: Prepared, state: TrainerState) -> Path | None:
    """Return the checkpoint whose weights the Trainer takes at the end; None: it keeps those of the last step."""
    named = state.best_model_checkpoint if run.trainer.args.load_best_model_at_end else None
    return None if named is None else run.output / TRAINER_FOLDER / Path(named).name


def _result(
    run: Prepared, timed: TimedSteps, before: Measures | None, after: Measures | None, left_out: float | None
) -> RunResult:
    recipe = run.recipe
    cores, matrices = (0, 0) if run.over is None else run.over.num_parameters()
    served = served_size(run.model)
    change = None if run.untrained is None else step_norm(run.untrained, factors(run.model))
    if change is not None:
        check_finite(change, "the norm of delta(B A)", LOWER.format(recipe.training.peak_rate))
    return RunResult(
        method=recipe.method,
        model=recipe.model,
        model_origin=run.source.origin,
        data_origin=run.examples.train.origin,
        learning_rate=recipe.training.peak_rate,
        seed=recipe.training.seed,
        steps=run.trainer.state.global_step,
        best_step=timed.best,
        processes=launched().size,
        train_seconds=timed.seconds,
        timed_steps=timed.steps,
        peak_bytes=peak_bytes(),
        lora_parameters=sum(p.numel() for p in run.model.parameters()) if served is None else served.numbers,
        served_rank=None if served is None else served.rank,
        served_bytes=None if served is None else served.bytes,
        served_error=left_out,
        trained_parameters=run.trained + cores - matrices,
        started_from=run.started_from,
        privacy=run.method.privacy,
        added_parameters=cores - matrices,
        gauge_numbers=0 if run.over is None else run.over.gauge_numbers(),
        update_norm=change,
        before=before,
        after=after,
        versions=environment(),
        hardware=hardware(),
        lengths=run.lengths,
        filtered=run.examples.train.filtered,
        skipped=run.examples.skipped,
        unread=dict(run.examples.train.unread),
    )


def _check_trained(result: RunResult, losses: Sequence[float]) -> None:
    """Raise FoldError for a result that leaves the model as it was, although training has lowered the loss."""
    if result.update_norm is not None:
        is_untrained = result.update_norm == 0
    else:  # of all weights there is no copy from before training
        is_untrained = result.before is not None and result.before == result.after
    if is_untrained and losses and min(losses) < losses[0]:
        raise FoldError(
            f"method {result.method} has changed nothing: the trained model equals the one before training, although "
            f"the training loss fell from {losses[0]:.4g} to {min(losses):.4g}. Nothing was published. If the learning "
            f"rate of {result.learning_rate:g} is lost in rounding, raise it; otherwise report this as a fault."
        )


def _publish(
    run: Prepared, result: RunResult, command: str, resume: bool, weights: Mapping[str, Tensor] | None
) -> None:
    """Write the adapter folder, then the run's result; `weights` replace those of which the model holds only a part."""
    card = _card(run.recipe, result, run.source, command)
    with publish_directory(product(run.recipe, run.output), replace=resume) as draft:
        run.model.save_pretrained(draft, state_dict=weights)
        run.reads.save_pretrained(draft)
        if run.over is not None:
            write_checkpoint(draft, run.over, step=result.steps if result.best_step is None else result.best_step)
        (draft / "README.md").write_text(card, encoding="utf-8")
    publish_text(run.output / RUN_FILE, result.model_dump_json(indent=1) + "\n")


def _card(recipe: Recipe, result: RunResult, base: ModelSource, command: str) -> str:
    licence = known_licence(base.name, base.revision)
    title, kind, library = "LoRA adapter", f"A {'DoRA' if recipe.lora.use_dora else 'plain LoRA'} adapter", "peft"
    if recipe.method == "full":
        title, kind, library = "Fine-tuned model", "A fine-tuned copy", "transformers"
    facts = result.facts() | base.facts()
    return model_card(title, base.name, facts, command, licence=licence, kind=kind, library=library)
