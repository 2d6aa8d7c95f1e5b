"""The model that an adapter is for, as mlx-lm reads it, and the adapters that it cannot apply."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loraover.adapters.base_weights import check_base_weights
from loraover.adapters.uniform.refusals import check_fields, check_shape, check_tensors
from loraover.adapters.uniform.served import ServedModel, read_served
from loraover.checkpoint.peft_adapter import AdapterDir
from loraover.checkpoint.target_modules import if_missing
from loraover.common.errors import ExportError
from loraover.models.load import ModelSource

MERGE = "merge the adapter into the base model with PEFT, and convert that with mlx_lm.convert"

SAME_NAMES = (
    "Cohere2ForCausalLM",
    "CohereForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
    "GemmaForCausalLM",
    "Glm4ForCausalLM",
    "GraniteForCausalLM",
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Olmo2ForCausalLM",
    "Phi3ForCausalLM",
    "PhiForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
    "SmolLM3ForCausalLM",
    "StableLmForCausalLM",
    "Starcoder2ForCausalLM",
)
"""Model classes whose linear layers and embeddings have the same paths in mlx-lm.

Source: mlx_lm/models of ml-explore/mlx-lm at d78bf58e217c, in the module of each class's `model_type`.
"""


def read_target(source: ModelSource) -> ServedModel:
    """Read the configuration of a base model.

    Raises:
        ConfigError: No usable configuration.
        ExportError: A model class whose paths were not compared with mlx-lm's.
    """
    target = read_served(source, SAME_NAMES)
    if target.architecture not in SAME_NAMES:
        known = ", ".join(name.removesuffix("ForCausalLM") for name in SAME_NAMES)
        raise ExportError(
            f"{source.name} is a {target.architecture}. Whether mlx-lm gives its modules the same names is not "
            f"known here, and it refuses other names, or before 0.32.2 ignores them silently; known are {known}. "
            f"{MERGE[0].upper()}{MERGE[1:]}."
        )
    return target


def refuse_or_leave_out(adapter: AdapterDir, target: ServedModel) -> list[str]:
    """Check that mlx-lm can apply an adapter to its base model.

    Args:
        adapter: The adapter.
        target: The base model.

    Returns:
        Keys of tensors that are left out, because they are copies of the base model's frozen weights.

    Raises:
        CheckpointError: An adapter for changed base weights, or one that lacks modules that its configuration names.
        ConfigError: The adapter holds base weights, and the base model's cannot be read.
        ExportError: An adapter that is more than A and B, or that mlx-lm cannot apply.
    """
    adapter.check_keeps_base()
    shapes = target.shapes()
    adapter.check_complete(shapes, target.model_type)
    check_fields(adapter, MERGE)
    for path in adapter.modules:
        _check_module(adapter, path, target, shapes)
    copies = check_tensors(adapter, shapes, MERGE)
    check_base_weights(adapter, copies, target.source, MERGE)
    return copies


def _check_module(adapter: AdapterDir, path: str, target: ServedModel, shapes: Mapping[str, tuple[int, int]]) -> None:
    where, base = adapter.tensors_path, target.source.name
    if path not in shapes:
        raise ExportError(
            f"{where}: adapts {path}, which is neither a linear layer nor an embedding of {base}; "
            f"{if_missing(path, shapes)}, or {MERGE}."
        )
    is_embedding = target.modules[path].kind == "embedding"
    check_shape(adapter, path, shapes[path], is_embedding=is_embedding, base=base)
    if target.is_tied and (is_embedding or path == "lm_head"):
        raise ExportError(
            f"{where}: adapts {path}, but the embedding and the head of {base} are one matrix, which mlx-lm adapts in "
            f"both places or not at all. Train without {path.rpartition('.')[2]}, or {MERGE}."
        )


def lost_settings(source: ModelSource) -> dict[str, Any]:
    """Return what mlx-lm would not find in a base model's `config.json`.

    transformers 5 writes rotary embeddings into `rope_parameters`, and many models of mlx-lm 0.32 read `rope_theta`,
    `partial_rotary_factor` and `rope_scaling` at the top level only: without a message, they take their own defaults.

    Args:
        source: The base model.

    Returns:
        Entries to add at the top level of `config.json`; none if it has them.
    """
    from transformers import PretrainedConfig

    raw, _ = PretrainedConfig.get_config_dict(source.location, revision=source.revision)
    rope = raw.get("rope_parameters") or {}
    whole = rope.get("full_attention", rope)
    found = {key: whole[key] for key in ("rope_theta", "partial_rotary_factor") if key in whole}
    if whole.get("rope_type", "default") != "default":
        found["rope_scaling"] = whole
    if "rope_theta" in rope.get("sliding_attention", {}):
        found["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
    return {key: value for key, value in found.items() if key not in raw}
