"""Run a recipe: load, train, measure, and leave a run folder.

OUT/recipe.yaml       the recipe, with hub revisions pinned, and the folder of a stand-in for the hub's model
OUT/metrics.jsonl     one object per logging step and measure
OUT/trainer/          sealed checkpoints to resume from
OUT/adapter/          the trained adapter; a LoRA-Over checkpoint if that was the method; OUT/model/ of full
OUT/held_out.json     [nats, tokens] of each held-out completion after training
OUT/run.json          measures before and after, sizes, origins, versions
OUT/failure.json      why there is no run.json, if the run failed
"""

from __future__ import annotations

import difflib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model, load_peft_weights, set_peft_model_state_dict
from safetensors.torch import load_model as load_weights
from transformers import PreTrainedModel, Trainer, set_seed
from transformers.training_args import OptimizerNames

from loraover.callbacks.loraover_callback import LoraOverCallback
from loraover.callbacks.seal_checkpoints import last_whole_checkpoint
from loraover.callbacks.step_norm import Factors, factors, step_norm
from loraover.checkpoint.checkpoint import write_checkpoint
from loraover.common.atomic_output import check_free, publish_directory, publish_text
from loraover.common.errors import ConfigError, DataError, DivergedError, OutputError
from loraover.common.provenance import environment, hardware, peak_bytes
from loraover.evaluation.held_out import exact_match, example_losses, token_loss
from loraover.models.licence import known_licence
from loraover.models.load import ModelSource, is_encoder_decoder, load_model, load_tokenizer, resolve_model
from loraover.overparam.parameterization import OverParameterization
from loraover.overparam.schedule import Schedule
from loraover.overparam.sites import find_sites
from loraover.reporting.model_card import model_card
from loraover.reporting.reporter import Reporter, log_shown
from loraover.training.examples import Examples, load_examples
from loraover.training.failure import FAILURE_FILE, holds_only_failure, record_failure
from loraover.training.hf_trainer import make_trainer
from loraover.training.push import moved_copy, push, pushed_base
from loraover.training.recipe import Recipe
from loraover.training.run_result import Measures, RunResult

HELD_OUT_FILE = "held_out.json"
BEFORE, AFTER = "before training", "after training"


@dataclass(frozen=True)
class Prepared:
    """Everything that a run needs before its first step.

    Args:
        untrained: A and B of every module as they are made; None where more than their product is trained.
        pushed_base: model that a pushed adapter names in place of the stand-in that it was trained on.
    """

    source: ModelSource
    tokenizer: Any
    examples: Examples
    model: PreTrainedModel | PeftModel
    untrained: dict[str, Factors] | None
    trainer: Trainer
    callback: LoraOverCallback | None
    pushed_base: ModelSource | None

    @property
    def over(self) -> OverParameterization | None:
        """Owner of the cores, once training has begun; None for plain LoRA."""
        return None if self.callback is None else self.callback.over


class Timed(NamedTuple):
    """Steps that this process has taken, which are not all of a run that was resumed, and their seconds."""

    steps: int
    seconds: float


def train(recipe: Recipe, output: Path, *, resume: bool, report: Reporter, command: str) -> RunResult:
    """Train an adapter as the recipe says.

    Args:
        recipe: what to do.
        output: a new folder; with `resume`, the folder of the run to continue. A run that fails leaves `failure.json`
            in it, see `record_failure`.
        resume: continue from the last whole checkpoint in `output`, or from the start without one.
        report: shows progress.
        command: what the user typed, for the model card.

    Raises:
        ConfigError, DataError, CheckpointError, OutputError: with what was found and expected. A run that is refused
            before its first step leaves no folder.
        DivergedError: weights are no longer finite at the end, or in the checkpoint to resume from.
    """
    _claim(output, resume)
    run = None
    try:
        run = _prepare(recipe, output, report)
        before = _measure(run, recipe, output, report, BEFORE)
        checkpoint = last_whole_checkpoint(output / "trainer") if resume else None
        (output / FAILURE_FILE).unlink(missing_ok=True)
        _trim_metrics(output / "metrics.jsonl", checkpoint)
        with log_shown(report):
            timed = _take_steps(run, recipe, checkpoint)
        if not all(bool(p.isfinite().all()) for p in run.model.parameters() if p.requires_grad):
            raise DivergedError(
                "training diverged: the loss is no longer a number at learning rate "
                f"{recipe.training.learning_rate:g}; lower it. The log is {output / 'metrics.jsonl'}."
            )
        after = _measure(run, recipe, output, report, AFTER)
        result = _result(run, recipe, timed, before, after)
        _publish(run, recipe, output, result, command)
    except BaseException as error:
        has_stepped = run is not None and run.trainer.state.global_step > 0
        record_failure(output, error, has_stepped=has_stepped, is_resumed=resume)
        raise
    if recipe.push_to_hub is not None:
        _push(recipe.push_to_hub, run, recipe, output, result, command)
        report.line(f"uploaded to {recipe.push_to_hub}")
    return result


def _result(run: Prepared, recipe: Recipe, timed: Timed, before: Measures | None, after: Measures | None) -> RunResult:
    cores, matrices = (0, 0) if run.over is None else run.over.num_parameters()
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
        added_parameters=cores - matrices,
        update_norm=None if run.untrained is None else step_norm(run.untrained, factors(run.model)),
        before=before,
        after=after,
        versions=environment(),
        hardware=hardware(),
    )


def _publish(run: Prepared, recipe: Recipe, output: Path, result: RunResult, command: str) -> None:
    """The adapter folder, and the run's result once that is whole."""
    card = _card(recipe, result, run.source, command)
    with publish_directory(product(recipe, output)) as draft:
        run.model.save_pretrained(draft)
        run.tokenizer.save_pretrained(draft)
        if run.over is not None:
            write_checkpoint(draft, run.over, step=result.steps)
        (draft / "README.md").write_text(card, encoding="utf-8")
    publish_text(output / "run.json", result.model_dump_json(indent=1) + "\n")


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


def product(recipe: Recipe, output: Path) -> Path:
    """The folder in a run's output that holds what was trained."""
    return output / ("model" if recipe.method == "full" else "adapter")


def _claim(output: Path, resume: bool) -> None:
    """Make the run folder, or check that there is a run to continue."""
    if not resume:
        if not holds_only_failure(output):
            check_free(output.absolute())
        try:
            (output / "trainer").mkdir(parents=True)
        except OSError as error:
            raise OutputError(f"cannot write {output}: {error.strerror}.") from error
    elif any((output / name).exists() for name in ("adapter", "model")):
        raise ConfigError(f"{output}: the run is finished already; what it trained is in there.")
    elif not (output / "recipe.yaml").is_file():
        raise ConfigError(f"{output}: holds no run to resume.")


def _prepare(recipe: Recipe, output: Path, report: Reporter) -> Prepared:
    _check_names(recipe)
    source = resolve_model(recipe.model, recipe.model_revision)
    report.line(f"base model: {source.origin}")
    named = pushed_base(recipe, source, report.line)
    is_seq2seq = is_encoder_decoder(source)
    tokenizer = load_tokenizer(source)
    examples = load_examples(recipe, chat=_use_chat(recipe, tokenizer, is_seq2seq))
    if tokenizer.chat_template is None and not isinstance(examples.train.rows[0]["prompt"], str):
        raise DataError(
            f"{recipe.data.train}: holds chat messages, but the tokenizer of {recipe.model} has no chat template."
        )
    report.line(f"training data: {examples.train.origin}, {len(examples.train.rows)} examples")
    _write_recipe(output, recipe, source, examples)

    set_seed(recipe.training.seed)
    task = "SEQ_2_SEQ_LM" if is_seq2seq else "CAUSAL_LM"
    base = load_model(source, dtype="bf16" if recipe.training.precision == "bf16" else "fp32", task_type=task)
    model = base if recipe.method == "full" else with_adapter(base, recipe, task, source)
    untrained = factors(model) if recipe.trains_only_products else None
    over = LoraOverCallback(recipe.over) if recipe.method == "lora-over" else None
    trainer = make_trainer(recipe, model, tokenizer, examples, output, is_seq2seq, report, over)
    _check_trainer(trainer, recipe, len(examples.train.rows), report)
    if over is not None:
        Schedule(recipe.over, find_sites(model), steps=_steps(recipe, trainer), probe=None)
    return Prepared(source, tokenizer, examples, model, untrained, trainer, over, named)


def with_adapter(base: PreTrainedModel, recipe: Recipe, task: str, source: ModelSource) -> PeftModel:
    """The base model with the recipe's LoRA, untrained.

    Raises:
        ConfigError: PEFT refuses the recipe's `lora`.
    """
    base.name_or_path = source.name
    try:
        return get_peft_model(base, LoraConfig(task_type=task, revision=source.revision, **recipe.lora.model_dump()))
    except ValueError as error:
        raise ConfigError(f"lora: PEFT refuses it: {error}") from error


def _check_names(recipe: Recipe) -> None:
    """What can be checked before anything is loaded, beyond the recipe's own types."""
    known = [str(name.value) for name in OptimizerNames]
    if recipe.training.optim not in known:
        near = difflib.get_close_matches(recipe.training.optim, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f", expected one of {', '.join(known)}."
        raise ConfigError(f"training.optim is {recipe.training.optim!r}{hint}")
    if recipe.training.precision == "fp16" and not torch.accelerator.is_available():
        raise ConfigError("training.precision is fp16, which needs an accelerator; use fp32 or bf16 on a CPU.")


def _check_trainer(trainer: Trainer, recipe: Recipe, rows: int, report: Reporter) -> None:
    """What can be checked of a trainer before its first step.

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
    """Steps of the whole run; a trainer may leave out examples that have no room for a completion."""
    return recipe.training.steps(len(trainer.train_dataset))


def _take_steps(run: Prepared, recipe: Recipe, checkpoint: Path | None) -> Timed:
    """Train from the start, from a checkpoint, or not at all where the checkpoint holds the last step."""
    if run.callback is not None:
        run.callback.resume_from = checkpoint
    steps = _steps(recipe, run.trainer)
    step = 0 if checkpoint is None else int(checkpoint.name.removeprefix("checkpoint-"))
    if checkpoint is None or step < steps:
        started = time.perf_counter()
        run.trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        return Timed(run.trainer.state.global_step - step, time.perf_counter() - started)
    if isinstance(run.model, PeftModel):
        set_peft_model_state_dict(run.model, load_peft_weights(str(checkpoint)))
    else:
        load_weights(run.model, checkpoint / "model.safetensors")
    if run.callback is not None:
        run.callback.restore(run.model, checkpoint, recipe.training.seed, steps=steps)
    run.trainer.state.global_step = step
    return Timed(0, 0.0)


def _write_recipe(output: Path, recipe: Recipe, source: ModelSource, examples: Examples) -> None:
    import yaml

    pinned = recipe.model_copy(
        update={
            "model": source.name,
            "model_revision": source.revision,
            "data": recipe.data.model_copy(update={"revision": examples.train.revision}),
        }
    )
    values = pinned.model_dump(mode="json")
    path = output / "recipe.yaml"
    if path.is_file() and (previous := _read_yaml(path)) != values:
        changed = sorted(key for key in values if previous.get(key) != values[key])
        raise ConfigError(f"{path}: the run was started with another recipe ({', '.join(changed)} differ); start anew.")
    publish_text(path, yaml.safe_dump(values, sort_keys=False))


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    try:
        values = yaml.safe_load(path.read_bytes())
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{path}: not YAML; the run cannot be resumed. Start anew.") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: holds no recipe; the run cannot be resumed. Start anew.")
    return values


def _use_chat(recipe: Recipe, tokenizer: Any, is_seq2seq: bool) -> bool:
    has_template = tokenizer.chat_template is not None
    if recipe.data.chat and not has_template:
        raise ConfigError(f"data.chat is true, but the tokenizer of {recipe.model} has no chat template.")
    return has_template and not is_seq2seq if recipe.data.chat is None else recipe.data.chat


def _measure(run: Prepared, recipe: Recipe, output: Path, report: Reporter, when: str) -> Measures | None:
    """Loss and exact match on the held-out rows, which are logged too."""
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
            f"training.max_length = {recipe.training.max_length}: the loss is that of the others"
        )
    if when == AFTER:
        publish_text(output / HELD_OUT_FILE, json.dumps(scored) + "\n")
    report.line(f"{when}: {measures}")
    metrics, step = output / "metrics.jsonl", run.trainer.state.global_step
    if step or not metrics.is_file():
        with metrics.open("a") as file:
            file.write(json.dumps({"step": step, "eval_loss": loss, "exact_match": accuracy}) + "\n")
    return measures


def _trim_metrics(path: Path, checkpoint: Path | None) -> None:
    """Forget what was logged after the checkpoint that the run resumes from, and lines that were cut off."""
    if not path.is_file():
        return
    step = 0 if checkpoint is None else int(checkpoint.name.removeprefix("checkpoint-"))
    kept = [line for line in path.read_text().splitlines() if 0 <= _step_of(line) <= step]
    publish_text(path, "".join(line + "\n" for line in kept))


def _step_of(line: str) -> int:
    """Step of a line of the log; -1 of a line that was cut off."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return -1
