"""The real SmolLM2-135M-Instruct with a LoRA-Over checkpoint: merged, in ONNX Runtime's graphs, and in llama.cpp."""

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
from loraover.reference import unfolded
from loraover_export import export_gguf, merge_adapter
from loraover_export.formats.gguf.base import write_base
from loraover_export.formats.gguf.llamacpp import LlamaCppModel
from loraover_export.formats.onnx.report import ENGINE_FACTOR

from support.agreement import PROMPTS
from support.compatibility import record
from support.make_checkpoint import save
from support.onnx_export import export, exported
from support.onnx_graph import LENGTH, Feed, Graph, torch_logits
from support.tiny_models import fill_b
from support.web_runtime import ENGINES, WebRun, web_scripts

pytestmark = [pytest.mark.engine, pytest.mark.matrix]

NAME = "SmolLM2-135M-Instruct"
MODEL = f"HuggingFaceTB/{NAME}"
TARGETS = ["q_proj", "v_proj", "down_proj"]
HEAD_SIZE = 64
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
    """The model and a checkpoint of it, whose exports lie beside it, and the unfolded and the base model's logits."""

    source: ModelSource
    checkpoint: Path
    text: Text
    unfolded: Tensor
    base: Tensor

    def output(self, name: str) -> Path:
        return self.checkpoint.with_name(name)

    def assert_right(self, found: Tensor) -> None:
        """Logits are the unfolded model's, and not those of the base model."""
        assert float((found - self.unfolded).abs().max()) <= ALLOWED
        assert float((found - self.base).abs().max()) > 1


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SmolLM2]:
    path = tmp_path_factory.mktemp("smollm2") / "checkpoint"
    source = resolve_model(MODEL)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        options = {"r": 8, "lora_alpha": 16, "target_modules": TARGETS, "task_type": "CAUSAL_LM"}
        lora: Any = get_peft_model(load_model(source), LoraConfig(**options))
    fill_b(lora, seed=2)
    save(path, lora, OverParameterization(lora, LoraOverConfig(seed=5)), step=0)
    tokens = torch.tensor(load_tokenizer(source)("\n".join(PROMPTS)).input_ids)
    text = Text(3, steps=(8, 1, 1, 1, 1), padding="left", tokens=tokens)
    model = load_model(source)
    base = torch_logits(model, text)
    with unfolded(model, read_checkpoint(path)) as whole:
        yield SmolLM2(source, path, text, torch_logits(whole, text), base)
    shutil.rmtree(path.parent)  # exports of half a gigabyte each


@pytest.mark.parametrize("mode", ["merged", "swappable"])
def test_onnx(mode: str, smollm2: SmolLM2) -> None:
    """With the builder as the product starts it."""
    output = smollm2.output(mode)
    report = exported(NAME, smollm2.checkpoint, output, "--mode", mode, "--model", MODEL, quick=False)
    assert report.base_model == smollm2.source.name
    assert len(report.matrices) == 30 * len(TARGETS) * (1 if mode == "merged" else 2)
    adapter = output / "checkpoint.onnx_adapter" if mode == "swappable" else None
    smollm2.assert_right(Graph(output / "model.onnx", adapter).logits(smollm2.text, HEAD_SIZE))
    if mode == "swappable":
        found = Graph(output / "model.onnx").logits(smollm2.text, HEAD_SIZE)
        assert float((found - smollm2.base).abs().max()) <= ALLOWED


@pytest.fixture(scope="module")
def web(smollm2: SmolLM2) -> Iterator[Path]:
    """The scripts that run onnxruntime-web, beside an export for it."""
    folder = smollm2.output("web")
    assert export(smollm2.checkpoint, folder, "--mode", "swappable", "--web", "--model", MODEL, "--no-check") == 0
    with web_scripts(folder.parent) as scripts:
        yield scripts


@pytest.mark.parametrize("engine", ENGINES)
def test_onnxruntime_web(engine: str, smollm2: SmolLM2, web: Path) -> None:
    run = WebRun("web", [smollm2.text], [None, "web/checkpoint.safetensors"], HEAD_SIZE)
    ((base, found),) = ENGINES[engine](web, run)
    base_error = float((base - smollm2.base).abs().max())
    assert base_error <= ALLOWED
    sizes = float(smollm2.unfolded.abs().max()), float(smollm2.base.abs().max())
    error = float((found - smollm2.unfolded).abs().max())
    print(f"{engine}: base model {base_error:.1e}, adapter {error:.1e}")
    assert error <= ENGINE_FACTOR * base_error * max(1.0, sizes[0] / sizes[1])
    assert float((found - smollm2.base).abs().max()) > 1


def test_llama_cpp(smollm2: SmolLM2) -> None:
    """Its rows one after another, since it takes no padding."""
    base_gguf, output = smollm2.output("base.gguf"), smollm2.output("adapter.gguf")
    write_base(load_model(smollm2.source), base_gguf)
    report = export_gguf(smollm2.checkpoint, output, model=MODEL, base_gguf=base_gguf, threads=1)
    assert report.check is not None
    record(NAME, "llama.cpp", "LoRA", "fp32", report.verdict, report.check.error, report.check.bound)
    assert report.verdict == "passed"
    assert report.check.error <= ALLOWED
    rows = [ids[mask.bool()].tolist() for ids, mask in zip(smollm2.text.ids, smollm2.text.mask, strict=True)]
    found = []
    for adapter in (output, None):
        with LlamaCppModel(base_gguf, adapter, threads=1) as engine:
            found.append(torch.cat([torch.from_numpy(engine.logits(row).copy()) for row in rows]))
    smollm2.assert_right(found[0])
    assert float((found[1] - smollm2.base).abs().max()) <= ALLOWED


def test_merge(smollm2: SmolLM2) -> None:
    report = merge_adapter(smollm2.checkpoint, smollm2.output("merged files"), model=smollm2.source.location)
    assert report.passed
    assert len(report.weights) == 30 * len(TARGETS)
    smollm2.assert_right(
        torch_logits(AutoModelForCausalLM.from_pretrained(smollm2.output("merged files")), smollm2.text)
    )
