"""The real SmolLM2-135M-Instruct in llama.cpp, with a LoRA-Over checkpoint and with an rsLoRA of several scalings."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from loraover import LoraOverConfig, OverParameterization, read_checkpoint
from loraover.models.load import ModelSource, load_model, load_tokenizer, resolve_model
from loraover.reference.unfolded_model import unfolded
from loraover_export import export_gguf
from loraover_export.gguf.base import write_base
from loraover_export.gguf.llamacpp import LlamaCpp

from support.agreement import PROMPTS
from support.compatibility import record
from support.gguf_export import apart
from support.make_checkpoint import save
from support.onnx_export import LINEAR
from support.tiny_models import fill_b

pytestmark = pytest.mark.engine

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
ALLOWED = 2e-4
"""Logits lie within +-40, where one rounding is 2e-6, and 30 layers round some hundred times."""


@dataclass(frozen=True)
class SmolLM2:
    """The model, its tokens of a text, and its GGUF file."""

    source: ModelSource
    folder: Path
    ids: Tensor

    @property
    def base_gguf(self) -> Path:
        return self.folder / "base.gguf"

    @torch.no_grad()
    def logits(self, model: Any) -> Tensor:
        found: Tensor = model(input_ids=self.ids).logits[0]
        return found

    def engine_logits(self, adapter: Path | None) -> Tensor:
        with LlamaCpp(self.base_gguf, adapter) as engine:
            return torch.from_numpy(engine.logits(self.ids[0].tolist()))


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SmolLM2]:
    folder = tmp_path_factory.mktemp("smollm2")
    source = resolve_model(MODEL)
    ids = load_tokenizer(source)("\n".join(PROMPTS), return_tensors="pt").input_ids[:, :96]
    write_base(load_model(source), folder / "base.gguf")
    yield SmolLM2(source, folder, ids)
    shutil.rmtree(folder)  # half a gigabyte


def lora(smollm2: SmolLM2, **options: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        chosen = {"r": 8, "lora_alpha": 16, "target_modules": LINEAR, "task_type": "CAUSAL_LM"} | options
        model = get_peft_model(load_model(smollm2.source), LoraConfig(**chosen))
    fill_b(model, seed=2)
    return model.eval()


def test_a_checkpoint(smollm2: SmolLM2) -> None:
    path, output = smollm2.folder / "checkpoint", smollm2.folder / "adapter.gguf"
    model = lora(smollm2)
    save(path, model, OverParameterization(model, LoraOverConfig(seed=5)), step=0)
    report = export_gguf(path, output, model=MODEL, base_gguf=smollm2.base_gguf)
    assert report.check is not None
    record("SmolLM2-135M-Instruct", "llama.cpp", "LoRA", "fp32", report.verdict, report.check.error, report.check.bound)
    assert report.verdict == "passed"
    assert report.check.error <= ALLOWED
    base = load_model(smollm2.source)
    assert apart(smollm2.engine_logits(None), smollm2.logits(base)) <= ALLOWED
    with unfolded(base, read_checkpoint(path)) as whole:
        expected = smollm2.logits(whole)
    assert apart(smollm2.engine_logits(output), expected) <= ALLOWED
    assert apart(expected, smollm2.logits(base)) > 1


def test_rslora_with_patterns(smollm2: SmolLM2) -> None:
    """What the adapter's own form would have llama.cpp scale wrongly without a message."""
    patterns = {"rank_pattern": {"q_proj": 4, "down_proj": 12}, "alpha_pattern": {"k_proj": 10, "up_proj": 2}}
    model = lora(smollm2, lora_alpha=5, use_rslora=True, **patterns)
    model.save_pretrained(smollm2.folder / "rslora")
    report = export_gguf(smollm2.folder / "rslora", smollm2.folder / "rslora.gguf", model=MODEL)
    assert report.rank == 12
    expected = smollm2.logits(model)
    assert apart(smollm2.engine_logits(smollm2.folder / "rslora.gguf"), expected) <= ALLOWED
    with model.disable_adapter():
        assert apart(expected, smollm2.logits(model)) > 1
