"""Reasons of a refusal are the right ones: what they say to do makes the same command succeed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoHaConfig, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForSequenceClassification

from loraover.common.command_line import run
from loraover_export.cli import cli

from support.conversions import fill
from support.exports import REFUSING
from support.gguf_export import tiny_base
from support.refusals import only_error

TENSORS = "adapter_model.safetensors"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tiny_base("Llama").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def save(model: Any, config: Any, folder: Path) -> Path:
    """An adapter of a model that was loaded from a folder, with no parameter that is zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        adapted = get_peft_model(model, config)
        fill(adapted, config.peft_type)
    adapted.save_pretrained(folder)
    return folder


KINDS: dict[str, Callable[..., Any]] = {"LORA": LoraConfig, "LOHA": LoHaConfig}


@pytest.mark.parametrize(("kind", "command"), [*(("LORA", verb) for verb in REFUSING), ("LOHA", "convert")])
def test_an_adapter_of_a_model_without_its_head(
    kind: str, command: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """PEFT names the modules of a LlamaModel without the prefix that they have in a LlamaForCausalLM."""
    config = KINDS[kind](task_type="FEATURE_EXTRACTION", target_modules=["q_proj"], r=2)
    source = save(AutoModel.from_pretrained(base), config, tmp_path / "in")
    words = [command, str(source), "-o", str(tmp_path / "out")]
    assert run(cli, words) == 2
    path = "layers.0.self_attn.q_proj"
    assert f"has model.{path}, so the adapter may" in (error := only_error(capsys.readouterr().err))
    assert "Rename its tensors" in error
    found = load_file(source / TENSORS)
    save_file({key.replace(".layers.", ".model.layers."): tensor for key, tensor in found.items()}, source / TENSORS)
    assert run(cli, words) == 0


def test_a_classifier_on_a_base_model_without_its_head(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"], r=2)
    labelled = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    source = save(labelled, config, tmp_path / "in")
    words = ["merge", str(source), "-o", str(tmp_path / "out")]
    assert run(cli, words) == 2
    error = only_error(capsys.readouterr().err)
    assert "score.weight is of the head of task_type SEQ_CLS, and the base model is a LlamaForCausalLM" in error
    assert "AutoModelForSequenceClassification.from_pretrained(..., num_labels=3)" in error
    AutoModelForSequenceClassification.from_pretrained(base, num_labels=3).save_pretrained(tmp_path / "labelled")
    assert run(cli, [*words, "--model", str(tmp_path / "labelled")]) == 0
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(merged["score.weight"], load_file(source / TENSORS)["base_model.model.score.weight"])
