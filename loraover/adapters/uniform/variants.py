"""Fields of PEFT's LoraConfig that make an adapter more than W + scaling * B @ A, and fields that do not."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from packaging.version import InvalidVersion, Version

from loraover.checkpoint.adapter_config import AdapterConfig

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

    Args:
        config: Configuration of a LoRA.
        field: Name of one of its fields that is no field of `AdapterConfig`.
        value: Its value.
        keys: Keys of the file's tensors.
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
