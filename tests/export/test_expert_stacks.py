"""Adapters of fused experts as ordinary pairs: both of PEFT's layouts, against PEFT's own deltas."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from loraover.adapters.numerics.delta import read_deltas
from loraover.checkpoint.expert_stacks import find_expert_weights
from loraover.checkpoint.files import CONFIG_FILE, TENSORS_FILE
from loraover.checkpoint.peft_adapter import read_on_base
from loraover.checkpoint.source import read_source
from loraover.common.errors import CheckpointError, ExportError
from loraover_export import combine_adapters, convert_adapter, diff_adapters, export_onnx, merge_adapter
from loraover_serve import measure_parity, verify_adapter

from support.make_checkpoint import edit_json, edit_tensors
from support.plain_adapter import tiny_decoder
from support.tiny_experts import EXPERTS, expert_lora, flip, peft_deltas, tiny_moe
from support.tiny_hub import tiny_tokenizer
from support.tiny_models import saved
from support.versions import needs_expert_stacks

pytestmark = needs_expert_stacks

SQUARE = {"moe_intermediate_size": 32}
"""gate_up_proj of each expert is 64 x 64."""


@pytest.mark.parametrize("version", ["0.21.2", "0.18.1", None])
@pytest.mark.parametrize("sizes", [{}, SQUARE], ids=["oblong", "square"])
def test_deltas_are_pefts_in_both_layouts(tmp_path: Path, sizes: dict[str, int], version: str | None) -> None:
    base = find_expert_weights(tiny_moe(**sizes))
    deltas = peft_deltas(expert_lora(tiny_moe(**sizes), tmp_path / "adapter"))
    if version != "0.21.2":
        flip(tmp_path / "adapter", version)
    if sizes and version is None:
        with pytest.raises(CheckpointError, match=r"square, \(64, 64\).*does not record the version of PEFT"):
            read_on_base(read_source(tmp_path / "adapter"), base)
        return
    source = read_on_base(read_source(tmp_path / "adapter"), base)
    assert read_on_base(source, base) == source
    found = {delta.module: delta.product().value for delta in read_deltas(source)}
    assert len(deltas) == 2 * 2 * EXPERTS
    for path, delta in deltas.items():
        torch.testing.assert_close(found[path], delta.double(), rtol=1e-5, atol=1e-6)
    assert found.keys() - deltas.keys() == {f"model.layers.{i}.self_attn.{m}_proj" for i in range(2) for m in "qv"}


@pytest.mark.parametrize(
    "build",
    [
        lambda: tiny_decoder("GptOss", num_local_experts=EXPERTS, intermediate_size=48),
        lambda: tiny_decoder("GptOss", num_local_experts=EXPERTS, intermediate_size=32),
        lambda: tiny_moe(num_experts=1, num_experts_per_tok=1),
    ],
    ids=["transposed", "transposed, square", "one expert"],
)
def test_other_experts_have_pefts_deltas(tmp_path: Path, build: Callable[[], Any]) -> None:
    """gpt-oss stores inputs before outputs, and says so."""
    base = find_expert_weights(build())
    deltas = peft_deltas(expert_lora(build(), tmp_path))
    found = {delta.module: delta.product().value for delta in read_deltas(read_on_base(read_source(tmp_path), base))}
    assert len(deltas) == sum(weight.experts for weight in base.values())
    for path, delta in deltas.items():
        torch.testing.assert_close(found[path], delta.double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("version", ["0.21.2", "0.18.1"])
def test_a_conversion_is_read_by_peft(tmp_path: Path, version: str) -> None:
    """From either layout, two ranks and rsLoRA to PEFT's present stacks of one rank."""
    base = saved(tiny_moe(), tmp_path / "base")
    deltas = peft_deltas(expert_lora(base, tmp_path / "adapter"))
    if version == "0.18.1":
        flip(tmp_path / "adapter", version)
    report = convert_adapter(tmp_path / "adapter", tmp_path / "out")
    assert report.certificate.passed
    assert report.exact_rank == report.certificate.rank == 4
    converted = PeftModel.from_pretrained(tiny_moe(), tmp_path / "out")
    found = peft_deltas(converted)
    assert found.keys() == deltas.keys()
    for path, delta in deltas.items():
        torch.testing.assert_close(found[path], delta, rtol=1e-5, atol=1e-6)


def test_the_logits_of_a_conversion_are_compared(tmp_path: Path) -> None:
    """PEFT reads the source as it was trained, and refuses or misreads the same source of an older release."""
    base = tiny_moe()
    base.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    base.name_or_path = str(tmp_path / "base")
    expert_lora(base, tmp_path / "adapter")
    (tmp_path / "prompts.txt").write_text("hello world\n")
    asked: dict[str, Any] = {"check_error": True, "prompts": tmp_path / "prompts.txt", "device": "cpu"}
    outputs = convert_adapter(tmp_path / "adapter", tmp_path / "out", **asked).outputs
    assert outputs is not None
    assert outputs.error.max_logit < 1e-4 < 1e-2 < outputs.adapter_effect
    flip(tmp_path / "adapter", "0.18.1")
    with pytest.raises(ExportError, match=r"as PEFT before 0\.19\.0 saved them.*Leave out check_error"):
        convert_adapter(tmp_path / "adapter", tmp_path / "old", **asked)
    assert not (tmp_path / "old").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"target_parameters": ["mlp.experts.gate_up_proj"]},
            "has 2 stacked pairs, and target_parameters names .* gate_up",
        ),
        ({"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.w2"]}, "no others than gate_up_proj and down"),
        ({"r": 5}, "has 16 rows and lora_B 16 columns, expected the same multiple of 5"),
    ],
)
def test_stacks_that_contradict_the_configuration_are_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    expert_lora(tiny_moe(), tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(CheckpointError, match=message):
        read_source(tmp_path)


EXPERTS_KEY = "base_model.model.model.layers.0.mlp.experts"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight": torch.tensor(1.0)}, "expected a matrix"),
        ({f"{EXPERTS_KEY}.lora_B.weight": torch.ones(12)}, "has 1 stacked pairs"),
        ({f"{EXPERTS_KEY}.lora_B.weight": torch.ones(64, 3, 4)}, "has 1 stacked pairs"),
        (
            {f"{EXPERTS_KEY}.lora_A.weight": torch.ones(0, 48), f"{EXPERTS_KEY}.lora_B.weight": torch.ones(64, 0)},
            "has 0 rows and lora_B 0 columns",
        ),
        ({f"{EXPERTS_KEY}.0.down_proj.lora_A.weight": torch.ones(3, 48)}, "both adapt one expert"),
    ],
    ids=["a number", "a vector", "three dimensions", "no experts", "a pair beside the stack"],
)
def test_damaged_files_are_refused(tmp_path: Path, tensors: dict[str, Tensor], message: str) -> None:
    expert_lora(tiny_moe(), tmp_path)
    edit_tensors(tmp_path / TENSORS_FILE, lambda found: found.update(tensors))
    edit_json(tmp_path / CONFIG_FILE, lambda config: config["target_modules"].append("0.down_proj"))
    with pytest.raises(CheckpointError, match=message):
        read_source(tmp_path)


def test_another_base_is_refused(tmp_path: Path) -> None:
    expert_lora(tiny_moe(), tmp_path)
    for other in ({"num_experts": 3}, {"moe_intermediate_size": 40}):
        with pytest.raises(CheckpointError, match="name the model that the adapter was trained on"):
            read_on_base(read_source(tmp_path), find_expert_weights(tiny_moe(**other)))


def test_sums_and_differences(tmp_path: Path) -> None:
    """The sum of an adapter with itself at two weights; an old file has to be converted first."""
    deltas = peft_deltas(expert_lora(tiny_moe(), tmp_path / "one"))
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    combine_adapters([tmp_path / "one", tmp_path / "two"], tmp_path / "sum", weights=[0.5, -2.0])
    found = peft_deltas(PeftModel.from_pretrained(tiny_moe(), tmp_path / "sum"))
    for path, delta in deltas.items():
        torch.testing.assert_close(found[path], -1.5 * delta, rtol=1e-5, atol=1e-6)
    assert diff_adapters(tmp_path / "one", tmp_path / "two").difference < 1e-9
    flip(tmp_path / "two", "0.18.1")
    with pytest.raises(ExportError, match="Write it again with loraover export convert"):
        diff_adapters(tmp_path / "one", tmp_path / "two")


def test_sums_over_different_numbers_of_experts_are_refused(tmp_path: Path) -> None:
    for folder, count in (("one", 4), ("two", 2)):
        expert_lora(tiny_moe(num_experts=count), tmp_path / folder)
    with pytest.raises(ExportError, match=r"one and .*two adapt .*different numbers of experts"):
        combine_adapters([tmp_path / "one", tmp_path / "two"], tmp_path / "sum", weights=[1.0, 1.0])


def test_what_applies_no_experts_says_so(tmp_path: Path) -> None:
    base = saved(tiny_moe(), tmp_path / "base")
    expert_lora(base, tmp_path / "adapter")
    with pytest.raises(ExportError, match=r"gate_up_proj, which holds all experts; the export to ONNX"):
        export_onnx(tmp_path / "adapter", tmp_path / "onnx", mode="merged")
    with pytest.raises(ExportError, match="the check of engines does not support LoRA on experts"):
        verify_adapter(tmp_path / "adapter", engines=["torch"])
    with pytest.raises(ExportError, match="the parity measurement does not support LoRA on experts"):
        measure_parity(tmp_path / "adapter")
    with pytest.raises(ExportError, match="an adapter of single parameters"):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged")
