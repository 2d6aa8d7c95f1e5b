"""Which modules an adapter's configuration names: PEFT adapts those, and ignores the matrices of all others.

Source: check_target_module_exists and _inject_parameters in peft/tuners/tuners_utils.py of PEFT 0.21.2.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from itertools import chain, product
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from loraover.checkpoint.adapter_config import PATTERN_ERRORS
from loraover.checkpoint.expert_stacks import targeted_parameter
from loraover.checkpoint.path_patterns import ALL, ENDING, LAYER, PART, SlowPatternError, match_path
from loraover.common.errors import CheckpointError
from loraover.common.request import as_written
from loraover.common.strict_json import read_json
from loraover.overparam.expert_part import without_base_layers

_ENDINGS = {
    "q v": "t5 mt5",
    "q_proj v_proj": "bart opt gptj gpt_neo llama llama4 mistral mixtral stablelm gemma gemma2 gemma3_text qwen2 qwen3",
    "q v q_proj v_proj": "blip-2",
    "q_proj v_proj fc1 fc2": "phi",
    "q_proj k_proj v_proj o_proj": "nemotron_h",
    "query value": "bert roberta xlm-roberta electra layoutlm",
    "query_proj value_proj": "deberta-v2",
    "query_key_value": "bloom gpt_neox chatglm RefinedWebModel RefinedWeb falcon",
    "c_attn": "gpt2 gpt_bigcode",
    "c_proj c_attn": "btlm",
    "in_proj": "deberta",
    "Wqkv": "mpt",
    "qkv_proj": "codegen",
    "key value receptance output": "rwkv",
    "r_proj k_proj v_proj o_proj key value": "rwkv7",
}
DEFAULTS: dict[str, list[str] | str] = {
    kind: endings.split() for endings, kinds in _ENDINGS.items() for kind in kinds.split()
} | {"gemma4": r".*language_model\..*\.(q_proj|v_proj)"}
"""Modules that PEFT adapts where a LoRA's configuration names none, by the base model's type."""

ALL_LINEAR = "all-linear"
"""Value of `target_modules`, in any case, that PEFT resolves on the model."""

SHOWN = 5
"""Number of modules that a message lists."""

LOST = "a part of the adapter is lost; save it again, or name only the modules that were trained"
"""Advice about modules that the configuration names and the file lacks."""


class Targets(BaseModel):
    """The fields of PEFT's configurations that choose the adapted modules; a text is a regular expression."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    peft_type: str = "LORA"
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | str | None = None
    target_parameters: list[str] | None = None
    ensure_weight_tying: bool = False

    @property
    def is_default(self) -> bool:
        """Whether no modules are named, so that PEFT adapts its default modules for the base model's type."""
        return self.target_modules is None and not self.target_parameters and self.peft_type != "TRAINABLE_TOKENS"

    @property
    def is_open(self) -> bool:
        """Whether the model decides what is adapted: all linear layers, or its embedding."""
        found = self.target_modules
        return not self.target_parameters if found is None else isinstance(found, str) and found.lower() == ALL_LINEAR

    def resolved(self, model_type: str | None, adapted: Collection[str]) -> Targets:
        """Return the fields with the modules that PEFT adapts by default, if they name none.

        Without a `model_type`, the defaults are those that fit the adapted modules best.
        """
        if not self.is_default:
            return self
        known = DEFAULTS if self.peft_type == "LORA" else {}
        found = [*known.values(), []] if model_type is None else [known.get(model_type, [])]
        best = max(found, key=lambda names: sum(_matches(names, path) for path in adapted))
        return self.model_copy(update={"target_modules": best})

    @property
    def choice(self) -> dict[str, Any]:
        """Fields that choose modules by their names, without those that leave the choice as it is; lists are sorted."""
        fields = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
        found = self.model_dump(include={*fields}, exclude_none=True)
        return {name: sorted(value) if isinstance(value, list) else value for name, value in found.items()}

    @property
    def saved(self) -> list[str]:
        """Endings of the paths of modules that were trained in full."""
        return [self.modules_to_save] if isinstance(self.modules_to_save, str) else self.modules_to_save or []

    def saves(self, parameter: str) -> bool:
        """Return whether PEFT gives the module of a parameter a copy, which is trained in full."""
        return any(f"{ending}." in parameter for ending in self.saved)

    def names_parameter(self, parameter: str) -> bool:
        """Return whether `target_parameters` names a parameter, such as that of all experts, or a router's weight."""
        owner, _, name = parameter.rpartition(".")
        return any(targeted_parameter(target, owner) == name for target in self.target_parameters or ())

    def names(self, module: str) -> bool:
        """Return whether PEFT adapts a module of this path, or may adapt it where the model decides.

        A path in a file has `.base_layer` in it where PEFT wraps several parameters of one module.
        """
        owner = without_base_layers(module)
        if any(targeted_parameter(target, owner) is not None for target in self.target_parameters or ()):
            return True
        module, targets = module.partition(".base_layer")[0], self.target_modules
        if any(match_path(PART, name, module) is not None for name in self.saved):
            return False
        if self.exclude_modules and _matches(self.exclude_modules, module):
            return False
        if self.is_open:
            return targets is not None or self._is_layer(module)
        if targets is None or not _matches(targets, module):
            return False
        return isinstance(targets, str) or module in targets or self._is_layer(module)

    def _is_layer(self, module: str) -> bool:
        """Whether `layers_to_transform` has the first number in a path, or that behind one of `layers_pattern`."""
        layers = [self.layers_to_transform] if isinstance(self.layers_to_transform, int) else self.layers_to_transform
        if not layers:
            return True
        given = self.layers_pattern or []
        patterns = [given] if isinstance(given, str) else given
        if patterns:
            found = next((match for entry in patterns if (match := match_path(LAYER, entry, module)) is not None), None)
            number = None if found is None else found["idx"]
        else:
            first = re.match(r".*?\.[^.]*\.(\d+)\.", module)
            number = None if first is None else first[1]
        return number is not None and int(number) in layers


def _matches(targets: Sequence[str], module: str) -> bool:
    if isinstance(targets, str):
        return match_path(ALL, targets, module) is not None
    return any(f".{module}".endswith(f".{target}") for target in targets)


def check_named(config: Path, adapted: Collection[str], model_type: str | None = None) -> None:
    """Refuse matrices of modules that the configuration does not name; see `unnamed_modules`."""
    others = unnamed_modules(config, adapted, model_type)
    if others is not None:
        raise CheckpointError(
            f"{config}: {others}. PEFT ignores matrices of modules that are not named, so it is not clear which ones "
            "count: name all of them, or remove the others' matrices."
        )


def left_to_the_type(config: Path) -> bool:
    """Return whether a configuration names no modules, so that PEFT adapts those of the base model's type."""
    return read_json(config, Targets).is_default


def unnamed_modules(config: Path, adapted: Collection[str], model_type: str | None = None) -> str | None:
    """Return which modules a file has matrices for and the configuration does not name, in words; None if none."""
    targets = read_json(config, Targets).resolved(model_type, adapted)
    if targets.ensure_weight_tying:  # PEFT adds the modules that share a weight with a named one
        return None
    others = _chosen(config, targets, adapted, is_named=False)
    if not others:
        return None
    named = _listed([path for path in adapted if path not in others])
    return (
        f"{_described(config, targets, model_type)} does not name {_listed(others)}, whose matrices the file of "
        f"tensors holds beside those of {named}"
    )


def names_any(config: Path, modules: Collection[str], model_type: str) -> bool:
    """Return whether a configuration names any module or parameter of a base model; PEFT loads no other adapter."""
    targets = read_json(config, Targets).resolved(model_type, modules)
    return bool(targets.target_parameters) or bool(_chosen(config, targets, modules, is_named=True))


def lost_modules(
    config: Path,
    adapted: Collection[str],
    modules: Iterable[str],
    experts: Iterable[str],
    model_type: str | None = None,
) -> str | None:
    """Return which modules or experts the configuration names and a file lacks, in words; None if it lacks none.

    `adapted` has the paths of the modules, and of each expert, that the file has matrices for.
    """
    targets = read_json(config, Targets).resolved(model_type, adapted)
    alone = targets.model_copy(update={"target_parameters": None})
    pairs = () if targets.target_parameters else adapted  # of stacked experts, that field alone names any
    stacked = {*experts} - {*map(_parameter, pairs)}
    others = [path for path in modules if path and path not in adapted and _parameter(path) not in stacked]
    lost = [] if alone.is_open else _chosen(config, alone, others, is_named=True)
    lost += [path for path in others if path not in lost and targets.names_parameter(f"{path}.weight")]
    lost += [path for path in experts if _first_expert(path) not in adapted and targets.names_parameter(path)]
    if not lost:
        return None
    described = _described(config, targets, model_type)
    return f"{described} names {_listed(lost)}, and the file of tensors holds only {_listed(list(adapted))}"


def _parameter(path: str) -> str:
    """Return the path of the parameter that holds all experts, from the path of one expert."""
    owner, _, name = path.rpartition(".")
    return f"{owner.rpartition('.')[0]}.{name}"


def _first_expert(parameter: str) -> str:
    """Return the path of the first expert in a parameter, as adapted modules are named."""
    owner, _, name = parameter.rpartition(".")
    return f"{owner}.0.{name}"


def check_complete(
    config: Path, adapted: Collection[str], modules: Iterable[str], experts: Collection[str], model_type: str
) -> None:
    """Refuse a file that lacks matrices of modules or experts that the configuration names; see `lost_modules`.

    PEFT would start these modules again, as if they had not been trained. Where the configuration leaves them to the
    model's type, the file may not have others either. An adapter none of whose modules is in the model belongs to
    another one, which its readers say.
    """
    found = {*modules}
    if {*adapted}.isdisjoint(found.union(map(_first_expert, experts))):
        return
    if left_to_the_type(config):
        check_named(config, adapted, model_type)
    lost = lost_modules(config, adapted, found, experts, model_type)
    if lost is not None:
        raise CheckpointError(f"{config}: {lost}: {LOST}.")


def lost_parameters(config: Path, saved: Collection[str], parameters: Iterable[str]) -> str | None:
    """Return which parameters of modules in `modules_to_save` a file lacks, in words; None if it lacks none.

    The field may name modules that the base model does not have, as PEFT's default for classifiers does.
    """
    targets = read_json(config, Targets)
    lost = [name for name in parameters if name not in saved and targets.saves(name)]
    named = f"modules_to_save {targets.saved!r:.200} names {_listed(lost)}"
    return f"{named}, which the file of tensors lacks" if lost else None


def check_saved(config: Path, saved: Collection[str], parameters: Iterable[str]) -> None:
    """Refuse a file without parameters that were trained in full, which PEFT does not load; see `lost_parameters`."""
    lost = lost_parameters(config, saved, parameters)
    if lost is not None:
        raise CheckpointError(f"{config}: {lost}: {LOST}.")


def check_patterns(config: Path, modules: Collection[str]) -> None:
    """Refuse regular expressions that PEFT would match with a base model's modules for too long."""
    _chosen(config, read_json(config, Targets), modules, is_named=True)
    fields = read_json(config, _Fields).model_extra or {}
    patterns = [value for name, value in fields.items() if name.endswith("_pattern") and isinstance(value, dict)]
    try:
        for entry, path in product(dict.fromkeys(chain(*patterns)), modules):
            match_path(ENDING, entry, path)
    except SlowPatternError as error:
        raise CheckpointError(f"{config.parent}: {error}") from error
    except PATTERN_ERRORS as error:
        raise CheckpointError(f"{config}: holds a text that is not a regular expression: {error}.") from error


class _Fields(BaseModel):
    """All fields of a configuration, unread."""

    model_config = ConfigDict(extra="allow")


def _chosen(config: Path, targets: Targets, paths: Iterable[str], *, is_named: bool) -> list[str]:
    try:
        return [path for path in paths if targets.names(path) == is_named]
    except SlowPatternError as error:
        raise CheckpointError(f"{config.parent}: {error}") from error
    except PATTERN_ERRORS as error:
        raise CheckpointError(
            f"{config}: {_described(config, targets)} holds a text that is not a regular expression: {error}; "
            "correct it."
        ) from error


def _described(config: Path, targets: Targets, model_type: str | None = None) -> str:
    if left_to_the_type(config):
        kind = "any type of model" if model_type is None else repr(model_type)
        return f"target_modules is null, and PEFT's default for {kind}, {targets.target_modules!r},"
    fields = targets.model_dump(exclude={"peft_type"}, exclude_none=True, exclude_defaults=True)
    return ", ".join(f"{name} {value!r:.200}" for name, value in fields.items())


def _listed(paths: Sequence[str]) -> str:
    rest = f" and {len(paths) - SHOWN} more" if len(paths) > SHOWN else ""
    return (", ".join(paths[:SHOWN]) or "no other module") + rest


def absent_layers(paths: Iterable[str], names: Collection[str]) -> list[str]:
    """Return the modules of layers that a base model lacks, while its first layer has such modules.

    PEFT and vLLM ignore their matrices, which is right for a base model of fewer layers.
    """
    split = {path: re.match(r"(.+?\.)(\d+)\.(.+)", path) for path in paths}
    return [
        path
        for path, parts in split.items()
        if parts is not None
        and f"{parts[1]}0.{parts[3]}" in names
        and not any(name.startswith(f"{parts[1]}{parts[2]}.") for name in names)
    ]


def alike_module(path: str, names: Iterable[str]) -> str | None:
    """Return a module of a base model whose path differs from the given one by a prefix; None if there is none."""
    return next(
        (
            name
            for name in names
            if "." in path and "." in name and (name.endswith(f".{path}") or path.endswith(f".{name}"))
        ),
        None,
    )


def is_single_expert(path: str, names: Iterable[str]) -> bool:
    """Return whether a path is one expert's layer, as in transformers 4, where a base model has all in one module."""
    is_one = re.search(r"\.experts\.\d+\.", path) is not None
    return is_one and any(name.endswith(".experts") for name in names)


def if_missing(path: str, names: Collection[str]) -> str:
    """Return what to do about an adapted module that the base model does not have, to end a message."""
    if is_single_expert(path, names):
        return (
            "each expert has its own layers there, as in transformers 4, and all share a parameter in the base model. "
            "PEFT reads the adapter as it is and merges it by merge_and_unload; for engines, write it with `loraover "
            "export vllm`"
        )
    alike = alike_module(path, names)
    if alike is None:
        return f"name the model that the adapter was trained on with {as_written('model')}"
    head = "without its head" if len(alike) > len(path) else "with a head"
    return f"it has {alike}, so the adapter may have been trained on the model {head}. Rename its tensors to that"
