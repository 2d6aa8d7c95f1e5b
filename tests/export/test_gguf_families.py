"""Every family of the table in llama.cpp: its logits equal PEFT's, and the other row order would be noticed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from loraover_export import GgufReport, export_gguf
from loraover_export.formats.gguf.target import FAMILIES

from support.compatibility import record
from support.gguf_export import GgufMade, adapted, apart, engine_logits, make_gguf, read_tensors

pytestmark = pytest.mark.engine

NAMES = sorted(name.removesuffix("ForCausalLM") for name in FAMILIES)
ALLOWED = 1e-4
"""Logits lie within +-20, where one rounding is 1e-6; two layers round some dozens of times."""
WITH_GELU = 2.0**-11
"""Share of the largest logit: llama.cpp looks up GELU in a table of float16."""


def allowed(made: GgufMade) -> float:
    has_table = "Gemma" in type(made.model.get_base_model()).__name__
    return max(ALLOWED, WITH_GELU * float(made.logits().abs().max()) if has_table else 0.0)


@pytest.fixture(scope="module", params=NAMES)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> GgufMade:
    return make_gguf(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def report(made: GgufMade) -> GgufReport:
    return export_gguf(made.adapter, made.folder / "adapter.gguf", base_gguf=made.base_gguf, threads=1)


def test_logits_are_pefts(made: GgufMade, report: GgufReport) -> None:
    family = report.architecture.removesuffix("ForCausalLM")
    assert apart(engine_logits(made.base_gguf), made.base_logits()) <= allowed(made)
    error = apart(engine_logits(made.base_gguf, made.folder / "adapter.gguf"), made.logits())
    assert report.check is not None
    record(family, "llama.cpp", "LoRA", "fp32", report.verdict, report.check.error, report.check.bound)
    assert error <= allowed(made)
    assert report.verdict == "passed"
    assert report.check.weight_types == ["F32"]


def test_heads_that_are_rotated_in_part(tmp_path: Path) -> None:
    made = make_gguf(tmp_path, "Phi3", changes={"partial_rotary_factor": 0.75})
    assert apart(engine_logits(made.base_gguf), made.base_logits()) <= allowed(made)


ROPE = {"rope_type": "default", "rope_theta": 500.0}


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("SmolLM3", {"num_hidden_layers": 8}),
        ("Gemma3", {"num_hidden_layers": 6, "sliding_window": 6, "rope_parameters": {"sliding_attention": ROPE}}),
        ("Gemma3", {"final_logit_softcapping": 0.5}),
    ],
)
def test_layers_that_differ(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    """Some layers are not rotated, look back less far, or rotate at another rate; and logits that are capped."""
    rope = changes.get("rope_parameters", {})
    full = {"rope_parameters": rope | {"full_attention": ROPE | {"rope_theta": 1e6}}} if rope else {}
    made = make_gguf(tmp_path, family, changes=changes | full)
    layers = changes.get("num_hidden_layers", 2)
    assert apart(engine_logits(made.base_gguf), made.base_logits()) <= layers / 2 * allowed(made)


def test_a_router_alone(tmp_path: Path) -> None:
    """It is named by its weight, as the experts are, and its pair is that of a linear layer."""
    made = make_gguf(tmp_path, "Qwen3Moe", target_modules=["q_proj"], target_parameters=["mlp.gate.weight"])
    assert export_gguf(made.adapter, tmp_path / "out.gguf", base_gguf=made.base_gguf, threads=1).verdict == "passed"
    assert any("ffn_gate_inp" in name for name in read_tensors(tmp_path / "out.gguf"))


def test_the_other_row_order_is_rejected(
    made: GgufMade, report: GgufReport, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Reordered where llama.cpp keeps the order, and the other way round."""
    family = FAMILIES[report.architecture]
    if family.name == "phi3":
        pytest.skip("its queries and keys are in one matrix, which no family reorders")
    base = AutoModelForCausalLM.from_pretrained(made.base)
    adapted(base, tmp_path / "in", target_modules=["q_proj", "k_proj"], lora_alpha=100, alpha_pattern={})
    monkeypatch.setitem(FAMILIES, report.architecture, replace(family, interleaved=not family.interleaved))
    found = export_gguf(tmp_path / "in", tmp_path / "out.gguf", base_gguf=made.base_gguf, threads=1)
    assert found.verdict == "failed"
    assert not (tmp_path / "out.gguf").exists()
    assert found.check is not None
    assert found.check.error > 20 * allowed(made)
