"""Releases of libraries that tests run with, for features that older ones lack."""

from __future__ import annotations

import peft
import pytest
import torch
import transformers
from packaging.version import Version

TORCH, TRANSFORMERS, PEFT = (Version(library.__version__) for library in (torch, transformers, peft))

needs_meta_models = pytest.mark.skipif(
    Version("5") > TRANSFORMERS, reason="transformers before 5 runs no decoder on the meta device"
)
needs_order_of_batches = pytest.mark.skipif(
    Version("5.17") > TRANSFORMERS, reason="transformers before 5.17 shuffles anew if it resumes in a later epoch"
)
needs_expert_stacks = pytest.mark.skipif(
    Version("5") > TRANSFORMERS or Version("0.19") > PEFT,
    reason="transformers before 5 stacks no experts, and PEFT before 0.19 swaps their A and B",
)
needs_tied_lora = pytest.mark.skipif(Version("0.19") > PEFT, reason="PEFT before 0.19 ties no LoRA matrices")

TOKENIZER_FILES = {"tokenizer.json", "tokenizer_config.json"}
"""What a saved tokenizer consists of."""
if Version("5") > TRANSFORMERS:
    TOKENIZER_FILES.add("special_tokens_map.json")
