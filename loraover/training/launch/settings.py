"""Settings of TRL, transformers and PEFT from the keys of a recipe, which their own classes check."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from pydantic import ConfigDict, TypeAdapter, ValidationError
from transformers import PreTrainedModel
from transformers.training_args import OptimizerNames

from loraover.checkpoint.adapter_config import PATTERN_ERRORS
from loraover.common.errors import ConfigError
from loraover.common.reporter import SILENT, Reporter
from loraover.models.device import DTYPES
from loraover.models.load import ModelSource
from loraover.training.launch.distribution import accumulation, check_processes, distribution_options
from loraover.training.method import TrainingMethod
from loraover.training.recipe import Recipe, hint
from loraover.training.recipe_parts import AUTO, SOAP, OpenPart
from loraover.training.trainers import TRAINERS, find_reward

RUN_SETS = {"output_dir", "do_train", "do_eval", "do_predict", "disable_tqdm", "use_cpu", "resume_from_checkpoint"}
RUN_SETS |= {"deepspeed", "fsdp", "fsdp_config", "ddp_backend", "accelerator_config", "parallelism_config"}
RUN_SETS |= {"model_init_kwargs", "save_strategy", "push_to_hub", "hub_model_id", "hub_token", "hub_strategy"}
RUN_SETS |= {"hub_always_push", "hub_revision"}
RUN_SETS |= {"bf16_full_eval", "fp16_full_eval", "save_only_model", "eval_packing", "shuffle_dataset", "dataset_kwargs"}
"""Settings of trainers that a run gives itself."""

DONE_BEFORE = {"dataset_text_field", "chat_template_path"}
"""Settings for reading rows, which are read before TRL gets them."""

LORA_SETS = {"task_type", "revision", "base_model_name_or_path", "inference_mode", "peft_type", "auto_mapping"}
"""Settings of LoraConfig that a run gives itself."""


MEANT = {"lr": "learning_rate", "epochs": "num_train_epochs", "batch_size": "per_device_train_batch_size"}
MEANT |= {"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout", "group_by_length": "train_sampling_strategy"}
"""Keys by the names that other tools give them."""


def check_names(recipe: Recipe) -> None:
    """Check the names in a recipe that its types do not check, before anything is loaded."""
    check_keys(recipe)
    _check_known("training.optim", recipe.training.optim, [SOAP, *(str(name.value) for name in OptimizerNames)])
    start = recipe.lora.init_lora_weights
    if isinstance(start, str) and not start.lower().startswith("pissa_niter_"):
        forms = get_args(get_type_hints(LoraConfig)["init_lora_weights"])
        _check_known("lora.init_lora_weights", start.lower(), [name for form in forms for name in get_args(form)])
    if recipe.training.fp16 and not torch.accelerator.is_available():
        raise ConfigError("training.fp16 needs an accelerator; use bf16, or neither, on a CPU.")


def _check_known(key: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        meant = hint(value, known) or f", expected one of {', '.join(known)}."
        raise ConfigError(f"{key} is {value!r}{meant}")


def make_arguments(recipe: Recipe, name: str, output: Path, report: Reporter = SILENT, *, starts: bool = True) -> Any:
    """Make the settings of a recipe's trainer, as its class checks them."""
    from transformers.integrations import get_reporting_integration_callbacks
    from transformers.utils import is_liger_kernel_available

    check_processes(recipe, starts=starts)
    for reward in recipe.reward_funcs:
        find_reward(reward)
    _, config = TRAINERS[name].load()
    known = {field.name for field in dataclasses.fields(config)}
    given = _checked(recipe.training, config, "training", RUN_SETS)
    if recipe.training.optim == SOAP:
        given = {key: value for key, value in given.items() if not key.startswith("optim")}
    batch = given.pop("per_device_train_batch_size")
    sizes = {} if batch == AUTO else {"per_device_train_batch_size": batch, "per_device_eval_batch_size": batch}
    options = {
        **sizes,
        "logging_first_step": True,
        "run_name": output.parent.name,
        **TRAINERS[name].options,
        **{key: value for key, value in given.items() if key in known - DONE_BEFORE},
        "bf16": bool(recipe.training.bf16),
        "gradient_accumulation_steps": accumulation(recipe),
        **distribution_options(recipe),
        "output_dir": str(output),
        "disable_tqdm": True,
        "use_cpu": not torch.accelerator.is_available(),
    }
    arguments = build(config, "training", options)
    try:
        for tracker in get_reporting_integration_callbacks(arguments.report_to):
            tracker()
    except (ImportError, RuntimeError, ValueError) as error:
        raise ConfigError(f"training.report_to: {error}") from error
    # settings that their class takes, and the first step would not
    if arguments.dataloader_persistent_workers and not arguments.dataloader_num_workers:
        raise ConfigError(
            "training.dataloader_persistent_workers is true, but there are no workers to keep; leave it out, or set "
            "training.dataloader_num_workers."
        )
    if arguments.use_liger_kernel and not is_liger_kernel_available():
        raise ConfigError("training.use_liger_kernel needs liger-kernel, which is missing: pip install liger-kernel.")
    use_one_device(arguments, report)
    return arguments


def use_one_device(arguments: Any, report: Reporter) -> None:
    """Keep the Trainer of one process on one of several GPUs: nn.DataParallel would change the size of a step."""
    if (count := arguments.n_gpu) > 1:
        arguments._n_gpu = 1
        report.line(
            f"this machine has {count} GPUs, but one process trains on the first only. To use all, start the run with "
            "torchrun "
            f"--nproc-per-node {count} -m loraover.cli train"
        )


def check_keys(recipe: Recipe) -> None:
    """Check the keys of a recipe whose model is not known yet, so that its trainer may be either of the defaults."""
    faults = []
    for name in (recipe.trainer,) if recipe.trainer else ("seq2seq", "sft"):
        try:
            _checked(recipe.training, TRAINERS[name].load()[1], "training", RUN_SETS)
        except ConfigError as error:
            faults = [error]
        else:
            faults = []
            break
    try:
        lora_options(recipe)
    except ConfigError as error:
        faults.append(error)
    if faults:
        raise ConfigError("; ".join(map(str, faults))) from faults[0]


def lora_options(recipe: Recipe) -> dict[str, Any]:
    """Return the options of PEFT's LoraConfig in a recipe, with their types checked."""
    options = _checked(recipe.lora, LoraConfig, "lora", LORA_SETS)
    return {key: value for key, value in options.items() if key != "start_from"}


def build(kind: Any, part: str, options: Mapping[str, Any]) -> Any:
    """Make an object of another library's class, or raise ConfigError that names `part`, the recipe's key for it."""
    try:
        return kind(**options)
    except (ImportError, ValueError, TypeError, AttributeError, NotImplementedError, *PATTERN_ERRORS) as error:
        raise ConfigError(f"{part}: {kind.__name__} refuses it: {error}") from error


def _checked(part: OpenPart, kind: Any, name: str, reserved: Set[str]) -> dict[str, Any]:
    """Return the keys of a part that are not null, those that it does not declare in the types of a dataclass."""
    types = typing.get_type_hints(kind)
    known, values = {*types, *type(part).model_fields}, part.model_dump(exclude_none=True)
    faults = []
    for key, value in (part.model_extra or {}).items():
        if key in reserved:
            faults.append(f"{name}.{key}: a run sets this itself; leave it out")
        elif key not in types:
            faults.append(f"{name}.{key}: unknown key{hint(MEANT.get(key, key), known - reserved)}")
        elif value is not None:
            config = None if dataclasses.is_dataclass(types[key]) else ConfigDict(arbitrary_types_allowed=True)
            try:  # YAML has 1e-4 as text
                values[key] = TypeAdapter(types[key], config=config).validate_python(value)
            except ValidationError as error:
                faults.append(f"{name}.{key}: {error.errors()[0]['msg']} (found {value!r:.80})")
    if faults:
        raise ConfigError("; ".join(faults))
    return values


def with_adapter(
    base: PreTrainedModel, recipe: Recipe, task: str, source: ModelSource, method: TrainingMethod | None = None
) -> PeftModel:
    """Wrap the base model, which is changed, with the recipe's LoRA, untrained.

    Raises:
        ConfigError: PEFT refuses the recipe's `lora`, or the method's settings do not fit the model.
    """
    base.name_or_path = source.name
    options = lora_options(recipe) | ({} if method is None else method.lora_options(base))
    config = build(LoraConfig, "lora", {"task_type": task, "revision": source.revision, **options})
    try:
        model = get_peft_model(base, config)
    except PATTERN_ERRORS as error:
        raise ConfigError(f"lora: a pattern is not a regular expression, which PEFT expects: {error}") from error
    except (ImportError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"lora: PEFT refuses it: {error}") from error
    adapted = [f".{name}" for name in model.base_model.targeted_parameter_names]
    for entry in recipe.lora.target_parameters or ():  # of an entry without effect, PEFT warns only
        if not any(name.endswith(f".{entry}") for name in adapted):
            raise ConfigError(
                f"lora.target_parameters: {entry!r} names no parameter of {source.name}; give the end of a "
                "name, such as mlp.experts.down_proj."
            )
    return model


def weights_dtype(recipe: Recipe) -> str:
    """Return the data type of a recipe's base weights, as `load_model` names it."""
    chosen = recipe.model_init.dtype
    if chosen == "auto":
        return "bf16" if recipe.training.bf16 else "fp32"
    return next(name for name, spelt in DTYPES.items() if spelt == chosen)
