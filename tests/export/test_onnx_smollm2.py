"""The real SmolLM2-135M-Instruct with a LoRA-Over checkpoint, in both modes and as the product starts the builder."""

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
from transformers import AutoModelForCausalLM

from loraover import LoraOverConfig, OverParameterization, read_checkpoint
from loraover.models.load import ModelSource, load_model, load_tokenizer, resolve_model
from loraover.reference.unfolded_model import unfolded
from loraover_export.onnx.report import ENGINE_FACTOR, OnnxReport

from support.agreement import PROMPTS
from support.make_checkpoint import save
from support.onnx_export import LINEAR, export, exported_at_once
from support.onnx_graph import LENGTH, Feed, Graph, torch_logits
from support.tiny_models import fill_b
from support.web_runtime import ENGINES, WebRun, web_scripts

pytestmark = pytest.mark.engine

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
HEAD_SIZE, MODES = 64, ("merged", "swappable")
ALLOWED = 2e-4
"""Logits lie within +-40, where one rounding is 2e-6, and 30 layers round some hundred times."""


@dataclass(frozen=True)
class Text(Feed):
    """Real text through the cache, padded on the left."""

    tokens: Tensor | None = None

    @property
    def ids(self) -> Tensor:
        assert self.tokens is not None
        return self.tokens[: self.rows * LENGTH].reshape(self.rows, LENGTH)


@dataclass(frozen=True)
class SmolLM2:
    """A checkpoint with its exports beside it, and the unfolded and the base model's logits."""

    checkpoint: Path
    text: Text
    unfolded: Tensor
    base: Tensor
    reports: dict[str, OnnxReport]

    def output(self, mode: str) -> Path:
        return self.checkpoint.with_name(mode)


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SmolLM2]:
    path = tmp_path_factory.mktemp("smollm2") / "checkpoint"
    source = resolve_model(MODEL)
    write_checkpoint(source, path)
    requests = {path.with_name(mode): (path, ("--mode", mode, "--model", MODEL)) for mode in MODES}
    reports = exported_at_once("SmolLM2-135M-Instruct", requests, quick=False)
    tokens = torch.tensor(load_tokenizer(source)("\n".join(PROMPTS)).input_ids)
    text = Text(3, steps=(8, 1, 1, 1, 1), padding="left", tokens=tokens)
    model = load_model(source)
    base = torch_logits(model, text)
    with unfolded(model, read_checkpoint(path)) as whole:
        yield SmolLM2(path, text, torch_logits(whole, text), base, dict(zip(MODES, reports, strict=True)))
    for mode in MODES:
        shutil.rmtree(path.with_name(mode))  # half a gigabyte each


@pytest.fixture(scope="module")
def web(smollm2: SmolLM2) -> Iterator[Path]:
    """The scripts that run onnxruntime-web, beside an export for it."""
    folder = smollm2.output("web")
    assert export(smollm2.checkpoint, folder, "--mode", "swappable", "--web", "--model", MODEL, "--no-check") == 0
    with web_scripts(folder.parent) as scripts:
        yield scripts
    shutil.rmtree(folder)


def write_checkpoint(source: ModelSource, path: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(source.location, revision=source.revision)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        options = {"r": 8, "lora_alpha": 16, "target_modules": LINEAR, "task_type": "CAUSAL_LM"}
        lora = get_peft_model(model, LoraConfig(**options))
    fill_b(lora, seed=2)
    save(path, lora, OverParameterization(lora, LoraOverConfig(seed=5)), step=0)


@pytest.mark.parametrize("mode", MODES)
def test_smollm2(mode: str, smollm2: SmolLM2) -> None:
    output, report = smollm2.output(mode), smollm2.reports[mode]
    assert report.base_model == resolve_model(MODEL).name
    assert len(report.matrices) == 30 * len(LINEAR) * (1 if mode == "merged" else 2)
    adapter = output / "checkpoint.onnx_adapter" if mode == "swappable" else None
    found = Graph(output / "model.onnx", adapter).logits(smollm2.text, HEAD_SIZE)
    assert float((found - smollm2.unfolded).abs().max()) <= ALLOWED
    assert float((found - smollm2.base).abs().max()) > 1


@pytest.mark.matrix
@pytest.mark.parametrize("engine", ENGINES)
def test_smollm2_in_onnxruntime_web(engine: str, smollm2: SmolLM2, web: Path) -> None:
    run = WebRun("web", [smollm2.text], [None, "web/checkpoint.safetensors"], HEAD_SIZE)
    ((base, found),) = ENGINES[engine](web, run)
    base_error = float((base - smollm2.base).abs().max())
    assert base_error <= ALLOWED
    sizes = float(smollm2.unfolded.abs().max()), float(smollm2.base.abs().max())
    error = float((found - smollm2.unfolded).abs().max())
    print(f"{engine}: base model {base_error:.1e}, adapter {error:.1e}")
    assert error <= ENGINE_FACTOR * base_error * max(1.0, sizes[0] / sizes[1])
    assert float((found - smollm2.base).abs().max()) > 1


def test_smollm2_without_an_adapter(smollm2: SmolLM2) -> None:
    found = Graph(smollm2.output("swappable") / "model.onnx").logits(smollm2.text, HEAD_SIZE)
    assert float((found - smollm2.base).abs().max()) <= ALLOWED
