"""Parts of a recipe: its keys except the settings of other methods, see `loraover.training.method_table`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from loraover.common.strict_json import StrictModel
from loraover.data.formats import FORMATS
from loraover.overparam.config import LoraOverConfig

SOAP = "soap"
"""Name of the optimizer that transformers does not have."""

MEASURED_STARTS = {"eva": "the activations", "lora_ga": "the gradients"}
"""Data from which PEFT computes each of these starts of A and B, by calls that a run does not make."""


AUTO = "auto"
BATCH = 8
"""Examples of a step where `per_device_train_batch_size` is auto."""

TrainerName = Literal["sft", "dpo", "kto", "orpo", "grpo", "reward", "seq2seq", "classification"]
"""Names of trainers; `loraover.training.trainers` says what each is."""


class Source(StrictModel):
    """Source of training data beside others."""

    path: str = Field(description="File, folder or hub name.")
    weight: float = Field(1.0, gt=0, allow_inf_nan=False, description="Share of the examples, relative to the others.")


class Data(StrictModel):
    """Where examples come from."""

    train: str | list[str | Source] = Field(
        min_length=1,
        description="Training data: 'word-problems' (built in), a JSONL, CSV or parquet file, a folder or a hub name; "
        "or a list of such sources, which are mixed.",
    )
    test: str | None = Field(
        None,
        description="Held-out data, named as in `train`; None: the split `test_split` of the training data.",
    )
    subset: str | None = Field(None, description="Name of a configuration on the hub, such as 'main'.")
    train_split: str = Field("train", description="Split to train on.")
    test_split: str = Field("test", description="Split to measure on.")
    revision: str | None = Field(
        None,
        description="Commit or tag of the training data on the hub, else of the held-out data; the run names it.",
    )
    format: str = Field("auto", description="Form of the rows, see docs/recipes.md; auto: found from their columns.")
    keep: dict[str, re.Pattern[str]] = Field(
        default_factory=dict,
        description="Regular expression by column; only rows in which every expression is found are read.",
    )
    skip_bad_rows: bool = Field(
        False, description="Leave out rows that cannot be read or learned, and count them, in place of stopping."
    )
    chat: bool | None = Field(
        None,
        description="Whether to write examples in the tokenizer's chat template; None: yes if the tokenizer has one.",
    )
    streaming: bool = Field(
        False, description="Read the training data only as far as max_steps needs, and download no more of them."
    )
    train_examples: int | None = Field(
        None, ge=1, description="Number of training examples, of all sources together; None: all."
    )
    test_examples: int | None = Field(None, ge=1, description="Largest number of held-out examples; None: no limit.")

    @property
    def sources(self) -> list[str]:
        """Names of the sources of training data."""
        parts = [self.train] if isinstance(self.train, str) else self.train
        return [part.path if isinstance(part, Source) else part for part in parts]

    @property
    def weights(self) -> list[float] | None:
        """Weights of several sources; None: each has as many examples as it holds."""
        parts = [self.train] if isinstance(self.train, str) else self.train
        if not any(isinstance(part, Source) for part in parts):
            return None
        return [part.weight if isinstance(part, Source) else 1.0 for part in parts]

    @property
    def name(self) -> str:
        """Names of the sources of training data, for messages."""
        return " + ".join(self.sources)

    @field_validator("format")
    @classmethod
    def _is_known(cls, name: str) -> str:
        if name not in ("auto", *FORMATS):
            raise ValueError(f"expected auto or one of {', '.join(FORMATS)}")
        return name


class OpenPart(StrictModel):
    """Keys of another library's class, which checks those that are not declared here; see `foreign_settings`."""

    model_config = ConfigDict(extra="allow", frozen=True)


class LoraSettings(OpenPart):
    """Fields of PEFT's LoraConfig."""

    r: int = Field(8, ge=1, description="Rank.")
    lora_alpha: float = Field(16, gt=0, allow_inf_nan=False, description="Scaling times rank.")
    target_modules: str | list[str] = Field(
        "all-linear", description="Adapted modules: 'all-linear', a list of endings of names, or a regular expression."
    )
    target_parameters: list[str] | None = Field(
        None,
        min_length=1,
        description="Adapted parameters other than modules' weights, such as those of experts: endings of their names.",
    )
    use_dora: bool = Field(
        False, description="Train DoRA; its update is more than a product B A, so it cannot be over-parameterised."
    )
    init_lora_weights: bool | str = Field(True, description="Start of A and B, as PEFT spells it, such as 'pissa'.")
    rank_pattern: dict[str, int] = Field(default_factory=dict, description="Other ranks, by pattern of module names.")
    start_from: str | list[str] | dict[str, float] | None = Field(
        None,
        min_length=1,
        description="Trained adapter that A and B start from: folder, hub name or address; or a list of adapters, or "
        "weights by adapter, whose sum they start from. None: as init_lora_weights says.",
    )

    @property
    def start_weights(self) -> dict[str, float]:
        """Weights of the adapters that A and B start from, by the adapters' names; empty if there are none."""
        if isinstance(self.start_from, dict):
            return self.start_from
        named = [self.start_from] if isinstance(self.start_from, str) else self.start_from or []
        return dict.fromkeys(named, 1.0)

    def with_start(self, names: Mapping[str, str]) -> LoraSettings:
        """Return the settings with other names for the same adapters."""
        start: Any = self.start_from
        if isinstance(start, str):
            start = names[start]
        elif isinstance(start, list):
            start = [names[name] for name in start]
        elif start is not None:
            start = {names[name]: weight for name, weight in start.items()}
        return self.model_copy(update={"start_from": start})

    @field_validator("init_lora_weights")
    @classmethod
    def _can_be_made(cls, start: bool | str) -> bool | str:
        if isinstance(start, str) and start.lower() in MEASURED_STARTS:
            raise ValueError(
                f"{start!r} computes A and B from {MEASURED_STARTS[start.lower()]} of training batches, which loraover "
                "train does not measure, so PEFT would start otherwise; give another start, such as true or 'pissa'"
            )
        return start

    @field_validator("start_from")
    @classmethod
    def _can_be_summed(cls, start: str | list[str] | dict[str, float] | None) -> Any:
        if isinstance(start, list) and len(set(start)) < len(start):
            raise ValueError("an adapter is named twice; name it once, with a weight, as in {maths: 2, code: 1}")
        for name, weight in start.items() if isinstance(start, dict) else ():
            if not weight or not math.isfinite(weight):
                raise ValueError(f"the weight of {name} is {weight:g}; give finite numbers other than 0")
        return start

    @model_validator(mode="after")
    def _has_one_start(self) -> LoraSettings:
        if self.start_from is None:
            return self
        if self.init_lora_weights is not True:
            raise ValueError(
                f"start_from and init_lora_weights {self.init_lora_weights!r} both say how A and B start; leave one out"
            )
        if self.use_dora:
            raise ValueError("use_dora trains magnitudes, which start_from does not set; leave one of the two out")
        return self


class ModelInit(StrictModel):
    """How the base model is loaded."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Data type of the base's weights; auto: bfloat16 with `training.bf16`, else float32."
    )
    attn_implementation: str | None = Field(
        None, description="Attention, as transformers spells it, such as 'sdpa' or 'flash_attention_2'."
    )
    quantization: Literal["nf4", "int8", "torchao-int8"] | None = Field(
        None, description="Form of the base's linear layers: bitsandbytes' nf4 or int8, or torchao's int8."
    )


class Training(OpenPart):
    """Fields of the trainer's config, such as TRL's SFTConfig; declared are those that this library uses or changes."""

    max_steps: int | None = Field(None, ge=1, description="Optimizer steps, in place of num_train_epochs.")
    num_train_epochs: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="Passes over the training data, in place of max_steps."
    )
    per_device_train_batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        8, description="Examples in a micro-batch; auto: the largest number that fits, with 8 examples in a step."
    )
    gradient_accumulation_steps: int = Field(1, ge=1, description="Micro-batches in an optimizer step.")
    learning_rate: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="Peak learning rate; None: by method and width, from the studies."
    )
    lr_scheduler_type: str = Field("cosine", description="Course of the learning rate; TRL's default is linear.")
    warmup_steps: float | None = Field(
        None, ge=0, description="Optimizer steps in which the rate rises; below 1: a share of all steps; None: 3 %."
    )
    weight_decay: float = Field(0.0, ge=0, allow_inf_nan=False, description="Weight decay, decoupled in AdamW.")
    max_grad_norm: float = Field(1.0, ge=0, allow_inf_nan=False, description="Largest gradient norm; 0: no clipping.")
    optim: str = Field("adamw_torch_fused", description="Optimizer, as transformers spells it, or soap.")
    optim_args: str | None = Field(
        None, description="Options of the optimizer's class, such as 'momentum=0.9,nesterov=true' of sgd."
    )
    loraplus_lr_ratio: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="LoRA+: learning rate of B as a multiple of A's, with AdamW."
    )
    max_length: int | None = Field(
        None, ge=8, description="Tokens of an example; longer ones are cut. None: the longest, or the model's context."
    )
    bf16: bool | None = Field(None, description="Compute in bfloat16; None: on a GPU that has it, or a CPU with AMX.")
    fp16: bool = Field(False, description="Compute in float16, with a scaled loss.")
    gradient_checkpointing: bool = Field(
        False, description="Recompute activations in place of keeping them; TRL's default is true."
    )
    seed: int = Field(0, ge=0, lt=2**32, description="Seed of weights, data order and built-in examples.")
    logging_steps: float = Field(10, gt=0, description="Optimizer steps between two lines of the log.")
    save_steps: float = Field(50, gt=0, description="Optimizer steps between two checkpoints.")
    save_total_limit: int = Field(
        2, ge=1, description="Number of checkpoints kept; an old one is removed when the new one is complete."
    )
    report_to: str | list[str] = Field("none", description="Trackers, as transformers names them.")

    @model_validator(mode="after")
    def _one_of_each(self) -> Training:
        if (self.max_steps is None) == (self.num_train_epochs is None):
            raise ValueError("give one of max_steps and num_train_epochs, the other null or not at all")
        if self.lr_scheduler_type == "constant" and self.warmup_steps:
            raise ValueError("lr_scheduler_type constant has no warmup; take constant_with_warmup")
        if self.bf16 and self.fp16:
            raise ValueError("give one of bf16 and fp16")
        return self

    @property
    def is_fp32(self) -> bool:
        """Whether the computation is in float32."""
        return not (self.bf16 or self.fp16)

    @property
    def assistant_only_loss(self) -> bool | None:
        """Whether TRL's SFTTrainer is to learn only the assistant's turns of `messages`; None: left open."""
        return (self.model_extra or {}).get("assistant_only_loss")

    @property
    def text_column(self) -> str:
        """Column of rows of text that TRL's SFTTrainer learns."""
        return (self.model_extra or {}).get("dataset_text_field") or "text"

    @property
    def chat_template_path(self) -> str | None:
        """File with the chat template that takes the place of the model's."""
        return (self.model_extra or {}).get("chat_template_path")

    @property
    def micro_batch(self) -> int:
        """Examples in a micro-batch, once that is known."""
        assert self.per_device_train_batch_size != AUTO
        return int(self.per_device_train_batch_size)

    @property
    def peak_rate(self) -> float:
        """Peak learning rate, once that is known."""
        assert self.learning_rate is not None
        return self.learning_rate

    @property
    def tokens(self) -> int:
        """Largest number of tokens of an example, once that is known."""
        assert self.max_length is not None
        return self.max_length

    def steps(self, examples: int, processes: int = 1) -> int:
        """Count the run's optimizer steps, as the Trainer does: an epoch's last step may be smaller."""
        if self.max_steps is not None:
            return self.max_steps
        assert self.num_train_epochs is not None
        batches = math.ceil(examples / self.micro_batch)
        in_a_step = self.gradient_accumulation_steps * processes
        return math.ceil(self.num_train_epochs * math.ceil(batches / in_a_step))


class Distributed(StrictModel):
    """How the processes that a launcher starts train one run together."""

    engine: Literal["ddp", "zero2", "zero3", "fsdp2"] = Field(
        "ddp",
        description="What is spread over the processes: the rows (ddp), also the optimizer's states (zero2), also the "
        "weights (zero3, fsdp2).",
    )
    config: str | dict[str, Any] | None = Field(
        None,
        description="Settings in place of ours: DeepSpeed's, or the fields of transformers' fsdp_config; "
        "or a JSON file that holds them.",
    )
    processes: int | None = Field(
        None,
        ge=1,
        description="Number of processes whose micro-batches make a step; fewer processes accumulate more "
        "micro-batches. None: as many as the run is started with.",
    )

    @model_validator(mode="after")
    def _has_settings(self) -> Distributed:
        if self.engine == "ddp" and self.config is not None:
            raise ValueError(
                "config is for distributed.engine zero2, zero3 or fsdp2; the fields training.ddp_... are for ddp"
            )
        return self


class EvaluationSettings(StrictModel):
    """Measures on held-out data, before and after training."""

    examples: int = Field(200, ge=0, description="Largest number of held-out examples; 0 measures nothing.")
    before: bool = Field(True, description="Measure the untrained model too.")
    exact_match: bool = Field(
        False, description="Generate answers and compare them with the references, which is slow."
    )
    answer: Literal["number", "text"] = Field(
        "number", description="What is compared: the final number of an answer, or all of its text."
    )
    max_new_tokens: int = Field(256, ge=1, description="Largest number of tokens in a generated answer.")
    batch_size: int = Field(16, ge=1, description="Answers generated at the same time.")


class BaseRecipe(StrictModel):
    """Keys that a recipe has whatever its method is."""

    description: str = Field("", description="What the recipe does, for people.")
    model: str = Field(description="Base model: folder or hub name.")
    model_revision: str | None = Field(
        None, description="Commit or tag on the hub; the run's copy of the recipe names the commit."
    )
    model_init: ModelInit = Field(ModelInit(), description="How the base model is loaded.")
    trainer: TrainerName | None = Field(
        None, description="Trainer; None: sft, or seq2seq for a model with an encoder and a decoder."
    )
    reward_funcs: list[str] = Field(
        default_factory=list,
        description="Rewards of trainer grpo: names of trl.rewards, or of a module's functions as 'module.function'.",
    )
    method: str = Field(
        "lora-over",
        description="Plain LoRA, LoRA-Over, full (all weights), or a method of docs/research/methods.md.",
    )
    data: Data = Field(description="Where examples come from.")
    lora: LoraSettings = Field(LoraSettings(), description="The adapter: fields of PEFT's LoraConfig.")
    over: LoraOverConfig = Field(LoraOverConfig(), description="Decomposition, schedule and budget of the cores.")
    training: Training = Field(description="The run: fields of the trainer's config class.")
    distributed: Distributed = Field(Distributed(), description="How several processes train the run together.")
    evaluation: EvaluationSettings = Field(EvaluationSettings(), description="Measures on held-out data.")
    diagnostics: bool = Field(False, description="Log step norms, and the norms and condition numbers of the cores.")
    verify_rollouts: bool | Literal["stop"] = Field(
        False,
        description="Judge at each step of trainer grpo whether the engine samples from the policy that is trained; "
        "stop also ends a run in which it does not. It needs training.use_vllm.",
    )
    push_to_hub: str | None = Field(None, description="Repository to upload the plain LoRA to.")
    push_checkpoint: bool = Field(False, description="Upload the cores too, to the repository's folder checkpoint.")
    push_model: str | None = Field(
        None, description="Base model that a pushed adapter names in place of the stand-in that it was trained on."
    )

    @property
    def settings(self) -> Any:
        """Settings under the name of the recipe's method; None: no such key."""
        return getattr(self, self.method, None)
