"""The model that outputs are compared with: what PEFT makes of a plain adapter's files, and a base left as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from loraover.checkpoint.peft_adapter import read_adapter_dir
from loraover.common.errors import CheckpointError
from loraover.reference import reference_model

from support.check_cases import lose_layer_1
from support.make_checkpoint import edit_json, edit_tensors
from support.merge_cases import CASES, Saved, outputs, save
from support.tiny_models import tiny_llama, token_ids
from tolerances import UNIT

EMBEDDING = "base_model.model.model.embed_tokens.base_layer.weight"
FIELDS: dict[str, dict[str, Any]] = {
    "aLoRA": {"alora_invocation_tokens": token_ids(seed=100, batch=3, length=7)[0, 2:4].tolist()},  # as `outputs` has
    "repeated layers": {"layer_replication": [[0, 2], [1, 2]]},
    "another pattern": {"alpha_pattern": {"q_proj": 50}},
}
"""Fields that change what an adapter computes, whether or not we read them."""


def check(saved: Saved) -> None:
    """The outputs are PEFT's, and not those of the base model, which stays as it was."""
    base = saved.base()
    before, expected = outputs(base), outputs(PeftModel.from_pretrained(saved.base(), saved.adapter).eval())
    with reference_model(base, read_adapter_dir(saved.adapter)) as model:
        assert float((outputs(model) - expected).abs().max()) <= 64 * UNIT[torch.float32] * float(expected.abs().max())
    assert float((before - expected).abs().max()) > 1e-3
    assert torch.equal(outputs(base), before)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.dtype == torch.float32])
def test_it_is_pefts(name: str, tmp_path: Path) -> None:
    check(save(name, tmp_path))


@pytest.mark.parametrize("name", FIELDS)
def test_it_reads_what_peft_reads(name: str, tmp_path: Path) -> None:
    saved = save("linear", tmp_path)
    edit_json(saved.adapter / "adapter_config.json", lambda config: config.update(FIELDS[name]))
    check(saved)


@pytest.mark.parametrize("name", ["embedding", "tied embedding"])
def test_changed_rows_beside_a_lora_are_taken_over(name: str, tmp_path: Path) -> None:
    """PEFT loads them into the base model's embedding, and so into a head that is tied to it."""
    saved = save(name, tmp_path)
    edit_tensors(saved.adapter / "adapter_model.safetensors", lambda found: found[EMBEDDING][7].add_(1))
    check(saved)


def test_another_base_model_is_refused(tmp_path: Path) -> None:
    saved = save("linear", tmp_path)
    with (
        pytest.raises(CheckpointError, match=r"with model\."),
        reference_model(tiny_llama(num_hidden_layers=1), read_adapter_dir(saved.adapter)),
    ):
        pass


def test_a_layer_that_the_file_lost_is_refused(tmp_path: Path) -> None:
    """PEFT would start it again, and the reference would be that of what is left."""
    saved = save("linear", tmp_path)
    edit_tensors(saved.adapter / "adapter_model.safetensors", lose_layer_1)
    with (
        pytest.raises(CheckpointError, match=r"names .*layers\.1\..*, and the file of tensors holds only"),
        reference_model(saved.base(), read_adapter_dir(saved.adapter)),
    ):
        pass
