"""F32 GGUF files of base models, as llama.cpp's converter would write them, for a few families.

Source of the keys and of what each family's weights need: the GGUF specification, and llama.cpp's model files.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "GemmaForCausalLM": "gemma",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3",
    "Phi3ForCausalLM": "phi3",
    "GraniteForCausalLM": "granite",
    "SmolLM3ForCausalLM": "smollm3",
}
INTERLEAVED = ("llama", "granite", "smollm3")
"""Architectures whose queries and keys llama.cpp rotates in pairs of neighbours, not of halves."""


def write_base(model: Any, path: Path) -> Path:
    """Write a decoder of transformers as GGUF without a tokenizer; returns `path`."""
    config = model.config.get_text_config()
    name = ARCHITECTURES[type(model).__name__]
    writer = gguf.GGUFWriter(path, name)
    writer.add_type("model")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_string("tokenizer.ggml.model", "no_vocab")
    _add_sizes(writer, config)
    _add_family(writer, config, name)
    for key, weight in _tensors(model, name):
        writer.add_tensor(key, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_sizes(writer: gguf.GGUFWriter, config: Any) -> None:
    size = head_size(config)
    writer.add_vocab_size(config.vocab_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])


def _add_family(writer: gguf.GGUFWriter, config: Any, name: str) -> None:
    if name == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if name in ("gemma2", "gemma3"):
        writer.add_sliding_window(config.sliding_window)
    if name == "phi3":
        writer.add_sliding_window(0)
        writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
    if name == "granite":
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)


def head_size(config: Any) -> int:
    size = getattr(config, "head_dim", None)
    return int(size or config.hidden_size // config.num_attention_heads)


def _tensors(model: Any, name: str) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
    config = model.config.get_text_config()
    names = gguf.get_tensor_name_map(_architecture(name), config.num_hidden_layers)
    for key, parameter in model.named_parameters():
        module, _, kind = key.rpartition(".")
        weight = parameter.detach().float().numpy()
        if module.endswith("norm") and name.startswith("gemma"):
            weight = weight + 1
        if name in INTERLEAVED and module.endswith(("q_proj", "k_proj")):
            weight = interleaved(weight, head_size(config))
        target = names.get_name(module)
        assert target is not None, key
        yield f"{target}.{kind}", np.ascontiguousarray(weight)


def _architecture(name: str) -> gguf.MODEL_ARCH:
    return next(found for found, known in gguf.MODEL_ARCH_NAMES.items() if known == name)


def interleaved(rows: npt.NDArray[np.float32], size: int) -> npt.NDArray[np.float32]:
    """Rows of each head from the order x1 ... xn y1 ... yn to x1 y1 ... xn yn, one row after another."""
    result = np.empty_like(rows)
    for row in range(len(rows)):
        head, at = divmod(row, size)
        half, pair = divmod(at, size // 2)
        result[head * size + 2 * pair + half] = rows[row]
    return result
