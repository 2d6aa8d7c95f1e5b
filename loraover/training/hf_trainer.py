"""The Hugging Face trainer that a recipe asks for."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from packaging.version import Version
from peft import PeftModel
from peft.optimizers import create_loraplus_optimizer
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback

from loraover.callbacks.diagnostics import DiagnosticsCallback
from loraover.callbacks.loraover_callback import LoraOverCallback
from loraover.callbacks.seal_checkpoints import SealCheckpoints
from loraover.common.errors import ConfigError, DataError
from loraover.training.examples import Examples
from loraover.training.methods.base import TrainingMethod
from loraover.training.progress import TrainingProgress
from loraover.training.recipe import Recipe
from loraover.training.recipe_parts import SOAP
from loraover.training.run_folder import TRAINER_FOLDER

PRECISION = {
    "fp32": {"bf16": False, "fp16": False},
    "bf16": {"bf16": True, "fp16": False},
    "fp16": {"bf16": False, "fp16": True},
}


def make_trainer(
    recipe: Recipe,
    model: PreTrainedModel | PeftModel,
    tokenizer: Any,
    examples: Examples,
    output: Path,
    is_seq2seq: bool,
    progress: TrainingProgress,
    over: LoraOverCallback | None,
    method: TrainingMethod,
) -> Trainer:
    """Make TRL's SFTTrainer for a causal model, Seq2SeqTrainer for an encoder-decoder; loss on the completion only.

    Args:
        recipe: The recipe.
        model: The model to train, with its adapter unless all weights are trained.
        tokenizer: The model's tokenizer.
        examples: Training and held-out rows.
        output: The run's folder.
        is_seq2seq: Whether the model is an encoder-decoder.
        progress: Writer of the run's log.
        over: Owner of the cores; None for other methods.
        method: The recipe's method.

    Raises:
        ConfigError: A value that the trainer refuses.
    """
    from datasets import Dataset

    options = _options(recipe, output)
    train_set = Dataset.from_list(examples.train.rows)
    eval_set = Dataset.from_list(examples.test.rows) if examples.test is not None else None
    callbacks: list[TrainerCallback] = [] if over is None else [over]
    callbacks += [MethodCallback(method)]
    callbacks += [DiagnosticsCallback(over)] if recipe.diagnostics and recipe.trains_only_products else []
    callbacks += [progress, SealCheckpoints()]
    if is_seq2seq:
        trainer = _seq2seq_trainer(recipe, model, tokenizer, options, train_set, eval_set, callbacks)
    else:
        from trl import SFTConfig, SFTTrainer

        _project_labelled_positions_only()
        trainer = SFTTrainer(
            model,
            _arguments(SFTConfig, options | {"max_length": recipe.training.max_length, "completion_only_loss": True}),
            train_dataset=train_set,
            eval_dataset=eval_set,
            processing_class=tokenizer,
            callbacks=callbacks,
            optimizers=(_optimizer(recipe, model), None),
        )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _options(recipe: Recipe, output: Path) -> dict[str, Any]:
    """Options of a recipe in the words of transformers' TrainingArguments."""
    ours = {"precision", "max_length", "loraplus_lr_ratio", "warmup_ratio", "min_lr_rate", "optim_args"}
    if recipe.training.optim == SOAP:
        ours.add("optim")
    options = recipe.training.model_dump(exclude=ours, exclude_none=True)
    options |= PRECISION[recipe.training.precision]
    if recipe.training.warmup_ratio:
        takes_share = Version(transformers.__version__) >= Version("5")
        options["warmup_steps" if takes_share else "warmup_ratio"] = recipe.training.warmup_ratio
    if recipe.training.min_lr_rate:
        options |= {
            "lr_scheduler_type": "cosine_with_min_lr",
            "lr_scheduler_kwargs": {"min_lr_rate": recipe.training.min_lr_rate},
        }
    options |= {
        "output_dir": str(output / TRAINER_FOLDER),
        "per_device_eval_batch_size": recipe.training.per_device_train_batch_size,
        "report_to": ["tensorboard"] if recipe.tensorboard else "none",
        "disable_tqdm": True,
        "use_cpu": not torch.accelerator.is_available(),
    }
    return options


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


def _arguments(kind: Any, options: dict[str, Any]) -> Any:
    """Make the trainer's arguments."""
    try:
        return kind(**options)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"training: {kind.__name__} refuses it: {error}") from error


def _project_labelled_positions_only() -> None:
    """Keep TRL's loss from projecting masked positions to the vocabulary on a CPU.

    Without Triton, TRL 1.16 projects all positions, for compilers that want fixed shapes. Nothing is compiled here, and
    the projection took half of a step of a small model with short answers. A TRL without that switch stays unchanged.
    """
    from trl.trainer import utils

    if hasattr(utils, "_use_triton"):
        utils._use_triton = lambda device: device.type in ("cpu", "cuda", "xpu")


def _optimizer(recipe: Recipe, model: PreTrainedModel | PeftModel) -> Any:
    """Make an optimizer that the Trainer does not know; None: the Trainer makes its own."""
    training = recipe.training
    if training.optim == SOAP:
        try:
            return _with_rates(recipe, model, _soap(recipe), training.optim_args)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"training.optim_args: SOAP refuses them: {error}") from error
    if training.loraplus_lr_ratio is None:
        return None
    if not isinstance(model, PeftModel) or training.optim not in ("adamw_torch", "adamw_torch_fused"):
        raise ConfigError("training.loraplus_lr_ratio needs a LoRA and optim adamw_torch, adamw_torch_fused or soap.")
    return _with_rates(recipe, model, torch.optim.AdamW, {"fused": training.optim == "adamw_torch_fused"})


def _with_rates(recipe: Recipe, model: Any, kind: Any, options: Mapping[str, Any]) -> Any:
    """Make an optimizer, if the recipe asks for it with a higher rate for B (LoRA+, Hayou et al., arXiv:2402.12354).

    Embeddings' A and B have the learning rate itself; PEFT's default for them is 1e-6, whatever the recipe asks for.
    """
    training = recipe.training
    rate, decay = training.learning_rate, training.weight_decay
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
        raise ConfigError(f"training.optim {SOAP} needs pytorch-optimizer: pip install 'loraover[{SOAP}]'.") from error
    known = sorted({*inspect.signature(pytorch_optimizer.SOAP).parameters} - {"params", "lr", "weight_decay", "kwargs"})
    if unknown := sorted({*recipe.training.optim_args} - {*known}):
        raise ConfigError(f"training.optim_args: {unknown[0]!r} is none of {', '.join(known)}.")
    return pytorch_optimizer.SOAP


def _seq2seq_trainer(
    recipe: Recipe,
    model: PreTrainedModel | PeftModel,
    tokenizer: Any,
    options: dict[str, Any],
    train_set: Any,
    eval_set: Any,
    callbacks: Any,
) -> Trainer:
    from transformers import DataCollatorForSeq2Seq, Seq2SeqTrainer, Seq2SeqTrainingArguments

    def encode(row: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(row["prompt"], str):
            raise DataError(
                f"{recipe.data.train}: chat messages cannot train the encoder-decoder {recipe.model}; use text."
            )
        limit: dict[str, Any] = {"truncation": True, "max_length": recipe.training.max_length}
        encoded = dict(tokenizer(row["prompt"], **limit))
        encoded["labels"] = tokenizer(text_target=row["completion"], **limit)["input_ids"]
        return encoded

    columns = ["prompt", "completion"]
    return Seq2SeqTrainer(
        model,
        _arguments(Seq2SeqTrainingArguments, options),
        train_dataset=train_set.map(encode, remove_columns=columns),
        eval_dataset=None if eval_set is None else eval_set.map(encode, remove_columns=columns),
        data_collator=DataCollatorForSeq2Seq(tokenizer, model),
        processing_class=tokenizer,
        callbacks=callbacks,
        optimizers=(_optimizer(recipe, model), None),
    )
