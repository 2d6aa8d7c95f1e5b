"""Rules that depend on vLLM's class or release: silent no-ops, language models of multimodal classes, releases."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from transformers import AutoConfig

from loraover.checkpoint.model_facts import read_served
from loraover.checkpoint.peft_adapter import read_adapter_dir
from loraover.common.command_line import run
from loraover.models.load import resolve_model
from loraover_export.cli import cli
from loraover_export.formats.vllm.candidate import Candidate
from loraover_export.formats.vllm.releases import architectures_of, known_architectures
from loraover_export.formats.vllm.rules import Violation, preflight
from loraover_export.known_faults import Versions, known_faults

from support.make_checkpoint import edit_json
from support.plain_adapter import write_adapter
from support.versions import TRANSFORMERS

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT = SIZES | {"vocab_size": 64, "num_key_value_heads": 1, "head_dim": 32}
MODELS: dict[str, dict[str, Any]] = {
    "DeepseekV3ForCausalLM": {
        "model_type": "deepseek_v3",
        **SIZES,
        "vocab_size": 64,
        "num_key_value_heads": 2,
        "first_k_dense_replace": 1,
    },
    "Idefics3ForConditionalGeneration": {
        "model_type": "idefics3",
        "text_config": {"model_type": "llama", **TEXT},
        "vision_config": SIZES,
    },
    "SmolVLMForConditionalGeneration": {
        "model_type": "smolvlm",
        "text_config": {"model_type": "llama", **TEXT},
        "vision_config": SIZES,
    },
    "Gemma3ForConditionalGeneration": {"model_type": "gemma3", "text_config": TEXT, "vision_config": SIZES},
    "BertForTokenClassification": {"model_type": "bert", **SIZES, "vocab_size": 64},
}
"""Configurations of tiny models; a pre-flight reads nothing else of the served model."""

GEMMA = "Gemma3ForConditionalGeneration"
GEMMA_VISION = "model.vision_tower" if Version("5") <= TRANSFORMERS else "model.vision_tower.vision_model"


def candidate(folder: Path, architecture: str, *paths: str, shape: str | None = None, version: str = "") -> Candidate:
    """An adapter of rank 4 of these modules.

    Args:
        shape: The module of the served model whose shape the matrices have; None means the module's own.
        version: Release of vLLM; "" means that of the table.
    """
    content = MODELS[architecture] | {"architectures": [architecture]}
    AutoConfig.for_model(**content).save_pretrained(folder / "base")
    known = architectures_of(version or None)
    served = read_served(resolve_model(str(folder / "base")), known.lora | {architecture: None})
    matrices = {}
    for path in paths:
        found = served.modules[shape or path].shape
        assert found is not None
        matrices[path] = torch.ones(4, found[0]), torch.ones(found[1], 4)
    adapter = write_adapter(folder / "adapter", matrices, base_model_name_or_path=str(folder / "base"))
    return Candidate(read_adapter_dir(adapter), served, known, "name", str(folder / "base"), "bf16")


def errors(subject: Candidate) -> dict[str, Violation]:
    return {finding.rule: finding for finding in preflight(subject).findings if finding.level == "error"}


@pytest.mark.parametrize("version", ["0.32.0", "0.33.0", "0.33.0+cpu"])
def test_lora_on_kv_b_proj_of_mla_is_refused(version: str, tmp_path: Path) -> None:
    attention = "model.layers.0.self_attn"
    subject = candidate(
        tmp_path, "DeepseekV3ForCausalLM", f"{attention}.kv_b_proj", f"{attention}.q_b_proj", version=version
    )
    found = errors(subject)
    assert found.keys() == {"silent no-ops"}
    assert f"{attention}.kv_b_proj: vLLM {version} loads these matrices but applies them nowhere" in str(found)
    assert "q_b_proj" not in str(found)
    assert "#48974" in found["silent no-ops"].found
    assert "train without kv_b_proj" in found["silent no-ops"].remedy


def test_a_no_op_holds_for_its_classes_and_releases_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = candidate(tmp_path, "DeepseekV3ForCausalLM", "model.layers.0.self_attn.kv_b_proj")
    table = known_faults()
    ((fault, no_op),) = table.no_ops
    others: dict[str, dict[str, object]] = {
        "classes": {"no_op": no_op.model_copy(update={"classes": ("DeepseekV2ForCausalLM",)})},
        "versions": {"versions": Versions(before="0.32.0")},
    }
    for other in others.values():
        changed = table.model_copy(update={"faults": (fault.model_copy(update=other),)})
        monkeypatch.setattr("loraover_export.formats.vllm.rules.model.known_faults", lambda changed=changed: changed)
        assert not errors(subject)


def test_the_classes_of_the_no_ops_take_adapters() -> None:
    """A class that vLLM serves without adapters is refused already, and a misspelt one would match nothing."""
    assert all(set(no_op.classes) <= known_architectures().lora.keys() for _, no_op in known_faults().no_ops)


@pytest.mark.parametrize("architecture", ["Idefics3ForConditionalGeneration", "SmolVLMForConditionalGeneration"])
def test_a_text_adapter_of_a_multimodal_model_is_accepted(architecture: str, tmp_path: Path) -> None:
    layer = "model.text_model.layers.0"
    paths = (f"{layer}.self_attn.q_proj", f"{layer}.mlp.down_proj")
    assert not errors(candidate(tmp_path, architecture, *paths))


@pytest.mark.parametrize(
    ("architecture", "path"),
    [
        ("SmolVLMForConditionalGeneration", "model.vision_model.encoder.layers.0.self_attn.q_proj"),
        ("SmolVLMForConditionalGeneration", "model.connector.modality_projection.proj"),
        (GEMMA, f"{GEMMA_VISION}.encoder.layers.0.self_attn.q_proj"),
    ],
)
def test_an_adapter_of_the_vision_tower_needs_the_servers_option(architecture: str, path: str, tmp_path: Path) -> None:
    subject = candidate(tmp_path, architecture, path)
    found = errors(subject)
    assert found.keys() == {"towers"}
    assert (
        "and vLLM adapts only the language model unless it is started with --enable-tower-connector-lora"
        in found["towers"].found
    )
    started = preflight(replace(subject, adapts_towers=True))
    assert [(each.rule, each.level) for each in started.findings] == [("towers", "warning")]
    table = subject.architectures
    without = table.lora | {architecture: table.lora[architecture].model_copy(update={"towers": ()})}
    unsupported = replace(subject, adapts_towers=True, architectures=table.model_copy(update={"lora": without}))
    assert "does not reach these modules" in errors(unsupported)["towers"].found


def test_names_are_mapped_before_the_prefix_is_required(tmp_path: Path) -> None:
    path = "model.language_model.layers.0.self_attn.q_proj"
    subject = candidate(tmp_path, GEMMA, path)
    assert known_architectures().lora[GEMMA].rename(path) == "language_model.model.layers.0.self_attn.q_proj"
    assert not errors(subject)
    table = subject.architectures
    unmapped = table.lora | {GEMMA: table.lora[GEMMA].model_copy(update={"renames": ()})}
    assert errors(replace(subject, architectures=table.model_copy(update={"lora": unmapped}))).keys() == {"towers"}


@pytest.mark.parametrize(
    ("architecture", "path", "place"),
    [
        (GEMMA, "model.layers.0.self_attn.q_proj", "model.language_model.layers.0.self_attn.q_proj"),
        (
            "SmolVLMForConditionalGeneration",
            "model.layers.0.mlp.up_proj",
            "model.text_model.layers.0.mlp.up_proj",
        ),
    ],
)
def test_an_adapter_of_the_text_model_reaches_a_multimodal_one_since_0_33(
    architecture: str, path: str, place: str, tmp_path: Path
) -> None:
    found = errors(candidate(tmp_path / "old", architecture, path, shape=place, version="0.32.0"))
    assert found.keys() == {"modules"}
    subject = candidate(tmp_path / "new", architecture, path, shape=place, version="0.33.0")
    assert subject.present == {path: place}
    assert not errors(subject)


def test_token_classifiers_since_0_33(tmp_path: Path) -> None:
    path = "bert.encoder.layer.0.attention.self.query"
    for version, rules, heads in (
        ("0.32.0", {"architecture", "other parameters"}, "can load the heads of sequence classifiers"),
        ("0.33.0", {"other parameters"}, "can load the heads of sequence and token classifiers"),
    ):
        subject = candidate(tmp_path / version, "BertForTokenClassification", path, version=version)
        adapter = subject.adapter.path
        edit_json(adapter / "adapter_config.json", lambda content: content.update(modules_to_save=["classifier"]))
        found = errors(replace(subject, adapter=read_adapter_dir(adapter)))
        assert found.keys() == rules
        assert heads in found["other parameters"].found


@pytest.mark.parametrize(
    ("version", "platform", "words"),
    [
        ("0.32.0+cpu", "cpu", "leak into the base model's answers"),
        ("0.32.0", "cuda", "compute capability 9.0"),
        ("0.33.0", "cpu", None),
        ("0.33.0", "cuda", None),
        ("0.32.0", None, None),
        ("0.31.2", None, "the rules were read from vLLM 0.32.0"),
        ("0.34.0rc1", None, "0.34.0rc1 may differ"),
    ],
)
def test_faults_of_a_release_are_warnings(version: str, platform: Any, words: str | None, tmp_path: Path) -> None:
    subject = candidate(tmp_path, GEMMA, "model.language_model.layers.0.self_attn.q_proj", version=version)
    found = [f for f in preflight(replace(subject, platform=platform)).findings if f.rule == "engine"]
    assert [finding.level for finding in found] == ([] if words is None else ["warning"])
    assert words is None or words in found[0].found


def test_the_command_takes_a_release(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, place = "model.layers.0.self_attn.q_proj", "model.language_model.layers.0.self_attn.q_proj"
    subject = candidate(tmp_path, GEMMA, path, shape=place)
    words = ["vllm", str(subject.adapter.path), "-o", str(tmp_path / "out"), "--json"]
    assert run(cli, words) == 2
    capsys.readouterr()
    assert run(cli, [*words, "--vllm-version", "0.33.0"]) == 0
    assert json.loads(capsys.readouterr().out)["preflight"]["vllm_version"] == "0.33.0"
    assert "--vllm-version 0.33.0" in (tmp_path / "out" / "README.md").read_text()
    assert run(cli, [*words, "--vllm-version", "newest", "--force"]) == 2
    assert "'newest' is not a version of vLLM" in capsys.readouterr().err
