"""Bases that bitsandbytes has quantised: a fold is checked, recorded and verified on them as on any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from loraover_export import fold_checkpoint
from loraover_serve import record_adapter, verify_adapter

from support.plugin import make_checkpoint_on
from support.recorded import LINES
from support.tiny_hub import save_llama

pytestmark = pytest.mark.process
FORMS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
    "int8": {"load_in_8bit": True},
}


@pytest.mark.parametrize("form", FORMS)
def test_a_fold_on_a_quantised_base_is_checked(form: str, tmp_path: Path) -> None:
    """However little memory there is, since transformers cannot leave such weights in their files."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    full = save_llama(tmp_path / "full", hidden_size=128, intermediate_size=256)  # on a CPU, nf4 needs 64 columns
    how = BitsAndBytesConfig(**FORMS[form])
    AutoModelForCausalLM.from_pretrained(full, quantization_config=how, device_map={"": "cpu"}).save_pretrained(
        base := tmp_path / "base"
    )
    AutoTokenizer.from_pretrained(full).save_pretrained(base)
    make_checkpoint_on(base, tmp_path / "checkpoint")
    little: dict[str, Any] = {"device": "cpu", "max_memory_gib": 1e-9}
    certificate = fold_checkpoint(tmp_path / "checkpoint", tmp_path / "folded", check_error=True, **little)
    outputs = certificate.outputs
    assert certificate.passed
    assert outputs is not None
    assert outputs.adapter_effect > 10 * outputs.bound
    (tmp_path / "questions.txt").write_text("\n".join(LINES[:3]))
    options: dict[str, Any] = {"prompts": tmp_path / "questions.txt", "new_tokens": 2, **little}
    assert record_adapter(tmp_path / "folded", **options).effect > 0
    assert verify_adapter(tmp_path / "folded", engines=["torch"], **options).verdict == "as trained"
