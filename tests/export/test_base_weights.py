"""Copies of base weights beside an adapter, and adapters of models without their head: kept, left out or refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoHaConfig, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, AutoModelForSequenceClassification, LlavaForConditionalGeneration

from loraover.common.command_line import run
from loraover.common.errors import ExportError
from loraover_export import check_adapter, export_vllm
from loraover_export.cli import cli

from support.conversions import fill
from support.exports import REFUSING
from support.gguf_export import tiny_base
from support.make_checkpoint import edit_json, edit_tensors
from support.plain_adapter import make_adapter
from support.refusals import only_error
from support.tiny_llava import save_llava
from support.tiny_models import with_lora

KEY = "base_model.model.model.embed_tokens.base_layer.weight"
CHANGED = "2 of its 64 rows, the first of them row 7, are not those of"


def vllm(source: Path, output: Path) -> object:
    report = export_vllm(source, output, dtype="fp32")
    for finding in report.preflight.findings:
        if finding.rule == "tensors":
            raise ExportError(finding.found)
    return report


EXPORTS = {**REFUSING, "vllm": vllm}
del EXPORTS["merge"]  # which writes the whole embedding


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return make_adapter(tmp_path, "Llama", target_modules=["embed_tokens", "q_proj"])


def edit(adapter: Path, change: Callable[[Tensor], Tensor]) -> None:
    edit_tensors(adapter / "adapter_model.safetensors", lambda found: found.update({KEY: change(found[KEY])}))


@pytest.mark.parametrize("export", EXPORTS)
def test_changed_rows_are_refused(export: str, adapter: Path, tmp_path: Path) -> None:
    """PEFT loads them over the base model's rows, and no engine does."""
    edit(adapter, lambda weight: weight.index_fill(0, torch.tensor([7, 9]), 0.5))
    with pytest.raises(ExportError, match=rf"{KEY}: {CHANGED} {tmp_path / 'base'}"):
        EXPORTS[export](adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("export", EXPORTS)
def test_a_copy_in_the_type_that_training_loaded_is_left_out(export: str, adapter: Path, tmp_path: Path) -> None:
    for dtype in (torch.float32, torch.float16):
        edit(adapter, lambda weight, dtype=dtype: weight.to(dtype))  # type: ignore[misc]
        EXPORTS[export](adapter, tmp_path / str(dtype))
        assert (tmp_path / str(dtype)).exists()


@pytest.fixture
def llava(tmp_path: Path) -> Path:
    """A LLaVA with one matrix for its embedding and its head, and an adapter of the head; returns the folder."""
    base = save_llava(tmp_path / "base")
    edit_json(base / "config.json", lambda config: config.update(tie_word_embeddings=True))
    edit_tensors(base / "model.safetensors", lambda found: found.pop("language_model.lm_head.weight"))
    model = with_lora(LlavaForConditionalGeneration.from_pretrained(base), target_modules=["lm_head"])
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path


def found_in(llava: Path, engine: str) -> list[str]:
    (found,) = check_adapter(llava / "adapter", engines=[engine]).engines
    return [f"{one.feature}: {one.found}" for one in found.as_it_is.findings]


def test_a_head_that_only_the_whole_configuration_ties_is_tied(llava: Path) -> None:
    assert any(found.startswith("tied head: ") for found in found_in(llava, "llamacpp"))


def test_a_head_that_the_files_of_the_base_model_lack_is_a_finding(llava: Path) -> None:
    """Its configuration does not say that it was tied."""
    edit_json(llava / "base" / "config.json", lambda config: config.update(tie_word_embeddings=False))
    assert any("rows are not in the files of" in found for found in found_in(llava, "vllm"))


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
