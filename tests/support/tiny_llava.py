"""A LLaVA of random weights that sees 16 x 16 pixels, with its processor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaProcessor,
    set_seed,
)

from support.make_checkpoint import edit_tensors
from support.tiny_hub import tiny_tokenizer
from support.tiny_models import with_lora

SIDE, PATCH = 16, 8
PLACE = "<image>"
COLOURS = ("red", "green", "blue")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<' + message['role'] + '>' }}"
    "{% for part in message['content'] %}{{ '<image>\n' if part['type'] == 'image' else part['text'] }}{% endfor %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
FIRST_PART = CHAT_TEMPLATE.replace("'>' }}", "('>' if message['content'][0]['type'] == 'image' else '> ') }}")
"""A template that looks at the first part of each message, as SmolVLM's does."""

FEATURES = {"patch_size": PATCH, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}


def save_llava(folder: Path) -> Path:
    """Two layers for pixels and two for tokens; returns `folder`."""
    processor = tiny_processor()
    tokenizer = processor.tokenizer
    set_seed(0)
    pixels = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=PATCH,
    )
    tokens = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        pad_token_id=tokenizer.pad_token_id,
    )
    place = tokenizer.convert_tokens_to_ids(PLACE)
    config = LlavaConfig(vision_config=pixels, text_config=tokens, image_token_id=place, vision_feature_layer=-1)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def tiny_processor() -> Any:
    """Four tokens for every image."""
    sizes = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    return LlavaProcessor(CLIPImageProcessor(**sizes), _tokenizer(), chat_template=CHAT_TEMPLATE, **FEATURES)


def sizing_processor(template: str = CHAT_TEMPLATE) -> Any:
    """More tokens for an image that is wide."""
    sizes = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    grid = [[SIDE, SIDE], [SIDE, 2 * SIDE]]
    images = LlavaNextImageProcessor(**sizes, image_grid_pinpoints=grid)
    return LlavaNextProcessor(images, _tokenizer(), chat_template=template, **FEATURES)


def save_pictures(folder: Path, sizes: list[tuple[int, int]]) -> list[str]:
    """Write images of one colour each; returns their names."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, size in enumerate(sizes):
        Image.new("RGB", size, COLOURS[i % len(COLOURS)]).save(folder / f"{i}.png")
    return [f"{i}.png" for i in range(len(sizes))]


def _tokenizer() -> Any:
    tokenizer = tiny_tokenizer(chat=True)
    tokenizer.add_special_tokens({"additional_special_tokens": [PLACE]})
    return tokenizer


def llava_of_transformers_4(folder: Path, targets: Any = ("q_proj", "down_proj")) -> Path:
    """An adapter of `folder / "base"` with the module names that LLaVA had before transformers 4.52."""
    model = LlavaForConditionalGeneration.from_pretrained(save_llava(folder / "base"))
    chosen = list(targets) if isinstance(targets, tuple) else targets
    with_lora(model, target_modules=chosen).save_pretrained(folder / "in")

    def rename(tensors: dict[str, Tensor]) -> None:
        for key in list(tensors):
            renamed = key.replace("model.model.language_model.", "model.language_model.model.")
            tensors[renamed.replace("model.model.vision_tower.", "model.vision_tower.")] = tensors.pop(key)

    edit_tensors(folder / "in" / "adapter_model.safetensors", rename)
    return folder / "in"
