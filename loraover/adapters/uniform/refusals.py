"""Fields and tensors of an adapter that A and B alone cannot hold, and their refusals, with reasons."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from packaging.version import InvalidVersion, Version

from loraover.checkpoint.adapter_config import AdapterConfig
from loraover.checkpoint.files import CONFIG_FILE
from loraover.checkpoint.peft_adapter import BASE_WEIGHT, KEY_PREFIX, AdapterDir
from loraover.common.errors import ExportError
from loraover.common.request import as_written

READ_PEFT = "0.21.2"
"""Release of PEFT whose LoraConfig these tables were read from."""

VARIANTS = {
    "alora_invocation_tokens": "an activated LoRA (aLoRA), which acts from certain tokens on",
    "arrow_config": "an Arrow router over several adapters",
    "ensure_weight_tying": "an adapter whose embedding and head share their matrices",
    "kasa_config": "a KaSA adapter, which changes base weights",
    "layer_replication": "an adapter for a model with repeated layers",
    "lora_bias": "an adapter whose B has a bias",
    "monteclora_config": "a MonteCLoRA adapter, which samples its weights",
    "target_parameters": "an adapter of single parameters, such as those of fused experts",
    "use_bdlora": "a block-diagonal LoRA (BD-LoRA)",
    "use_qalora": "a QALoRA adapter, which pools its inputs",
}
UNMERGED = {"alora_invocation_tokens", "arrow_config", "use_qalora"}
"""Variants that PEFT does not merge into the base weights either."""

TRAINING_ONLY = {
    *("auto_mapping", "corda_config", "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode"),
    *("layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout", "lora_ga_config", "megatron_config"),
    "megatron_core",
    *("peft_version", "qalora_group_size", "runtime_config", "target_modules", "task_type", "velora_config"),
}
"""Fields that have no effect once A and B are trained; the tensors show which modules are adapted."""

OTHER_FIELDS = {"bias", "init_lora_weights", "modules_to_save", "trainable_token_indices"}
"""Further fields of LoraConfig beside those of `AdapterConfig`."""


def is_inert(config: AdapterConfig, field: str, value: Any, keys: Iterable[str]) -> bool:
    """Return whether a field, as a configuration sets it, changes nothing that A and B compute.

    A field that LoraConfig does not have is ignored by PEFT, unless a later release may have written it. Tied matrices
    are those of an embedding and a head.
    """
    if not value or field in TRAINING_ONLY:
        return True
    if field == "ensure_weight_tying":
        return all(".lora_A." in key or ".lora_B." in key for key in keys) and not any("head" in key for key in keys)
    if field in VARIANTS or field in OTHER_FIELDS:
        return False
    try:
        return config.peft_version is None or Version(config.peft_version) <= Version(READ_PEFT)
    except InvalidVersion:
        return False


OTHERS = {
    ".lora_B.bias": "a bias of B",
    ".lora_A.bias": "a bias of A",
    "trainable_tokens_": "single trained tokens",
    "norm": "a norm",
}
"""Tensors other than A and B, by a part of their keys."""


HELD = ("bias", "modules_to_save", "ensure_weight_tying")
"""Fields of PEFT's configuration, beyond A and B, that a merged model can hold."""


def check_fields(
    adapter: AdapterDir, remedy: str, *, allowed: Collection[str] = (), remedies: Mapping[str, str] | None = None
) -> None:
    """Refuse fields of PEFT's variants, of trained parameters, and unknown ones.

    Args:
        remedy: What to do instead, to follow "train without it, or ".
        allowed: Fields of trained parameters or variants that the export can hold.
        remedies: What to do about a field, where it is not `remedy`.

    Raises:
        ExportError: An adapter that is more than A and B.
    """
    expected = {"bias": "none", "modules_to_save": None, "trainable_token_indices": None}
    for field, value in (adapter.config.model_extra or {}).items():
        if (
            field in allowed
            or field == "init_lora_weights"
            or value == expected.get(field)
            or is_inert(adapter.config, field, value, adapter.shapes)
        ):
            continue
        if field in expected:
            kind = "parameters were trained in full, which do not fit into A and B"
        else:
            kind = f"this is {VARIANTS[field]}" if field in VARIANTS else "a field that this version does not know"
        advice = "serve it with PEFT" if field in UNMERGED else (remedies or {}).get(field, remedy)
        raise ExportError(
            f"{adapter.path / CONFIG_FILE}: {field} is {value!r:.80}: {kind}; train without it, or {advice}."
        )


def has_targets(adapter: AdapterDir, others: Iterable[str] = ()) -> bool:
    """Whether an adapter has a stack of experts for each entry of `target_parameters`."""
    paths = {*(stack.path for stack in adapter.stacks), *others}
    return all(any(f".{path}".endswith(f".{entry}") for path in paths) for entry in adapter.config.parameters)


def written_parameters(adapter: AdapterDir) -> set[str]:
    """Return the field `target_parameters` if the file has pairs for all of it: stacks, or those of modules."""
    weights = (f"{path}.weight" for path in adapter.modules)  # such as that of a router
    return {"target_parameters"} if has_targets(adapter, weights) else set()


def check_no_experts(adapter: AdapterDir, reader: str) -> None:
    """Refuse LoRA of experts that share one parameter; `reader` is the subject of "does not support LoRA"."""
    if adapter.stacks:
        raise ExportError(
            f"{adapter.tensors_path}: adapts {adapter.stacks[0].path}, which holds all experts; {reader} does not "
            "support LoRA on experts that share one parameter. Merge the adapter into the base model with PEFT's "
            "merge_and_unload."
        )


def check_tensors(
    adapter: AdapterDir,
    weights: Mapping[str, tuple[int, ...]],
    remedy: str,
    kinds: Mapping[str, str] = OTHERS,
) -> list[str]:
    """Refuse tensors that are neither A nor B, nor base weights that PEFT saves beside an adapted embedding.

    Args:
        weights: Shapes of the base model's weights, by the paths of their modules.
        remedy: What to do instead, to follow "train without it, or ".
        kinds: Descriptions of other tensors, by a part of their keys.

    Returns:
        Keys of the base weights, of which only the shape was compared.

    Raises:
        ExportError: Any other tensor.
    """
    copies = []
    for key in adapter.others:
        path = key.removeprefix(KEY_PREFIX).removesuffix(BASE_WEIGHT)
        if key.endswith(BASE_WEIGHT) and path in adapter.modules and adapter.shapes[key] == weights.get(path):
            copies.append(key)
            continue
        kind = next((kind for part, kind in kinds.items() if part in key), "neither A nor B of a module")
        raise ExportError(f"{adapter.tensors_path}: {key} is {kind}; train without it, or {remedy}.")
    return copies


def check_shape(adapter: AdapterDir, path: str, shape: tuple[int, ...], *, is_embedding: bool, base: str) -> None:
    """Refuse an adapter of a model whose weight there has another shape: (out_features, in_features), (tokens, m)."""
    module = adapter.modules[path]
    if module.is_embedding != is_embedding or module.weight_shape != shape:
        raise ExportError(
            f"{adapter.tensors_path}: {path} has shape {module.weight_shape} in the adapter and {shape} in {base}; "
            f"name the model that the adapter was trained on with {as_written('model')}."
        )
