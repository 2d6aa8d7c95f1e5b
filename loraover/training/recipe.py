"""Recipes: what `loraover train` is asked to do, in YAML."""

from __future__ import annotations

import copy
import difflib
import math
import reprlib
from collections.abc import Iterable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError, field_validator, model_validator

from loraover.checkpoint.adapter_config import KEPT_BASE
from loraover.common.errors import ConfigError
from loraover.common.extras import install
from loraover.common.paths import kind_of
from loraover.common.strict_yaml import MAX_YAML_BYTES, parse_yaml
from loraover.data.sources import LOCAL_SUFFIXES
from loraover.training.method_table import BUILT_IN, METHODS, MethodKeys
from loraover.training.method_table import MISSING as MISSING_METHODS
from loraover.training.recipe_parts import AUTO, BATCH, SOAP

LEARNS_TOKENS = (None, "sft", "seq2seq")
"""Values of the key `trainer` whose loss is that of completion tokens; that of the others is a mean over batches."""

HAS_REFERENCE = ("dpo", "kto", "grpo")
"""Values of the key `trainer` whose loss compares the model with the one before training."""

METHOD_NAMES = ("lora", *BUILT_IN, *METHODS)
"""Values of the key `method`."""

_short = reprlib.Repr()
_short.maxlevel = 2  # YAML aliases can unfold a few bytes into a giant


class Recipe(MethodKeys):
    """Recipe of a training run."""

    @field_validator("method")
    @classmethod
    def _is_known(cls, method: str) -> str:
        if method in MISSING_METHODS:
            raise ValueError(f"method {method} is not installed: {install('lab')}")
        if method not in METHOD_NAMES:
            raise ValueError(f"expected one of {', '.join(METHOD_NAMES)}")
        return method

    @model_validator(mode="after")
    def _has_rewards(self) -> Recipe:
        if (self.trainer == "grpo") != bool(self.reward_funcs):
            raise ValueError(
                "trainer grpo needs reward_funcs, such as [think_format_reward], and no other trainer "
                "takes reward_funcs"
            )
        if self.trainer in HAS_REFERENCE and self.lora.init_lora_weights is not True:
            start = self.lora.init_lora_weights
            if not (isinstance(start, str) and start.lower() in KEPT_BASE):
                raise ValueError(
                    f"lora.init_lora_weights {start!r} changes the base weights, which are the reference of trainer "
                    f"{self.trainer}; leave it out"
                )
        if self.method in METHODS and self.trainer not in LEARNS_TOKENS:
            raise ValueError(f"method {self.method} trains with sft or seq2seq, not with trainer {self.trainer}")
        if self.trainer in HAS_REFERENCE and self.lora.start_from is not None:
            is_grpo = self.trainer == "grpo"
            if not is_grpo or (self.training.model_extra or {}).get("beta") != 0:
                raise ValueError(
                    f"trainer {self.trainer} compares with the base model without an adapter, not with the adapter of "
                    "lora.start_from; merge that adapter into the base model, and train on the "
                    f"result{', or set training.beta to 0, which compares with nothing' if is_grpo else ''}"
                )
        return self

    @model_validator(mode="after")
    def _has_an_engine_to_verify(self) -> Recipe:
        if self.verify_rollouts and not (self.training.model_extra or {}).get("use_vllm"):
            raise ValueError(
                f"verify_rollouts judges an engine that samples, and trainer {self.trainer or 'sft'} has none here; "
                "use trainer grpo with training.use_vllm true, and vllm_mode server or colocate, or leave out "
                "verify_rollouts"
            )
        if self.verify_rollouts and self.method == "full":
            raise ValueError("verify_rollouts judges how an engine applies an adapter, and method full trains none")
        return self

    @model_validator(mode="after")
    def _can_be_stepped(self) -> Recipe:
        if self.data.streaming and self.training.max_steps is None:
            raise ValueError("data.streaming needs training.max_steps, which says how many rows are read")
        if self.data.streaming and self.packs and self.data.train_examples is None:
            raise ValueError("data.streaming with training.packing needs data.train_examples, the rows that are packed")
        if self.training.optim == SOAP and self.method != "lora":
            raise ValueError(f"training.optim {SOAP} works only with method lora, not with {self.method}")
        return self

    @model_validator(mode="after")
    def _suits_its_method(self) -> Recipe:
        if self.method in BUILT_IN:
            BUILT_IN[self.method].check_recipe(self)
        for method, kind in METHODS.items():
            part = getattr(self, method)
            if method == self.method:
                kind.check_recipe(self)
            elif part != type(part)():
                raise ValueError(
                    f"the key {method} is only for method {method}, and this recipe's method is {self.method}"
                )
        return self

    def changed(self, part: str, **values: Any) -> Recipe:
        """Return the recipe with other values in one of its parts, without a check of the values."""
        return self.model_copy(update={part: getattr(self, part).model_copy(update=values)})

    @property
    def can_resume(self) -> bool:
        """Whether a run that was interrupted can be continued."""
        return self.method not in METHODS or not METHODS[self.method].no_resume

    @property
    def clients(self) -> int:
        """Number of parts into which the rows are divided, each with its own optimizer; 1 for most methods."""
        return METHODS[self.method].count_clients(self) if self.method in METHODS else 1

    def steps(self, examples: int) -> int:
        """Count the run's optimizer steps, which are those of each client where there are several."""
        return self.training.steps(math.ceil(examples / self.clients), self.distributed.processes or 1)

    @property
    def packs(self) -> bool:
        """Whether several examples are joined to one of full length."""
        return bool((self.training.model_extra or {}).get("packing"))

    @property
    def most_rows(self) -> int | None:
        """Largest number of rows to read of a source of training data; None: all."""
        training, asked = self.training, self.data.train_examples
        if not self.data.streaming or training.max_steps is None or self.packs:
            return asked
        batch = BATCH if training.per_device_train_batch_size == AUTO else training.micro_batch
        processes = self.distributed.processes or 1
        needed = training.max_steps * batch * training.gradient_accumulation_steps * self.clients * processes
        return min(needed, asked or needed)

    @property
    def trains_only_products(self) -> bool:
        """Whether only delta_W = scaling * B A is trained, so that the norm of its change is the size of a step."""
        return self.method != "full" and not self.lora.use_dora


def recipe_names() -> list[str]:
    """Names of the recipes that ship with this package."""
    return sorted(p.name.removesuffix(".yaml") for p in files("loraover.training").joinpath("recipes").iterdir())


def recipe_text(name: str) -> str:
    """YAML of a recipe that ships, with its comments."""
    if name not in recipe_names():
        raise ConfigError(f"recipe {name!r}: does not ship with LoRA-Over{_near(name)}")
    return files("loraover.training").joinpath("recipes", f"{name}.yaml").read_text(encoding="utf-8")


NO_RECIPE: dict[str, Any] = {"training": {"num_train_epochs": 1, "per_device_train_batch_size": AUTO}}
"""Recipe of a run that names only its model and its data."""


LENGTHS = {"training.max_steps": "num_train_epochs", "training.num_train_epochs": "max_steps"}
"""Keys for the length of a run, each with the other key, which it replaces."""


def load_recipe(recipe: Recipe | str | Path | None, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe that ships or a YAML file, or take a recipe with other values.

    Args:
        recipe: A recipe, the name of one that ships such as "demo", or the path of a YAML file; None: one epoch, of
            which `overrides` give at least the model and the data.
        overrides: Values by dotted key, e.g. `{"training.seed": 1}`. A number of steps takes the place of the recipe's
            epochs, and the other way round.

    Raises:
        ConfigError: No such recipe, not YAML, or values that do not fit; every fault is named.
    """
    if isinstance(recipe, Recipe):
        name, values = "in memory", recipe.model_dump(mode="json", exclude_unset=True)
    elif recipe is None:
        name, values = "made of options", copy.deepcopy(NO_RECIPE)
    else:
        name = str(recipe)
        values = _read(name)
    given = overrides or {}
    for key, other in LENGTHS.items():
        if given.get(key) is not None and isinstance(values.get("training"), dict):
            values["training"].pop(other, None)
    for key, value in given.items():
        *parents, last = key.split(".")
        inner = values
        for parent in parents:
            inner = inner.setdefault(parent, {})
            if not isinstance(inner, dict):
                raise ConfigError(f"{key}: {parent} holds a value, not keys.")
        inner[last] = value
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"recipe {name!r}: " + "; ".join(_faults(error))) from error


def _read(name: str) -> dict[str, Any]:
    is_data = Path(name).suffix in LOCAL_SUFFIXES
    if name in recipe_names():
        content = recipe_text(name).encode()
    elif is_data and Path(name).suffix != ".json":
        raise ConfigError(f"recipe {name!r}: this is a file of data{_train_on(name)}")
    elif kind_of(name) == "file" and Path(name).stat().st_size <= MAX_YAML_BYTES:
        content = Path(name).read_bytes()
    else:
        meant = _train_on(name) if kind_of(name) == "folder" else _near(name)
        raise ConfigError(f"recipe {name!r}: no such YAML file (of at most {MAX_YAML_BYTES} bytes){meant}")
    try:
        values = parse_yaml(content)
    except ValueError as error:
        raise ConfigError(f"recipe {name!r}: not YAML: {error}{_train_on(name) if is_data else ''}") from error
    if not isinstance(values, dict):
        meant = _train_on(name) if is_data else "."
        raise ConfigError(f"recipe {name!r}: expected keys such as model, data and training{meant}")
    return values


def _near(name: str) -> str:
    """The end of a message about an unknown recipe: the one that was meant, or all."""
    return hint(name, recipe_names()) or f", nor one of {', '.join(recipe_names())}."


A_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""Small model that messages name as an example."""

MISSING = {
    "model": f"; give a folder or a hub name, such as --model {A_MODEL}",
    "data": "; give a file, such as --data FILE",
}


def _train_on(name: str) -> str:
    """The end of a message about data in the place of a recipe."""
    return f"; to train on it, give --data {name} --model NAME, such as {A_MODEL}, and no recipe."


ELSEWHERE = {"load_in_4bit": "model_init.quantization: nf4", "load_in_8bit": "model_init.quantization: int8"}
ELSEWHERE |= {"torch_dtype": "model_init.dtype"}
"""Our key for each key of other tools."""


def hint(word: str, known: Iterable[str]) -> str:
    """Return the end of a message about an unknown word: the known one that was meant; empty if none is like it."""
    near = [ELSEWHERE[word]] if word in ELSEWHERE else difflib.get_close_matches(word, [*known], n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def parse_override(text: str) -> tuple[str, Any]:
    """Split "training.seed=1" into its key and its YAML value."""
    key, sign, value = text.partition("=")
    if not sign or not key:
        raise ConfigError(f"{text!r}: expected key=value, e.g. training.seed=1.")
    try:
        return key.strip(), parse_yaml(value)
    except ValueError as error:
        raise ConfigError(f"{text!r}: the value is not YAML.") from error


def _faults(error: ValidationError) -> list[str]:
    """Return a line for each fault; an unknown key comes with the nearest known one."""
    faults = []
    for fault in error.errors(include_url=False):
        place = ".".join(map(str, fault["loc"]))
        if fault["type"] == "extra_forbidden" and place in MISSING_METHODS:
            faults.append(f"{place}: the method of these settings is not installed: {install('lab')}")
        elif fault["type"] == "extra_forbidden":
            faults.append(f"{place}: unknown key{hint(str(fault['loc'][-1]), _known_keys(fault['loc'][:-1]))}")
        elif fault["type"] == "missing":
            faults.append(f"{place}: required and missing{MISSING.get(place, '')}")
        else:
            said = fault["msg"].removeprefix("Value error, ")
            faults.append(f"{place}: {said} (found {_short.repr(fault['input'])})" if place else said)
    return faults


def _known_keys(place: tuple[int | str, ...]) -> list[str]:
    model: Any = Recipe
    for part in place:
        field = model.model_fields.get(str(part)) if isinstance(model, type) and issubclass(model, BaseModel) else None
        if field is None:
            return []
        model = field.annotation
    return list(model.model_fields) if isinstance(model, type) and issubclass(model, BaseModel) else []
