"""Names of the files in an adapter's folder."""

from __future__ import annotations

CONFIG_FILE, TENSORS_FILE = "adapter_config.json", "adapter_model.safetensors"
"""PEFT's two files, which every adapter has."""
META_FILE, CORES_FILE = "loraover.json", "loraover.safetensors"
"""Files that a LoRA-Over checkpoint has beside those of an adapter."""
TEMPLATE_FILE = "chat_template.jinja"
"""The chat template that an adapter was trained with, where its trainer wrote the tokenizer."""
REFERENCE_FILE = "adapter_reference.json.gz"
"""Answers of PyTorch, as `loraover record` writes them."""
TRAINER_FOLDER = "trainer"
"""Folder of a run in which its Trainer keeps checkpoints, beside the adapter."""
