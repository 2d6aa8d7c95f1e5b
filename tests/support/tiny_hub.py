"""Folders such as a hub would give: a tiny random model with a tokenizer that its vocabulary fits. No network."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import yaml
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from support.plain_adapter import tiny_decoder
from support.tiny_experts import EXPERT_SIZES
from support.tiny_models import VOCABULARY, tiny_llama, tiny_t5

PAD, BOS, EOS, UNKNOWN = SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
CHARACTERS = string.ascii_lowercase + string.digits + " \n.,:;?!#$%+-*/='()<>|"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<' + message['role'] + '>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def tiny_tokenizer(*, chat: bool = False, adds: str = "$A") -> Any:
    """One token per character, in lower case; at most `VOCABULARY` of them.

    Args:
        chat: Give it `CHAT_TEMPLATE`.
        adds: Special tokens around a text, e.g. "$A </s>" as T5's or "<s> $A" as Llama's tokenizer has it.
    """
    tokens = [*SPECIAL, *CHARACTERS]
    assert len(set(tokens)) == len(tokens) <= VOCABULARY
    backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=UNKNOWN))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    backend.post_processor = processors.TemplateProcessing(
        single=adds, special_tokens=[(BOS, tokens.index(BOS)), (EOS, tokens.index(EOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        chat_template=CHAT_TEMPLATE if chat else None,
    )


def save_llama(folder: Path, *, chat: bool = False, seed: int = 0, adds: str = "$A", **changes: Any) -> Path:
    """Two layers, hidden size 32, with `changes` of its configuration; returns `folder`."""
    model = tiny_llama(seed, **({"max_position_embeddings": 256} | changes))
    return _save(folder, model, tiny_tokenizer(chat=chat, adds=adds))


def save_t5(folder: Path, *, seed: int = 0) -> Path:
    """Two layers on either side, d_model 32; returns `folder`."""
    return _save(folder, tiny_t5(seed), tiny_tokenizer(adds=f"$A {EOS}"))


def save_decoder(folder: Path, family: str, **changes: Any) -> Path:
    """Two layers of that family, hidden size 64, with `changes` of its configuration; returns `folder`."""
    return _save(folder, tiny_decoder(family, **({"max_position_embeddings": 256} | changes)), tiny_tokenizer())


def save_moe(folder: Path) -> Path:
    """A Qwen3-MoE of two layers with four experts each; returns `folder`."""
    return save_decoder(folder, "Qwen3Moe", **EXPERT_SIZES)


def write_recipe(path: Path, model: Path | str, **parts: Any) -> Path:
    """A recipe of a few steps on word problems; `parts` are added to its own, key by key. Returns `path`."""
    recipe: dict[str, Any] = {
        "model": str(model),
        "data": {"train": "word-problems", "train_examples": 20},
        "lora": {"r": 4, "lora_alpha": 8},
        "training": {
            "max_steps": 4,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "max_length": 128,
            "bf16": False,
            "warmup_steps": 0,
            "logging_steps": 1,
            "save_steps": 2,
        },
        "evaluation": {"examples": 4, "exact_match": True, "max_new_tokens": 4, "batch_size": 4},
    }
    for key, value in parts.items():
        recipe[key] = recipe.get(key, {}) | value if isinstance(value, dict) else value
    path.write_text(yaml.safe_dump(recipe))
    return path


def _save(folder: Path, model: Any, tokenizer: Any) -> Path:
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
