"""The trainer of TRL or transformers that a recipe asks for."""

from __future__ import annotations

import inspect
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.optimizers import create_loraplus_optimizer
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from loraover.callbacks.calibration import trainer_loss
from loraover.callbacks.diagnostics import DiagnosticsCallback
from loraover.callbacks.loraover_callback import LoraOverCallback
from loraover.callbacks.seal_checkpoints import SealCheckpoints
from loraover.common.errors import ConfigError, DataError
from loraover.common.extras import install
from loraover.common.later import later_step
from loraover.common.provenance import peak_bytes
from loraover.common.ranks import launched
from loraover.common.reporter import Reporter
from loraover.data.formats import Row
from loraover.data.sources import keep_numbers
from loraover.training.launch.defaults import Settled
from loraover.training.launch.settings import build
from loraover.training.method import TrainingMethod, optimizer_class, optimizer_options
from loraover.training.recipe import Recipe
from loraover.training.recipe_parts import SOAP
from loraover.training.rows.data import Examples
from loraover.training.trainers import TRAINERS, find_reward


def make_trainer(
    settled: Settled,
    model: PreTrainedModel | PeftModel,
    sets: Mapping[str, Any],
    arguments: Any,
    progress: TrainingProgress,
    over: LoraOverCallback | None,
) -> Trainer:
    """Make a recipe's trainer."""
    recipe, name = settled.recipe, settled.trainer_name
    kind, _ = TRAINERS[name].load()
    callbacks: list[TrainerCallback] = [] if over is None else [over]
    callbacks += [MethodCallback(settled.method), progress, SealCheckpoints()]
    options: dict[str, Any] = {}
    if name == "grpo":
        options["reward_funcs"] = [find_reward(reward) for reward in recipe.reward_funcs]
    if TRAINERS[name].library == "trl":
        _project_labelled_positions_only()
    with _unrounded(model, recipe):
        trainer: Trainer = build(
            kind,
            "training",
            {
                "model": model,
                "args": arguments,
                **_data(settled, model, sets),
                "processing_class": settled.reads,
                "callbacks": callbacks,
                **options,
            },
        )
    if isinstance(model, PeftModel) and "ref" in model.peft_config:
        # TRL copies A and B of before training into a reference. They add nothing yet, so that the base model without
        # an adapter, which TRL takes where there is no copy, is the same reference. A recipe with lora.start_from is
        # refused where there is a reference.
        model.delete_adapter("ref")
    _give_optimizer(trainer, recipe)
    if launched().size > 1 and leaves_out_repeated(name, trainer):
        _leave_out_repeated(trainer)
    trainer.remove_callback(PrinterCallback)
    if recipe.verify_rollouts:
        later_step("verify-rollouts")(trainer, action="stop" if recipe.verify_rollouts == "stop" else "warn")
    if recipe.diagnostics and recipe.trains_only_products:
        DiagnosticsCallback(over).add_to(trainer)
    if over is not None and name not in ("sft", "seq2seq", "classification"):
        over.loss = trainer_loss(trainer)
    return trainer


@contextmanager
def _unrounded(model: PreTrainedModel | PeftModel, recipe: Recipe) -> Iterator[None]:
    """Keep the dtype of parameters on a quantised base: TRL rounds them to bfloat16, the Trainer resumes in float32."""
    is_rounded = recipe.model_init.quantization in ("nf4", "int8")
    kept = {p: p.detach().clone() for p in model.parameters() if is_rounded and p.requires_grad}
    yield
    for parameter, values in kept.items():
        parameter.data = values.to(parameter.device)


def make_sets(examples: Examples) -> dict[str, Any]:
    """Return training and held-out rows as data sets, by the names that trainers give them."""
    parts = zip(("train_dataset", "eval_dataset"), examples.parts, strict=False)
    return {name: to_dataset(part.rows, examples.have_pictures) for name, part in parts}


def _data(settled: Settled, model: PreTrainedModel | PeftModel, sets: Mapping[str, Any]) -> dict[str, Any]:
    """Return the data that a trainer gets; trainers of TRL turn them into tokens themselves."""
    if TRAINERS[settled.trainer_name].library == "trl":
        return dict(sets)
    from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding

    tokenizer = settled.tokenizer
    limit: dict[str, Any] = {"truncation": True, "max_length": settled.recipe.training.tokens}

    def classified(row: dict[str, Any]) -> dict[str, Any]:
        return dict(tokenizer(row["text"], **limit)) | {"labels": row["label"]}

    def translated(row: dict[str, Any]) -> dict[str, Any]:
        labels = tokenizer(text_target=row["completion"], **limit)["input_ids"]
        return dict(tokenizer(row["prompt"], **limit)) | {"labels": labels}

    is_classifier = settled.trainer_name == "classification"
    encode = classified if is_classifier else translated
    encoded = {name: found.map(encode, remove_columns=found.column_names) for name, found in sets.items()}
    collator = DataCollatorWithPadding(tokenizer) if is_classifier else DataCollatorForSeq2Seq(tokenizer, model)
    return {**encoded, "data_collator": collator}


def to_dataset(rows: Sequence[Row], pictures: bool = False) -> Any:
    """Return rows as a data set whose messages and tools keep their own keys.

    Arrow would give all dicts of a column the same keys, and a tool would be called with the arguments of another row.
    """
    from datasets import Dataset, Features, Image, Json, List
    from pyarrow import ArrowException

    keep_numbers()
    kinds: dict[str, Any] = {"images": List(Image())} if pictures else {}
    empty: dict[str, Any] = {"chat_template_kwargs": {}}  # the value that TRL takes as none; None of other columns
    lacking = {name: empty.get(name) for row in rows for name in row} | {name: [] for name in kinds}
    rows = [lacking | row for row in rows]  # else the first row says which columns there are
    nested = {
        name: List(Json()) if isinstance(value, list) else Json()
        for row in rows
        for name, value in row.items()
        if isinstance(value, dict) or (isinstance(value, list) and value and isinstance(value[0], dict))
    }
    nested |= kinds
    try:
        plain = Dataset.from_list([{name: value for name, value in row.items() if name not in nested} for row in rows])
        return Dataset.from_list(rows, features=Features(plain.features | nested))
    except (ArrowException, OverflowError) as error:
        raise DataError(
            f"a column of the rows has values of several types, or beyond 64 bits; write all values of a column in one "
            f"type ({error})"
        ) from error


def _project_labelled_positions_only() -> None:
    """Keep TRL's loss from projecting masked positions to the vocabulary on a CPU.

    Without Triton, TRL 1.16 projects all positions, for compilers that want fixed shapes. Nothing is compiled here, and
    the projection took half of a step of a small model with short answers. A TRL without that switch stays unchanged.
    """
    from trl.trainer import utils

    if hasattr(utils, "_use_triton"):
        utils._use_triton = lambda device: device.type in ("cpu", "cuda", "xpu")


def leaves_out_repeated(name: str, trainer: Any) -> bool:
    """Whether a loss is the mean over the labelled tokens of all processes, in rows that can be told apart."""
    is_mean = name == "sft" and trainer.model_accepts_loss_kwargs and trainer.args.average_tokens_across_devices
    joins_rows = getattr(trainer.data_collator, "padding_free", False)  # only the collator of TRL's sft has it
    return bool(is_mean and not trainer.args.label_smoothing_factor and not joins_rows)


def _leave_out_repeated(trainer: Any) -> None:
    """Take the labels from rows that Accelerate repeats so that all processes have full batches until an epoch's end.

    Several processes then learn from the rows that one process learns from.
    """
    batches_of = trainer.get_batch_samples

    def labelled(batches: Iterator[Any]) -> Iterator[Any]:
        size = trainer.args.per_device_train_batch_size
        for batch in batches:
            state = trainer.accelerator.gradient_state
            if state.end_of_dataloader and state.remainder > 0:  # rows in the last micro-batches of all processes
                batch["labels"][max(state.remainder - launched().rank * size, 0) :] = -100
            yield batch

    trainer.get_batch_samples = lambda batches, *options: batches_of(labelled(batches), *options)


def _give_optimizer(trainer: Trainer, recipe: Recipe) -> None:
    """Let a trainer make the recipe's optimizer: its `optimizers` are ignored under DeepSpeed, refused under FSDP."""
    made = own_optimizer(recipe, trainer.args)
    if made is None:
        if recipe.training.optim_args is not None:
            trainer.optimizer_cls_and_kwargs = optimizer_class(trainer.args, trainer.model)
        return

    def factory(*parameters: Any) -> Any:
        """Make the optimizer, as older versions of transformers ask, or return a function of the model for it."""
        return made(trainer.model) if parameters else made

    trainer.optimizer_cls_and_kwargs = (factory, {})


def own_optimizer(recipe: Recipe, asked: TrainingArguments) -> Callable[[Any], Any] | None:
    """Return a function of the model that makes an optimizer; None where the Trainer makes it."""
    training = recipe.training
    if training.optim == SOAP:
        kind, options = _soap(recipe), optimizer_options(recipe.training.optim_args)

        def soap(model: Any) -> Any:
            try:
                return _with_rates(recipe, model, kind, options)
            except (TypeError, ValueError) as error:
                raise ConfigError(f"training.optim_args: SOAP refuses them: {error}") from error

        return soap
    if training.loraplus_lr_ratio is None:
        return None
    if recipe.method == "full" or training.optim not in ("adamw_torch", "adamw_torch_fused"):
        raise ConfigError("training.loraplus_lr_ratio needs a LoRA and optim adamw_torch, adamw_torch_fused or soap.")
    if training.optim_args is not None:
        raise ConfigError("training.optim_args: with loraplus_lr_ratio, only optim soap takes them; leave them out.")
    return lambda model: _with_rates(recipe, model, *Trainer.get_optimizer_cls_and_kwargs(asked))


def _with_rates(recipe: Recipe, model: Any, kind: Any, options: Mapping[str, Any]) -> Any:
    """Make an optimizer, if the recipe asks for it with a higher rate for B (LoRA+, Hayou et al., arXiv:2402.12354).

    Embeddings' A and B have the learning rate itself; PEFT's default for them is 1e-6, whatever the recipe asks for.
    """
    training = recipe.training
    rate, decay = training.peak_rate, training.weight_decay
    options = {name: value for name, value in options.items() if name != "lr"}
    if training.loraplus_lr_ratio is None:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return kind(trained, lr=rate, weight_decay=decay, **options)
    return create_loraplus_optimizer(
        model,
        kind,
        lr=rate,
        loraplus_lr_ratio=training.loraplus_lr_ratio,
        loraplus_lr_embedding=rate,
        loraplus_weight_decay=decay,
        **options,
    )


def _soap(recipe: Recipe) -> Any:
    """SOAP (Vyas et al. 2024, arXiv:2409.11321) as pytorch-optimizer has it; its first step only measures."""
    try:
        import pytorch_optimizer
    except ImportError as error:
        raise ConfigError(f"training.optim {SOAP} needs pytorch-optimizer: {install(SOAP)}.") from error
    if unread := [key for key in recipe.training.model_extra or {} if key.startswith("adam_")]:
        raise ConfigError(f"training.{unread[0]}: optim {SOAP} takes its options from optim_args alone; leave it out.")
    known = sorted({*inspect.signature(pytorch_optimizer.SOAP).parameters} - {"params", "lr", "weight_decay", "kwargs"})
    if unknown := sorted({*optimizer_options(recipe.training.optim_args)} - {*known}):
        raise ConfigError(f"training.optim_args: {unknown[0]!r} is unknown, expected one of {', '.join(known)}.")
    return pytorch_optimizer.SOAP


class MethodCallback(TrainerCallback):
    """Callback that lets a method act before the Trainer's steps and with its checkpoints, before they are sealed."""

    def __init__(self, method: TrainingMethod) -> None:
        self.method = method

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.method.begin()

    def on_step_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        self.method.before_step(state.global_step, state.max_steps, optimizer)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.should_save:
            self.method.save(Path(args.output_dir) / f"checkpoint-{state.global_step}")


class TrainingProgress(TrainerCallback):
    """Shows the Trainer's steps and writes its log, with the schedule's decisions, to a JSONL file.

    Set `advance` to a function that is called with the number of steps taken so far.

    Args:
        report: Receiver of losses.
        metrics: The JSONL file, to which lines are appended; None: another process writes it.
    """

    def __init__(self, report: Reporter, metrics: Path | None) -> None:
        self.report = report
        self.metrics = metrics
        self._written = 0
        self.advance: Callable[[int], None] = lambda done: None
        self.advance_evaluation: Callable[[int], None] = lambda done: None
        self._evaluated = 0
        self._begun = self._logged = (0, 0.0)  # steps or tokens, and the time

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._written = len(state.log_history)
        self._begun = (state.global_step, time.perf_counter())

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.advance(state.global_step)
        self._write(state)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._evaluated += args.per_device_eval_batch_size
        self.advance_evaluation(self._evaluated)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self._write(state)
        if logs is not None and "loss" in logs:
            loss = f"step {state.global_step:>5}/{state.max_steps}  loss {float(logs['loss']):.4f}"
            self.report.line(", ".join((loss, *self._pace(state, logs))))

    def _pace(self, state: TrainerState, logs: dict[str, Any]) -> Iterator[str]:
        """Yield tokens per second since the last line, where the trainer counts tokens, peak memory and time left."""
        now = time.perf_counter()
        if "num_tokens" in logs:
            (before, then), self._logged = self._logged, (logs["num_tokens"], now)
            if 0 < before < logs["num_tokens"]:
                yield f"{(logs['num_tokens'] - before) / (now - then):,.0f} tokens/s"
        yield f"peak {peak_bytes() / 1e9:.2f} GB"
        first, begun = self._begun
        if (left := state.max_steps - state.global_step) and state.global_step > first:
            yield f"{timedelta(seconds=round(left * (now - begun) / (state.global_step - first)))} left"

    def _write(self, state: TrainerState) -> None:
        if self.metrics is None:
            return
        rows = state.log_history[self._written :]
        with self.metrics.open("a") as file:
            file.writelines(json.dumps({"step": row["step"], **row}) + "\n" for row in rows)
        self._written += len(rows)
