"""Parts of a recipe: its keys but for the settings of the methods in `loraover.training.methods`."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from loraover.checkpoint.adapter_config import path_pattern
from loraover.overparam.config import LoraOverConfig

SOAP = "soap"
"""Name of the optimizer that transformers does not have."""

MEASURED_STARTS = {"eva": "the activations", "lora_ga": "the gradients"}
"""What PEFT computes each of these starts of A and B from, by calls of its own that a run does not make."""


class RecipePart(BaseModel):
    """Keys of a recipe that stand together."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Data(RecipePart):
    """Where examples come from."""

    train: str = Field(description="Training data: 'word-problems' (built in), a JSONL file, a folder or a hub name.")
    test: str | None = Field(
        None,
        description="Held-out data, named as in `train`; None: the split `test_split` of the training data.",
    )
    subset: str | None = Field(None, description="Name of a configuration on the hub, such as 'main'.")
    train_split: str = Field("train", description="Split to train on.")
    test_split: str = Field("test", description="Split to measure on.")
    revision: str | None = Field(
        None,
        description="Commit or tag of the training data on the hub, else of the held-out data; the run's copy has it.",
    )
    format: Literal[
        "auto",
        "prompt-completion",
        "messages",
        "gsm8k",
        "instruction",
        "conversations",
        "metamath",
        "codefeedback",
        "glue-mnli",
        "glue-sst2",
        "glue-cola",
        "glue-qnli",
        "glue-mrpc",
    ] = Field("auto", description="Form of the rows, see docs/recipes.md; auto: found from their columns.")
    keep: dict[str, re.Pattern[str]] = Field(
        default_factory=dict,
        description="Regular expression by column; only rows in which every expression is found are read.",
    )
    chat: bool | None = Field(
        None,
        description="Whether to write examples in the tokenizer's chat template; None: yes if the tokenizer has one.",
    )
    train_examples: int | None = Field(None, ge=1, description="Number of training examples; None: all.")
    test_examples: int | None = Field(None, ge=1, description="Largest number of held-out examples; None: no limit.")


class LoraSettings(RecipePart):
    """The adapter, in PEFT's terms."""

    r: int = Field(8, ge=1, description="Rank.")
    lora_alpha: float = Field(16, gt=0, allow_inf_nan=False, description="Scaling times rank.")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="Dropout before A.")
    target_modules: str | list[str] = Field(
        "all-linear", description="Adapted modules: 'all-linear', a list of endings of names, or a regular expression."
    )
    target_parameters: list[str] | None = Field(
        None,
        min_length=1,
        description="Adapted parameters that are no module's weight, such as those of experts: endings of their names.",
    )
    use_rslora: bool = Field(False, description="Scale by alpha / sqrt(r) in place of alpha / r.")
    use_dora: bool = Field(
        False, description="Train DoRA; its update is more than a product B A, so it cannot be over-parameterised."
    )
    init_lora_weights: bool | str = Field(True, description="Start of A and B, as PEFT spells it, such as 'pissa'.")
    rank_pattern: dict[str, int] = Field(default_factory=dict, description="Other ranks, by pattern of module names.")
    alpha_pattern: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]] = Field(
        default_factory=dict, description="Other alphas, by pattern of module names."
    )

    @field_validator("target_modules", "rank_pattern", "alpha_pattern")
    @classmethod
    def _are_patterns(cls, value: Any) -> Any:
        compiled = re.compile if isinstance(value, str) else path_pattern
        for pattern in [value] if isinstance(value, str) else () if isinstance(value, list) else value:
            try:
                compiled(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is not a regular expression, which PEFT expects: {error}") from error
        return value

    @field_validator("init_lora_weights")
    @classmethod
    def _can_be_made(cls, start: bool | str) -> bool | str:
        if isinstance(start, str) and start.lower() in MEASURED_STARTS:
            raise ValueError(
                f"{start!r} computes A and B from {MEASURED_STARTS[start.lower()]} of training batches, which loraover "
                "train does not measure, so PEFT would start otherwise; give another start, such as true or 'pissa'"
            )
        return start


class Training(RecipePart):
    """The run, in the terms of transformers' TrainingArguments."""

    max_steps: int | None = Field(None, ge=1, description="Optimizer steps, in place of num_train_epochs.")
    num_train_epochs: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="Passes over the training data, in place of max_steps."
    )
    per_device_train_batch_size: int = Field(8, ge=1, description="Examples in a micro-batch.")
    gradient_accumulation_steps: int = Field(1, ge=1, description="Micro-batches in an optimizer step.")
    learning_rate: float = Field(2e-4, gt=0, allow_inf_nan=False, description="Peak learning rate.")
    lr_scheduler_type: Literal[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt"
    ] = Field("cosine", description="Course of the learning rate.")
    min_lr_rate: float = Field(
        0.0, ge=0, lt=1, description="Learning rate at the end of a cosine, as a share of its peak."
    )
    warmup_steps: int = Field(0, ge=0, description="Optimizer steps in which the learning rate rises.")
    warmup_ratio: float = Field(0.0, ge=0, lt=1, description="Share of all steps, in place of warmup_steps.")
    weight_decay: float = Field(0.0, ge=0, allow_inf_nan=False, description="Weight decay, decoupled in AdamW.")
    max_grad_norm: float = Field(1.0, ge=0, allow_inf_nan=False, description="Largest gradient norm; 0: no clipping.")
    optim: str = Field("adamw_torch_fused", description="Optimizer, as transformers spells it, or soap.")
    optim_args: dict[str, bool | int | float | str | None] = Field(
        default_factory=dict, description="Options of soap, such as {max_precondition_dim: 1024}."
    )
    loraplus_lr_ratio: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="LoRA+: learning rate of B as a multiple of A's, with AdamW."
    )
    max_length: int = Field(512, ge=8, description="Tokens of an example; longer ones are cut.")
    precision: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="Data type of the computation.")
    gradient_checkpointing: bool = Field(False, description="Recompute activations in place of keeping them.")
    seed: int = Field(0, ge=0, lt=2**32, description="Seed of weights, data order and built-in examples.")
    logging_steps: int = Field(10, ge=1, description="Optimizer steps between two lines of the log.")
    save_steps: int = Field(50, ge=1, description="Optimizer steps between two checkpoints.")
    save_total_limit: int = Field(
        2, ge=1, description="Number of checkpoints kept; an old one is removed when the new one is complete."
    )

    @model_validator(mode="after")
    def _one_of_each(self) -> Training:
        if (self.max_steps is None) == (self.num_train_epochs is None):
            raise ValueError("give one of max_steps and num_train_epochs, the other null or not at all")
        if self.warmup_steps and self.warmup_ratio:
            raise ValueError("give one of warmup_steps and warmup_ratio")
        if self.lr_scheduler_type == "constant" and (self.warmup_steps or self.warmup_ratio):
            raise ValueError("lr_scheduler_type constant has no warmup; take constant_with_warmup")
        if self.min_lr_rate and self.lr_scheduler_type != "cosine":
            raise ValueError(f"min_lr_rate belongs to lr_scheduler_type cosine, not to {self.lr_scheduler_type}")
        if self.optim_args and self.optim != SOAP:
            raise ValueError(f"optim_args belongs to optim {SOAP}, not to {self.optim}")
        return self

    def steps(self, examples: int) -> int:
        """Count the run's optimizer steps on one process, as the Trainer does: an epoch's last step may be smaller.

        Args:
            examples: Number of training examples.
        """
        if self.max_steps is not None:
            return self.max_steps
        assert self.num_train_epochs is not None
        batches = math.ceil(examples / self.per_device_train_batch_size)
        return math.ceil(self.num_train_epochs * math.ceil(batches / self.gradient_accumulation_steps))


class EvaluationSettings(RecipePart):
    """What is measured on held-out data, before and after training."""

    examples: int = Field(100, ge=0, description="Number of held-out examples; 0 measures nothing.")
    before: bool = Field(True, description="Measure the untrained model too.")
    exact_match: bool = Field(True, description="Generate answers and compare them with the references.")
    answer: Literal["number", "text"] = Field(
        "number", description="What is compared: the final number of an answer, or all of its text."
    )
    max_new_tokens: int = Field(256, ge=1, description="Largest number of tokens in a generated answer.")
    batch_size: int = Field(16, ge=1, description="Answers generated at the same time.")


class BaseRecipe(RecipePart):
    """Keys that a recipe has whatever its method is."""

    description: str = Field("", description="What the recipe does, for people.")
    model: str = Field(description="Base model: folder or hub name.")
    model_revision: str | None = Field(
        None, description="Commit or tag on the hub; the run's copy of the recipe names the commit."
    )
    method: str = Field(
        "lora-over",
        description="Plain LoRA, LoRA-Over, full (all weights), or a method of docs/research/methods.md.",
    )
    data: Data = Field(description="Where examples come from.")
    lora: LoraSettings = Field(LoraSettings(), description="The adapter, in PEFT's terms.")
    over: LoraOverConfig = Field(LoraOverConfig(), description="Decomposition, schedule and budget of the cores.")
    training: Training = Field(description="The run, in the terms of transformers' TrainingArguments.")
    evaluation: EvaluationSettings = Field(EvaluationSettings(), description="Measures on held-out data.")
    tensorboard: bool = Field(False, description="Log to TensorBoard too.")
    diagnostics: bool = Field(False, description="Log step norms, and the norms and condition numbers of the cores.")
    push_to_hub: str | None = Field(None, description="Repository to upload the plain LoRA to.")
    push_checkpoint: bool = Field(False, description="Upload the cores too, to the repository's folder checkpoint.")
    push_model: str | None = Field(
        None, description="Base model that a pushed adapter names in place of the stand-in that it was trained on."
    )

    @property
    def settings(self) -> Any:
        """What the recipe has under the name of its method; None: no such key."""
        return getattr(self, self.method, None)
