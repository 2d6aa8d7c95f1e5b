"""Recipes: what `loraover train` is asked to do, in YAML."""

from __future__ import annotations

import difflib
import math
import re
import reprlib
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from loraover.checkpoint.peft_adapter import KEPT_BASE
from loraover.common.errors import ConfigError
from loraover.overparam.config import LoraOverConfig

MAX_YAML_BYTES = 2**20

_short = reprlib.Repr()
_short.maxlevel = 2  # YAML aliases can unfold a few bytes into a giant


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Data(_Part):
    """Where examples come from."""

    train: str = Field(description="'word-problems', a JSONL file, a folder, or a hub name")
    test: str | None = Field(None, description="held-out data, likewise; absent: the hub's or folder's test_split")
    subset: str | None = Field(None, description="the hub's configuration name")
    train_split: str = "train"
    test_split: str = "test"
    revision: str | None = Field(None, description="commit or tag on the hub; the commit is pinned in the output")
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
    ] = "auto"
    keep: dict[str, re.Pattern[str]] = Field(
        default_factory=dict, description="read only rows in whose columns these regular expressions are found"
    )
    chat: bool | None = Field(None, description="use the tokenizer's chat template; absent: if it has one")
    train_examples: int | None = Field(None, ge=1)
    test_examples: int | None = Field(None, ge=1)


class Lora(_Part):
    """The adapter, in PEFT's terms."""

    r: int = Field(8, ge=1)
    lora_alpha: float = Field(16, gt=0, allow_inf_nan=False)
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: str | list[str] = "all-linear"
    use_rslora: bool = False
    use_dora: bool = Field(False, description="of plain LoRA; it is no product B A and cannot be over-parameterised")
    init_lora_weights: bool | str = Field(True, description="as PEFT spells it, e.g. pissa")
    rank_pattern: dict[str, int] = Field(default_factory=dict)
    alpha_pattern: dict[str, Annotated[float, Field(allow_inf_nan=False)]] = Field(default_factory=dict)

    @field_validator("target_modules", "rank_pattern", "alpha_pattern")
    @classmethod
    def _are_patterns(cls, value: Any) -> Any:
        for pattern in [value] if isinstance(value, str) else () if isinstance(value, list) else value:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is no regular expression, as PEFT takes it: {error}") from error
        return value


class Training(_Part):
    """The run, in the terms of transformers' TrainingArguments."""

    max_steps: int | None = Field(None, ge=1, description="optimizer steps; or else num_train_epochs")
    num_train_epochs: float | None = Field(None, gt=0, allow_inf_nan=False, description="passes over the training data")
    per_device_train_batch_size: int = Field(8, ge=1)
    gradient_accumulation_steps: int = Field(1, ge=1)
    learning_rate: float = Field(2e-4, gt=0, allow_inf_nan=False)
    lr_scheduler_type: Literal[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt"
    ] = "cosine"
    warmup_steps: int = Field(0, ge=0)
    warmup_ratio: float = Field(0.0, ge=0, lt=1, description="of all steps, in place of warmup_steps")
    weight_decay: float = Field(0.0, ge=0, allow_inf_nan=False)
    max_grad_norm: float = Field(1.0, ge=0, allow_inf_nan=False)
    optim: str = "adamw_torch_fused"
    loraplus_lr_ratio: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="LoRA+: learning rate of B as a multiple of A's, with AdamW"
    )
    max_length: int = Field(512, ge=8, description="tokens; longer examples are cut")
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    gradient_checkpointing: bool = False
    seed: int = Field(0, ge=0, lt=2**32)
    logging_steps: int = Field(10, ge=1)
    save_steps: int = Field(50, ge=1)
    save_total_limit: int = Field(2, ge=1, description="checkpoints kept; an old one goes once the new one is whole")

    @model_validator(mode="after")
    def _one_of_each(self) -> Training:
        if (self.max_steps is None) == (self.num_train_epochs is None):
            raise ValueError("give one of max_steps and num_train_epochs, the other null or not at all")
        if self.warmup_steps and self.warmup_ratio:
            raise ValueError("give one of warmup_steps and warmup_ratio")
        return self

    def steps(self, examples: int) -> int:
        """Optimizer steps of the run on one process, as the Trainer counts them: an epoch's last step may be smaller.

        Args:
            examples: for training.
        """
        if self.max_steps is not None:
            return self.max_steps
        assert self.num_train_epochs is not None
        batches = math.ceil(examples / self.per_device_train_batch_size)
        return math.ceil(self.num_train_epochs * math.ceil(batches / self.gradient_accumulation_steps))


class EvaluationSettings(_Part):
    """What is measured on held-out data, before and after."""

    examples: int = Field(100, ge=0, description="held-out examples; 0 measures nothing")
    before: bool = Field(True, description="measure the untrained model too")
    exact_match: bool = Field(True, description="generate answers and compare them with the references")
    answer: Literal["number", "text"] = Field("number", description="compare final numbers, or the whole text")
    max_new_tokens: int = Field(256, ge=1)
    batch_size: int = Field(16, ge=1)


class Recipe(_Part):
    """One training run."""

    description: str = ""
    model: str = Field(description="base model: folder or hub name")
    model_revision: str | None = Field(None, description="commit or tag on the hub; the commit is pinned in the output")
    method: Literal["lora", "lora-over", "full"] = Field(
        "lora-over", description="plain LoRA, LoRA-Over, or full: all weights of the model, for comparison"
    )
    data: Data
    lora: Lora = Lora()
    over: LoraOverConfig = LoraOverConfig()
    training: Training
    evaluation: EvaluationSettings = EvaluationSettings()
    tensorboard: bool = False
    diagnostics: bool = Field(False, description="log step norms, and norms and condition of the cores")
    push_to_hub: str | None = Field(None, description="repository to upload the adapter to")
    push_base: str | None = Field(
        None, description="base model that a pushed adapter names in place of the stand-in that it was trained on"
    )

    @model_validator(mode="after")
    def _can_be_folded(self) -> Recipe:
        start = self.lora.init_lora_weights
        if self.method == "lora-over" and isinstance(start, str) and start.lower() not in KEPT_BASE:
            raise ValueError(
                f"lora.init_lora_weights {start!r} changes the base weights, so no fold would be a plain LoRA; "
                "train it with method lora"
            )
        return self

    @property
    def trains_only_products(self) -> bool:
        """All that is trained is in delta_W = scaling * B A, so the norm of its change is the size of a step."""
        return self.method != "full" and not self.lora.use_dora


def recipe_names() -> list[str]:
    """The recipes that ship."""
    return sorted(p.name.removesuffix(".yaml") for p in files("loraover.training").joinpath("recipes").iterdir())


def load_recipe(name: str, overrides: dict[str, Any] | None = None) -> Recipe:
    """Read a recipe that ships, or a YAML file.

    Args:
        name: e.g. "demo", or a path.
        overrides: values by dotted key, e.g. {"training.seed": 1}.

    Raises:
        ConfigError: no such recipe, not YAML, or values that do not fit; every fault is named.
    """
    import yaml

    if name in recipe_names():
        content = files("loraover.training").joinpath("recipes", f"{name}.yaml").read_bytes()
    elif Path(name).is_file() and Path(name).stat().st_size <= MAX_YAML_BYTES:
        content = Path(name).read_bytes()
    else:
        near = difflib.get_close_matches(name, recipe_names(), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f", nor one of {', '.join(recipe_names())}."
        raise ConfigError(f"recipe {name!r}: no such YAML file (of at most {MAX_YAML_BYTES} bytes){hint}")
    try:
        values = yaml.safe_load(content)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"recipe {name!r}: not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"recipe {name!r}: expected keys such as model, data and training.")
    for key, value in (overrides or {}).items():
        _override(values, key, value)
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"recipe {name!r}: " + "; ".join(_faults(error))) from error


def parse_override(text: str) -> tuple[str, Any]:
    """Split "training.seed=1" into its key and its YAML value."""
    import yaml

    key, sign, value = text.partition("=")
    if not sign or not key:
        raise ConfigError(f"--set {text!r}: expected key=value, e.g. training.seed=1.")
    try:
        return key.strip(), yaml.safe_load(value)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date or number that is none
        raise ConfigError(f"--set {text!r}: the value is not YAML.") from error


def _override(values: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise ConfigError(f"{key}: {parent} holds a value, not keys.")
    values[last] = value


def _faults(error: ValidationError) -> list[str]:
    """One line per fault; unknown keys come with the nearest known one."""
    faults = []
    for fault in error.errors(include_url=False):
        place = ".".join(map(str, fault["loc"]))
        if fault["type"] == "extra_forbidden":
            near = difflib.get_close_matches(str(fault["loc"][-1]), _known_keys(fault["loc"][:-1]), n=1)
            faults.append(f"{place}: unknown key" + (f"; did you mean {near[0]!r}?" if near else ""))
        elif fault["type"] == "missing":
            faults.append(f"{place}: required and missing")
        else:
            faults.append(f"{place}: {fault['msg']} (found {_short.repr(fault['input'])})")
    return faults


def _known_keys(place: tuple[int | str, ...]) -> list[str]:
    model: Any = Recipe
    for part in place:
        field = model.model_fields.get(str(part)) if isinstance(model, type) and issubclass(model, BaseModel) else None
        if field is None:
            return []
        model = field.annotation
    return list(model.model_fields) if isinstance(model, type) and issubclass(model, BaseModel) else []
