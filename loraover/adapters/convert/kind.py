"""The kind of an adapter, what it changes besides the weights of its modules, and whether it has to be converted."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraover.adapters.base_weights import changed_weight, module_of_copy, refuse_changed
from loraover.adapters.convert.methods import METHODS
from loraover.adapters.convert.methods.base import INERT, OTHER_KINDS, AnyMethod, Refused
from loraover.adapters.convert.methods.lora import Lora, LoraFields
from loraover.adapters.convert.prefix import find_move
from loraover.adapters.convert.source import Adapter, AdapterLayout, MethodConfig, read_layout, read_peft_type
from loraover.adapters.uniform.refusals import is_inert
from loraover.checkpoint.adapter_config import AdapterConfig
from loraover.checkpoint.files import CONFIG_FILE, META_FILE
from loraover.checkpoint.peft_adapter import BASE_WEIGHT, KEY_PREFIX
from loraover.common.errors import CheckpointError, ExportError
from loraover.common.strict_json import read_json

if TYPE_CHECKING:
    from torch import Tensor


def read_method(path: Path) -> tuple[AnyMethod, AdapterLayout[Any]]:
    """Read what kind of adapter a folder holds, and its layout.

    Raises:
        CheckpointError: An adapter that cannot be trusted, or of a kind that is not known.
        ExportError: An adapter that is no change of weights, or that changes more than weights.
    """
    kind = read_peft_type(path)
    method = METHODS.get(kind)
    where = path / CONFIG_FILE
    if method is None:
        raise CheckpointError(
            f"{where}: peft_type is {kind!r:.80}, which this version does not know; it knows {', '.join(METHODS)}."
        )
    if isinstance(method, Refused):
        raise ExportError(f"{where}: a {kind} adapter cannot become a LoRA: it {method.reason}")
    layout = read_layout(path, method.config, method.tensors, method.shared)
    check_fields(layout, method)
    if not layout.modules:
        raise CheckpointError(
            f"{layout.tensors_path}: no tensor of a {kind} adapter ({', '.join(method.tensors[:4])}); the file "
            "names no adapted module, so it is incomplete or was saved without them."
        )
    return method, layout


def named_base(path: Path) -> MethodConfig:
    """Return the configuration of an adapter of any kind, which names its base model."""
    read_peft_type(path)
    return read_json(path / CONFIG_FILE, MethodConfig)


def why_convert(path: Path, shapes: Mapping[str, tuple[int, int]]) -> str | None:
    """Return the reason for which an adapter has to be converted, as a noun phrase; None if the exports take it."""
    kind = read_peft_type(path)
    if kind != "LORA":
        return f"an adapter of the kind {kind}"
    config = read_json(path / CONFIG_FILE, LoraFields)
    if not (path / META_FILE).exists():
        if config.use_dora:
            return "a DoRA"
        if config.subtracted_initialisation is not None:
            return f"a LoRA that was started by {config.init_lora_weights}, which changes the base weights"
        if config.trainable_token_indices:
            return "a LoRA with single trained tokens"
    layout = read_layout(path, LoraFields, Lora.tensors, Lora.shared)
    if layout.keys or find_move(layout, shapes) is not None:
        return "a LoRA whose modules have another prefix than the base model's"
    return None


SERVED_HEADS = ("classifier", "score")
"""Modules of `modules_to_save` that engines take: vLLM's rule, and PEFT loads any."""


def check_fields(layout: AdapterLayout[Any], method: AnyMethod) -> None:
    """Refuse fields that change the adapter's function and that the method does not read."""
    where = layout.path / CONFIG_FILE
    if layout.config.bias != "none":
        raise ExportError(
            f"{where}: bias is {layout.config.bias!r}: biases were trained too, which no LoRA can hold. Merge the "
            "adapter into the base model with PEFT's merge_and_unload, or train with bias='none'."
        )
    config, keys = layout.config, [f"{path}.{name}" for path, names in layout.modules.items() for name in names]
    for name, value in (config.model_extra or {}).items():
        if isinstance(config, AdapterConfig) and is_inert(config, name, value, [*keys, *layout.others]):
            continue
        if value and name not in INERT | method.inert:
            kind = f"this is {OTHER_KINDS[name]}" if name in OTHER_KINDS else "a field that this version does not know"
            raise ExportError(f"{where}: {name} is {value!r:.80}: {kind}. It cannot be converted; train without it.")


def carried_tensors(adapter: Adapter[Any]) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors that the written adapter takes over, and the modules that they belong to.

    Copies of frozen base weights, which PEFT saves beside adapted embeddings, are left out.
    """
    tensors: dict[str, Tensor] = {}
    modules: set[str] = set()
    for key in adapter.layout.others:
        name = key.removeprefix(KEY_PREFIX)
        path = module_of_copy(key)
        is_copy = key.endswith(BASE_WEIGHT) and path in adapter.layout.modules
        if is_copy and adapter.base.shapes.get(path) == adapter.file.shape(key):
            changed = changed_weight(key, adapter.file, path, adapter.base)
            refuse_changed(changed, adapter.layout.tensors_path, "merge the adapter with `loraover export merge`")
            continue
        saved = saved_module(name, adapter.config)
        if saved is None or not is_served_head(saved):
            reason = (
                "belongs to no tensor that this kind of adapter has; the file is of another kind, or of a later PEFT."
            )
            if saved is not None:
                reason = (
                    f"belongs to {saved} of modules_to_save, which was trained in full. No engine takes it beside a "
                    "LoRA. Merge the adapter into the base model with PEFT's merge_and_unload, or train without "
                    "modules_to_save."
                )
            elif name.endswith(".bias"):
                reason = (
                    "is a trained bias, which no LoRA can hold. Merge the adapter into the base model, or train "
                    "without it."
                )
            raise ExportError(f"{adapter.layout.tensors_path}: {key} {reason}")
        tensors[key] = adapter.file.read(key)
        modules.add(saved)
    return tensors, sorted(modules)


def saved_module(name: str, config: MethodConfig) -> str | None:
    """Return the module of `modules_to_save` that a parameter belongs to; None if it belongs to none."""
    return next((module for module in config.modules_to_save or () if f".{module}." in f".{name}"), None)


def is_served_head(module: str) -> bool:
    """Whether engines take a module of `modules_to_save`."""
    return module.rpartition(".")[2] in SERVED_HEADS
