"""Trainers that a recipe can name, and the check of its keys by the classes of TRL, transformers and PEFT."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import typing
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ConfigDict, TypeAdapter, ValidationError

from loraover.checkpoint.adapter_config import PATTERN_ERRORS
from loraover.common.errors import ConfigError
from loraover.common.reporter import SILENT, Reporter
from loraover.training.launch.distribution import accumulation, check_processes, engine_options
from loraover.training.recipe import Recipe, hint
from loraover.training.recipe_parts import AUTO, SOAP, OpenPart
from loraover.training.run.folder import TRAINER_FOLDER


class TrainerKind(NamedTuple):
    """A trainer of TRL or transformers.

    Args:
        library: Module that has the two classes.
        trainer: Name of the trainer's class.
        config: Name of the class of its settings.
        task: PEFT's task type.
        columns: Columns of its rows; one set of them has to be there.
        options: Settings that the run gives unless the recipe does.
    """

    library: str
    trainer: str
    config: str
    task: str
    columns: tuple[frozenset[str], ...]
    options: Mapping[str, Any] = {}

    @property
    def texts(self) -> int:
        """Texts of an example that pass the model at once."""
        return 2 if any("chosen" in columns for columns in self.columns) else 1

    def load(self) -> tuple[Any, Any]:
        """Import the classes of the trainer and of its settings.

        Raises:
            ConfigError: The installed library has no such trainer, or only in a module that is not stable.
        """
        module = importlib.import_module(self.library)
        try:
            return getattr(module, self.trainer), getattr(module, self.config)
        except (AttributeError, ImportError) as error:
            name = self.trainer.removesuffix("Trainer").lower()
            apart = f"{self.library}.experimental.{name}"
            if importlib.util.find_spec(f"{self.library}.experimental") and importlib.util.find_spec(apart):
                why = f"has it only in {apart}, whose interface may change with any version"
            else:
                why = f"has none: {error}"
            raise ConfigError(f"trainer {name}: {self.library} {module.__version__} {why}; use dpo or kto.") from error


def _columns(*choices: str) -> tuple[frozenset[str], ...]:
    return tuple(frozenset(choice.split()) for choice in choices)


def _trl(name: str, *columns: str, task: str = "CAUSAL_LM", **options: Any) -> TrainerKind:
    return TrainerKind("trl", f"{name}Trainer", f"{name}Config", task, _columns(*columns), options)


TRAINERS = {
    "sft": _trl("SFT", "prompt completion", "messages", "text", eval_packing=False),
    "dpo": _trl("DPO", "chosen rejected"),
    "kto": _trl("KTO", "prompt completion label"),
    "orpo": _trl("ORPO", "chosen rejected"),
    "grpo": _trl("GRPO", "prompt"),
    "reward": _trl("Reward", "chosen rejected margin", "chosen rejected", task="SEQ_CLS"),
    "seq2seq": TrainerKind(
        "transformers", "Seq2SeqTrainer", "Seq2SeqTrainingArguments", "SEQ_2_SEQ_LM", _columns("prompt completion")
    ),
    "classification": TrainerKind("transformers", "Trainer", "TrainingArguments", "SEQ_CLS", _columns("text label")),
}
"""Trainers by the name that a recipe gives them."""

RUN_SETS = {"output_dir", "do_train", "do_eval", "do_predict", "disable_tqdm", "use_cpu", "resume_from_checkpoint"}
RUN_SETS |= {"deepspeed", "fsdp", "fsdp_config", "ddp_backend", "accelerator_config", "parallelism_config"}
RUN_SETS |= {"model_init_kwargs", "save_strategy", "push_to_hub", "hub_model_id", "hub_token", "hub_strategy"}
RUN_SETS |= {"hub_always_push", "hub_revision"}
RUN_SETS |= {"bf16_full_eval", "fp16_full_eval", "save_only_model", "eval_packing", "shuffle_dataset", "dataset_kwargs"}
"""Settings of trainers that a run gives itself."""

DONE_BEFORE = {"dataset_text_field", "chat_template_path"}
"""Settings of how rows are read, which they are before TRL has them."""

LORA_SETS = {"task_type", "revision", "base_model_name_or_path", "inference_mode", "peft_type", "auto_mapping"}
"""Settings of LoraConfig that a run gives itself."""


MEANT = {"lr": "learning_rate", "epochs": "num_train_epochs", "batch_size": "per_device_train_batch_size"}
MEANT |= {"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout", "group_by_length": "train_sampling_strategy"}
"""Keys by the names that other tools give them."""


def trainer_name(recipe: Recipe, *, is_seq2seq: bool) -> str:
    """Return the name of a recipe's trainer.

    Raises:
        ConfigError: The trainer does not train the model.
    """
    name = recipe.trainer or ("seq2seq" if is_seq2seq else "sft")
    if is_seq2seq != (TRAINERS[name].task == "SEQ_2_SEQ_LM"):
        kind = "has an encoder and a decoder; its trainer is seq2seq" if is_seq2seq else "is decoder-only; use sft"
        raise ConfigError(f"trainer is {name}, and {recipe.model} {kind}.")
    return name


def find_reward(name: str) -> Any:
    """Return a reward of `trl.rewards`, or the function that a dotted name such as "module.function" imports.

    Raises:
        ConfigError: There is no such function.
    """
    import trl.rewards

    module, _, function = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module) if module else trl.rewards, function)
        if not callable(found):
            raise TypeError(f"it is {found!r:.80}")
        return found
    except (ImportError, AttributeError, TypeError) as error:
        known = ", ".join(one for one in trl.rewards.__all__ if one.endswith("reward"))
        raise ConfigError(
            f"reward_funcs: {name!r} is neither of trl.rewards ({known}) nor a function: {error}"
        ) from error


def make_arguments(recipe: Recipe, name: str, output: Path, report: Reporter = SILENT, *, starts: bool = True) -> Any:
    """Make the settings of a recipe's trainer, as its class checks them.

    Args:
        recipe: The recipe.
        name: Key of `TRAINERS`.
        output: The run's folder.
        report: Receiver of a line where GPUs stay idle.
        starts: Whether these processes are to train it now, and not a plan of it to be made.

    Raises:
        ConfigError: The processes of a launcher cannot train the recipe, a reward is unknown, the class does not have a
            key or refuses a value, or a tracker is unknown or not installed; every fault that it can name alone is
            named.
    """
    import torch
    from transformers.integrations import get_reporting_integration_callbacks

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
        "run_name": output.name,
        **TRAINERS[name].options,
        **{key: value for key, value in given.items() if key in known - DONE_BEFORE},
        "bf16": bool(recipe.training.bf16),
        "gradient_accumulation_steps": accumulation(recipe),
        **engine_options(recipe),
        "output_dir": str(output / TRAINER_FOLDER),
        "disable_tqdm": True,
        "use_cpu": not torch.accelerator.is_available(),
    }
    arguments = build(config, "training", options)
    try:
        for tracker in get_reporting_integration_callbacks(arguments.report_to):
            tracker()
    except (ImportError, RuntimeError, ValueError) as error:
        raise ConfigError(f"training.report_to: {error}") from error
    _check_usable(arguments)
    use_one_device(arguments, report)
    return arguments


def _check_usable(arguments: Any) -> None:
    """Raise ConfigError for settings that their class takes, and the first step would not."""
    from transformers.utils import is_liger_kernel_available

    if arguments.dataloader_persistent_workers and not arguments.dataloader_num_workers:
        raise ConfigError(
            "training.dataloader_persistent_workers is true, and there are no workers to keep; leave it out, or set "
            "training.dataloader_num_workers."
        )
    if arguments.use_liger_kernel and not is_liger_kernel_available():
        raise ConfigError("training.use_liger_kernel needs liger-kernel, which is missing: pip install liger-kernel.")


def use_one_device(arguments: Any, report: Reporter) -> None:
    """Keep the Trainer of one process on one of several GPUs: nn.DataParallel would change the size of a step."""
    if (count := arguments.n_gpu) > 1:
        arguments._n_gpu = 1
        report.line(
            f"{count} GPUs are here, and one process trains on the first. To use all, start the run with torchrun "
            f"--nproc-per-node {count} -m loraover.cli train"
        )


def check_keys(recipe: Recipe) -> None:
    """Check the keys of a recipe whose model is not known yet, so that its trainer may be either of the defaults.

    Raises:
        ConfigError: A key, or the type of a value, that no class takes.
    """
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
    """Return the options of PEFT's LoraConfig in a recipe, with their types checked.

    Raises:
        ConfigError: LoraConfig does not have a key, or not with such a value.
    """
    from peft import LoraConfig

    options = _checked(recipe.lora, LoraConfig, "lora", LORA_SETS)
    return {key: value for key, value in options.items() if key != "start_from"}


def build(kind: Any, part: str, options: Mapping[str, Any]) -> Any:
    """Make an object of another library's class of settings.

    Args:
        kind: The class.
        part: Key of the recipe that holds its settings, for messages.
        options: The settings.

    Raises:
        ConfigError: The class refuses them.
    """
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
            try:
                values[key] = _as_type(types[key], value)
            except ValidationError as error:
                faults.append(f"{name}.{key}: {error.errors()[0]['msg']} (found {value!r:.80})")
    if faults:
        raise ConfigError("; ".join(faults))
    return values


def _as_type(hint: Any, value: Any) -> Any:
    """Convert a value as YAML has it, such as the text 1e-4, into the type of a field."""
    config = None if dataclasses.is_dataclass(hint) else ConfigDict(arbitrary_types_allowed=True)
    return TypeAdapter(hint, config=config).validate_python(value)
