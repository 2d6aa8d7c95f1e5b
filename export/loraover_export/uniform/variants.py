"""Fields of PEFT's LoraConfig that make an adapter more than W + scaling * B @ A, and fields that do not."""

from __future__ import annotations

VARIANTS = {
    "alora_invocation_tokens": "an activated LoRA (aLoRA), which acts from certain tokens on",
    "arrow_config": "an Arrow router over several adapters",
    "ensure_weight_tying": "an adapter whose embedding and head share their matrices",
    "kasa_config": "a KaSA adapter, which changes base weights",
    "layer_replication": "an adapter for a model with repeated layers",
    "lora_bias": "an adapter whose B has a bias",
    "megatron_config": "an adapter of Megatron's layers",
    "monteclora_config": "a MonteCLoRA adapter, which samples its weights",
    "target_parameters": "an adapter of single parameters, such as those of fused experts",
    "use_bdlora": "a block-diagonal LoRA (BD-LoRA)",
    "use_qalora": "a QALoRA adapter, which pools its inputs",
}
UNMERGED = {"alora_invocation_tokens", "arrow_config", "use_qalora"}
"""Variants that PEFT does not merge into the base weights either."""

TRAINING_ONLY = {
    *("auto_mapping", "corda_config", "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode"),
    *("layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout", "lora_ga_config", "megatron_core"),
    *("peft_version", "qalora_group_size", "runtime_config", "target_modules", "task_type", "velora_config"),
}
"""Fields that have no effect once A and B are trained; the tensors show which modules are adapted."""
