"""Base models as GGUF files in F32, without a tokenizer: what llama.cpp needs to compute logits, and nothing else.

Source of the keys and of what each family's weights need: the GGUF specification, and llama.cpp's model files. Every
family is run in llama.cpp by tests/export/test_gguf_families.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from loraover.checkpoint.expert_stacks import find_expert_weights
from loraover.common.errors import ExportError
from loraover_export.formats.gguf.target import Family, expert_tensors, find_family, interleave
from loraover_export.formats.gguf.write import FileArray
from loraover_export.requests import GgufRequest

PLAIN_ROPE = (None, "default")


def write_base(model: Any, path: Path) -> Path:
    """Write a decoder of transformers, and return `path`.

    Args:
        model: The model, with weights in float32.
        path: The new file.

    Raises:
        ExportError: A family that is not known here, rotary embeddings with a scaling, or settings for which llama.cpp
            has a constant in this family.
        OSError: The file cannot be written.
    """
    import gguf

    config = model.config.get_text_config()
    name = type(model).__name__
    family = find_family(name, model.name_or_path or name)
    for field, expected in _constants(config, family.name).items():  # llama.cpp would load others, and use its own
        found = getattr(config, field, expected[0])
        if found not in expected:
            raise ExportError(
                f"{field} is {found!r:.80}, and llama.cpp computes every {family.name} with {expected[0]!r:.80}; the "
                "model cannot be written."
            )
    rope = getattr(config, "rope_parameters", None)  # since transformers 5
    if rope is None:
        factor = getattr(config, "partial_rotary_factor", 1.0)
        rope = {"rope_theta": config.rope_theta, "partial_rotary_factor": factor}
        rope |= getattr(config, "rope_scaling", None) or {}
    rope = rope.get("full_attention", rope)
    if rope.get("rope_type") not in PLAIN_ROPE:
        raise ExportError(
            f"{model.name_or_path or name} has rotary embeddings of the type {rope['rope_type']!r}, which are not "
            "written here; convert the model with llama.cpp, and name the file with "
            f"{GgufRequest.named('base_gguf')}."
        )
    with closing(gguf.GGUFWriter(path, family.name)) as writer:
        writer.add_type("model")
        writer.add_file_type(gguf.LlamaFileType.ALL_F32)
        writer.add_string("tokenizer.ggml.model", "no_vocab")
        writer.add_rope_freq_base(float(rope["rope_theta"]))
        _add_sizes(writer, config, family.name)
        rotated = rope.get("partial_rotary_factor", 1.0) if family.name == "phi3" else 1.0  # others rotate all of it
        writer.add_rope_dimension_count(int(_head_size(config) * rotated))
        for key, weight in _tensors(model, config, family):
            writer.add_tensor(key, weight.view(FileArray))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    return path


def _constants(config: Any, name: str) -> dict[str, tuple[Any, ...]]:
    """Return the settings that llama.cpp assumes for a family, by field, each with other values of the same meaning."""
    layers = range(1, config.num_hidden_layers + 1)
    period = {"gemma2": 2, "gemma3": 6}.get(name, 1)
    found: dict[str, tuple[Any, ...]] = {
        "layer_types": (["sliding_attention" if k % period else "full_attention" for k in layers],)
    }
    if name == "qwen3moe":
        found |= {"norm_topk_prob": (True,), "sliding_window": (None,)}
    if name == "smollm3":
        found["no_rope_layers"] = ([int(k % 4 != 0) for k in layers],)
    if not name.startswith("gemma"):
        return found | {"hidden_act": ("silu", "swish")}
    gelu, size = ("gelu_pytorch_tanh", "gelu"), _head_size(config)
    found["use_bidirectional_attention"] = (False, None)
    if name == "gemma":
        return found | {"hidden_act": gelu}
    if config.num_hidden_layers == {"gemma2": 46, "gemma3": 62}[name]:  # those of 27 billion parameters
        size = config.hidden_size // config.num_attention_heads
    found |= {"hidden_activation": gelu, "query_pre_attn_scalar": (size,)}
    caps = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0} if name == "gemma2" else {}
    return found | {field: (getattr(config, field) or cap,) for field, cap in caps.items()}


def _add_sizes(writer: Any, config: Any, name: str) -> None:
    size = _head_size(config)
    writer.add_vocab_size(config.vocab_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if name == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if name in ("gemma2", "gemma3"):
        writer.add_sliding_window(config.sliding_window)
    if name == "gemma3":
        rope = getattr(config, "rope_parameters", None)  # since transformers 5
        local = config.rope_local_base_freq if rope is None else rope["sliding_attention"]["rope_theta"]
        writer.add_float32("gemma3.rope.freq_base_swa", float(local))
        if config.final_logit_softcapping is not None:
            writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if name == "phi3":
        writer.add_sliding_window(0)
        writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
    if name == "granite":
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)
    if name == "qwen3moe":
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)


def _head_size(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _tensors(model: Any, config: Any, family: Family) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
    import gguf

    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == family.name)
    names, experts = gguf.get_tensor_name_map(kind, config.num_hidden_layers), find_expert_weights(model)
    for key, parameter in model.named_parameters():
        module, _, part = key.rpartition(".")
        weight = parameter.detach()
        if key in experts:
            tensors = expert_tensors(family, key)
            for tensor, rows in zip(tensors, weight.chunk(len(tensors), dim=1), strict=True):
                yield f"{tensor}.weight", np.ascontiguousarray(rows.float().numpy())
            continue
        if module.endswith("norm") and family.name.startswith("gemma"):
            weight = weight + 1  # transformers multiplies by 1 + weight
        if family.interleaved and module.endswith(("q_proj", "k_proj")):
            weight = interleave(weight, len(weight) // _head_size(config))
        name = names.get_name(module)
        if name is None:
            raise ExportError(f"{key}: llama.cpp's {family.name} has no such weight; the model cannot be written.")
        yield f"{name}.{part}", np.ascontiguousarray(weight.float().numpy())
