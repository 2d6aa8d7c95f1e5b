"""Base weights that PEFT saves beside an adapted embedding: left out where they are the base model's, else refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from loraover.common.errors import ExportError
from loraover_export import check_adapter, export_vllm

from support.exports import REFUSING
from support.make_checkpoint import edit_json, edit_tensors
from support.plain_adapter import make_adapter
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
