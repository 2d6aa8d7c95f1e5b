"""LoRA of experts for vLLM: a pair for each expert, or stacks, as the class of the served model reads them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from loraover_export import VllmReport, check_adapter, export_vllm
from loraover_export.formats.vllm.releases import known_architectures

from support.make_checkpoint import edit_tensors
from support.plain_adapter import tiny_decoder
from support.tiny_experts import EXPERT_SIZES, EXPERTS, expert_lora, flip, peft_deltas, tiny_llama4, tiny_moe
from support.tiny_models import saved, token_ids
from support.versions import needs_expert_stacks

pytestmark = needs_expert_stacks

KEY = "base_model.model.model.layers.1.mlp.experts"


@pytest.fixture
def adapter(tmp_path: Path) -> tuple[Path, Any]:
    base = saved(tiny_moe(), tmp_path / "base")
    return tmp_path / "adapter", expert_lora(base, tmp_path / "adapter")


def export(folder: Path, *, stacked: bool, monkeypatch: pytest.MonkeyPatch, **options: Any) -> VllmReport:
    """Export for the class of the base, made to read stacks or not."""
    allowed = known_architectures().lora
    described = allowed["Qwen3MoeForCausalLM"].model_copy(update={"stacked_experts": stacked})
    monkeypatch.setitem(allowed, "Qwen3MoeForCausalLM", described)
    return export_vllm(folder, folder.parent / "out", dtype="fp32", force=True, **options)


def errors(report: VllmReport) -> dict[str, str]:
    """What the pre-flight found wrong, by rule."""
    return {finding.rule: finding.found for finding in report.preflight.findings if finding.level == "error"}


def product(tensors: dict[str, Tensor], module: str) -> Tensor:
    return tensors[f"{module}.lora_B.weight"].double() @ tensors[f"{module}.lora_A.weight"].double()


def test_the_table_says_what_vllm_reads() -> None:
    stacked = {name for name, found in known_architectures().lora.items() if found.stacked_experts}
    assert {"GptOssForCausalLM", "Qwen3VLMoeForConditionalGeneration"} <= stacked
    assert not stacked & {"Qwen3MoeForCausalLM", "MixtralForCausalLM", "OlmoeForCausalLM"}


@pytest.mark.parametrize("version", [None, "0.18.0"], ids=["as saved", "flipped"])
def test_each_expert_gets_its_pairs(
    adapter: tuple[Path, Any], version: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, model = adapter
    deltas = peft_deltas(model)
    if version is not None:
        flip(folder, version)
    report = export(folder, stacked=False, monkeypatch=monkeypatch)
    assert report.passed
    tensors = load_file(folder.parent / "out" / "adapter_model.safetensors")
    assert len(tensors) == 2 * (2 * 2 + 2 * EXPERTS * 3)
    for expert in range(EXPERTS):
        gate, up, down = (product(tensors, f"{KEY}.{expert}.{name}_proj") for name in ("gate", "up", "down"))
        module = f"model.layers.1.mlp.experts.{expert}"
        torch.testing.assert_close(
            torch.cat([gate, up]), deltas[f"{module}.gate_up_proj"].double(), rtol=1e-5, atol=1e-6
        )
        torch.testing.assert_close(down, deltas[f"{module}.down_proj"].double(), rtol=1e-5, atol=1e-6)
    config = json.loads((folder.parent / "out" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["down_proj", "gate_proj", "q_proj", "up_proj", "v_proj"]
    assert "target_parameters" not in config


@pytest.mark.parametrize("family", ["Qwen3Moe", "Qwen2Moe"])
def test_the_pairs_are_read_again(family: str, tmp_path: Path) -> None:
    """Qwen2-MoE's shared expert has projections of the same names, which the configuration must not name."""
    base = saved(tiny_decoder(family, **EXPERT_SIZES, shared_expert_intermediate_size=48), tmp_path / "base")
    expert_lora(base, tmp_path / "adapter")
    for source, out in (("adapter", "first"), ("first", "second")):
        assert export_vllm(tmp_path / source, tmp_path / out, dtype="fp32").passed
    first, second = (load_file(tmp_path / out / "adapter_model.safetensors") for out in ("first", "second"))
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())
    verdicts = {e.engine: (e.as_it_is.verdict, e.exported.verdict) for e in check_adapter(tmp_path / "first").engines}
    assert verdicts["vllm"] == ("right", "right")
    torchs = "right" if measured(tmp_path) < 1e-5 else "wrong silently"
    assert torchs == ("right" if family == "Qwen3Moe" else "wrong silently")
    assert (verdicts["torch"], verdicts["openvino"]) == ((torchs, torchs), ("wrong silently", "wrong silently"))
    assert check_adapter(tmp_path / "adapter", engines="torch").engines[0].exported.verdict == torchs


def measured(folder: Path) -> float:
    """Largest difference of the logits that PEFT computes with the pairs from those with the stacks."""
    found = []
    for name in ("adapter", "first"):
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "base"), folder / name)
        with torch.no_grad():
            found.append(model.eval()(token_ids()).logits)
    return float((found[0] - found[1]).abs().max())


def lose(found: dict[str, Tensor]) -> None:
    for side in "AB":
        del found[f"{KEY}.2.up_proj.lora_{side}.weight"]


def narrow(found: dict[str, Tensor]) -> None:
    key = f"{KEY}.2.up_proj.lora_B.weight"
    found[key] = found[key][:-1]


@pytest.mark.parametrize(
    ("change", "rule", "words"),
    [
        (lose, "experts", f"11 of {EXPERTS * 3} pairs of model.layers.1.mlp.experts"),
        (narrow, "shapes", "64 to 47 features in the adapter, 64 to 48"),
    ],
)
def test_pairs_that_vllm_cannot_load_are_refused(
    change: Callable[[dict[str, Tensor]], object], rule: str, words: str, adapter: tuple[Path, Any]
) -> None:
    folder = adapter[0].parent
    export_vllm(adapter[0], folder / "pairs")
    edit_tensors(folder / "pairs" / "adapter_model.safetensors", change)
    report = export_vllm(folder / "pairs", folder / "out")
    assert errors(report).keys() == {rule}
    assert words in errors(report)[rule]


@pytest.mark.parametrize("version", [None, "0.18.0"], ids=["as saved", "flipped"])
def test_stacks_are_those_of_peft(
    adapter: tuple[Path, Any], version: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, model = adapter
    ids = token_ids(seed=3)
    expected = model(input_ids=ids).logits.detach()
    if version is not None:
        flip(folder, version)
    assert export(folder, stacked=True, monkeypatch=monkeypatch).passed
    assert f"{KEY}.base_layer.lora_A.weight" in load_file(folder.parent / "out" / "adapter_model.safetensors")
    base = AutoModelForCausalLM.from_pretrained(folder.parent / "base")
    served = PeftModel.from_pretrained(base, folder.parent / "out").eval()
    torch.testing.assert_close(served(input_ids=ids).logits.detach(), expected, rtol=0, atol=1e-5)
    with served.disable_adapter():
        assert float((served(input_ids=ids).logits - expected).abs().max()) > 1e-2


def test_experts_that_hide_their_orientation_are_refused(tmp_path: Path) -> None:
    """Llama-4's gate and up are columns, which the model does not say; B's rows would be cut in the wrong place."""
    base = saved(tiny_llama4(), tmp_path / "base")
    names = ["feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"]
    expert_lora(base, tmp_path / "adapter", target_parameters=names)
    report = export_vllm(tmp_path / "adapter", tmp_path / "out")
    assert errors(report).keys() == {"experts"}
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", ["Mixtral", "MiniMaxM2"])
def test_experts_below_a_module_of_another_name_are_refused(family: str, tmp_path: Path) -> None:
    base = saved(tiny_decoder(family, num_local_experts=EXPERTS), tmp_path / "base")
    expert_lora(base, tmp_path / "adapter")
    described = known_architectures().lora[f"{family}ForCausalLM"]
    assert described.rename("model.layers.0.mlp.experts.0.w1") == "model.layers.0.mlp.experts.0.w1"
    report = export_vllm(tmp_path / "adapter", tmp_path / "out")
    assert errors(report).keys() == {"experts"}
    assert "below block_sparse_moe" in errors(report)["experts"]


def test_a_class_without_adapters_is_named(adapter: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its modules are not read, so the experts are not looked for in it."""
    monkeypatch.delitem(known_architectures().lora, "Qwen3MoeForCausalLM")
    report = export_vllm(adapter[0], adapter[0].parent / "out")
    assert errors(report).keys() == {"architecture"}


def test_half_of_an_expert_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = saved(tiny_moe(), tmp_path / "base")
    expert_lora(base, tmp_path / "adapter", target_parameters=["mlp.experts.down_proj"])
    report = export(tmp_path / "adapter", stacked=False, monkeypatch=monkeypatch)
    assert errors(report).keys() == {"experts"}
