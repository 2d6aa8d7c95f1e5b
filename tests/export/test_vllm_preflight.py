"""The pre-flight: every mistake is an error that names its remedy, and nothing is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model

from loraover.checkpoint.model_facts import read_served
from loraover.checkpoint.peft_adapter import read_adapter_dir
from loraover.common.command_line import run
from loraover.models.load import resolve_model
from loraover_export import export_vllm
from loraover_export.cli import cli
from loraover_export.formats.vllm.candidate import Candidate
from loraover_export.formats.vllm.releases import known_architectures
from loraover_export.formats.vllm.rules import RULES, Preflight, preflight

from support.make_checkpoint import edit_json, tree
from support.plain_adapter import make_adapter, tiny_decoder
from support.tiny_models import fill_b, saved, tiny_bert, tiny_gpt2, tiny_t5
from support.vllm_damage import DAMAGES, config

Check = Callable[..., Preflight]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tmp_path_factory.mktemp("llama"), "Llama")


@pytest.fixture
def check(tmp_path: Path) -> Check:
    """The pre-flight of an export; where it finds an error, the export must leave nothing behind."""

    def call(source: Path, **options: Any) -> Preflight:
        before = tree(tmp_path)
        report = export_vllm(source, tmp_path / "out", **options)
        assert report.exit_code == (0 if report.preflight.passed else 2)
        assert report.passed or tree(tmp_path) == before
        return report.preflight

    return call


def damaged(adapter: Path, folder: Path, change: Callable[[Path], object]) -> Path:
    shutil.copytree(adapter, folder)
    change(folder)
    return folder


def findings(report: Preflight, level: str = "error") -> dict[str, str]:
    return {finding.rule: finding.found for finding in report.findings if finding.level == level}


def test_a_right_adapter_passes_every_rule(adapter: Path, check: Check) -> None:
    report = check(adapter)
    assert set(report.rules.values()) == {"passed"}
    assert report.rules.keys() == RULES.keys()
    assert (report.architecture, report.modules, report.rank, report.max_lora_rank) == ("LlamaForCausalLM", 14, 6, 8)
    assert report.vllm_version == known_architectures().version == "0.32.0"


@pytest.mark.parametrize("name", DAMAGES)
def test_a_mistake_is_an_error(name: str, adapter: Path, tmp_path: Path, check: Check) -> None:
    damage = DAMAGES[name]
    report = check(damaged(adapter, tmp_path / "in", damage.change), convert=False)
    assert report.verdict == "failed"
    assert report.rules[damage.rule] == "error"
    assert all(word in findings(report)[damage.rule] for word in damage.named)
    assert all(finding.remedy and finding.found for finding in report.findings)


def test_the_command_shows_a_mistake_with_its_remedy(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = damaged(adapter, tmp_path / "in", DAMAGES["another shape"].change)
    assert run(cli, ["vllm", str(source), "-o", str(tmp_path / "out"), "--json"]) == 2
    out, err = capsys.readouterr()
    assert Preflight.model_validate(json.loads(out)["preflight"]).rules["shapes"] == "error"
    assert "error: shapes: " in err
    assert "remedy: " in err
    assert err.rstrip().endswith("nothing was written")


def test_an_initialisation_that_keeps_the_base_is_fine(adapter: Path, tmp_path: Path) -> None:
    for value in (True, False, "gaussian", "eva", "orthogonal"):
        source = damaged(adapter, tmp_path / str(value), config(init_lora_weights=value))
        assert preflight(replace(candidate(adapter), adapter=read_adapter_dir(source))).passed


def on_base(model: Any, folder: Path, **lora: Any) -> Path:
    """An adapter of a model, both saved in `folder`; returns the adapter's."""
    saved(model, folder / "base")
    wrapped = get_peft_model(model, LoraConfig(**({"r": 4, "task_type": "CAUSAL_LM"} | lora)))
    fill_b(wrapped)
    wrapped.save_pretrained(folder / "adapter")
    return folder / "adapter"


UNSERVED: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {
    "GPT2LMHeadModel": (tiny_gpt2, {"target_modules": ["c_attn"]}, "without LoRA adapters only"),
    "T5ForConditionalGeneration": (
        tiny_t5,
        {"target_modules": ["q", "v"], "task_type": "SEQ_2_SEQ_LM"},
        "has no class",
    ),
    "BertForSequenceClassification": (
        tiny_bert,
        {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"},
        "without LoRA adapters only",
    ),
}


@pytest.mark.parametrize("architecture", UNSERVED)
def test_an_architecture_that_vllm_cannot_adapt_is_named(architecture: str, tmp_path: Path, check: Check) -> None:
    make, lora, words = UNSERVED[architecture]
    found = findings(check(on_base(make(), tmp_path, **lora)))["architecture"]
    assert architecture in found
    assert words in found


EMBEDDED = {
    ("Llama", "embed_tokens"): True,
    ("Llama", "lm_head"): True,
    ("Qwen3", "embed_tokens"): True,
    ("Mistral", "embed_tokens"): False,
    ("Mistral", "lm_head"): False,
    ("Gemma", "embed_tokens"): False,
}


@pytest.mark.parametrize(("family", "module"), EMBEDDED)
def test_embeddings_and_heads_where_the_class_takes_them(
    family: str, module: str, tmp_path: Path, check: Check
) -> None:
    source = on_base(tiny_decoder(family), tmp_path, target_modules=[module, "q_proj"])
    report = check(source)
    assert report.passed == EMBEDDED[family, module]
    if EMBEDDED[family, module]:
        warned = findings(report, "warning")
        assert report.rules["tensors"] == "passed"  # the copy of the base weight is the served model's
        assert ("prompt_logprobs" in warned.get("targets", "")) == (module == "lm_head")
    else:
        assert f"{family}ForCausalLM supports no LoRA there" in findings(report)["targets"]


def test_another_vocabulary_is_another_shape(tmp_path: Path, check: Check) -> None:
    source = on_base(tiny_decoder("Llama"), tmp_path, target_modules=["embed_tokens"])
    tiny_decoder("Llama", vocab_size=72).save_pretrained(tmp_path / "larger")
    report = check(source, model=tmp_path / "larger")
    assert "maps 64 to 64 features in the adapter, 72 to 64 in the model" in findings(report)["shapes"]
    assert "weights of an adapted base layer" in findings(report)["tensors"]


def test_another_base_model(adapter: Path, tmp_path: Path, check: Check) -> None:
    tiny_decoder("Llama", seed=9).save_pretrained(tmp_path / "twin")
    report = check(adapter, model=tmp_path / "twin")
    assert report.passed
    assert str(tmp_path / "twin") in findings(report, "warning")["base model"]
    shutil.rmtree(tmp_path / "out")
    tiny_decoder("Llama", hidden_size=128).save_pretrained(tmp_path / "wide")
    assert "14 of 14" in findings(check(adapter, model=tmp_path / "wide"))["shapes"]
    tiny_decoder("Llama", num_hidden_layers=1).save_pretrained(tmp_path / "short")
    report = check(adapter, model=tmp_path / "short")
    assert "7 of 14" in findings(report)["modules"]
    assert report.findings[-1].remedy


def test_a_prefix_that_is_off_is_told_from_another_model(adapter: Path, tmp_path: Path, check: Check) -> None:
    report = check(damaged(adapter, tmp_path / "in", DAMAGES["a prefix too short"].change), convert=False)
    remedies = {finding.rule: finding.remedy for finding in report.findings}
    assert "the served model has model.layers.0." in remedies["modules"]


def test_a_vocabulary_beyond_vllms_limit(adapter: Path, tmp_path: Path, check: Check) -> None:
    shutil.copytree(adapter.parent / "base", tmp_path / "base")
    edit_json(tmp_path / "base" / "config.json", lambda content: content.update(vocab_size=258049))
    assert "258049" in findings(check(adapter, model=tmp_path / "base"))["vocabulary"]
    edit_json(tmp_path / "base" / "config.json", lambda content: content.update(vocab_size=258048))
    assert check(adapter, model=tmp_path / "base").passed


@pytest.mark.parametrize(
    ("stored", "dtype", "warns"),
    [("bf16", "bfloat16", False), ("fp32", "bfloat16", True), ("bf16", "float16", True), ("fp16", "float16", False)],
)
def test_a_second_rounding_is_a_warning(
    stored: str, dtype: str, warns: bool, adapter: Path, tmp_path: Path, check: Check
) -> None:
    shutil.copytree(adapter.parent / "base", tmp_path / "base")
    edit_json(tmp_path / "base" / "config.json", lambda content: content.update(dtype=dtype))
    report = check(adapter, model=tmp_path / "base", dtype=stored)
    assert report.passed
    assert ("rounded twice" in findings(report, "warning").get("storage type", "")) == warns


@pytest.mark.parametrize(
    ("pooling", "dtype", "model_type", "served_in"),
    [
        (False, "float32", "llama", "bf16"),
        ("modules.json", "float32", "llama", "fp16"),
        (True, "float32", "llama", "fp16"),
        (True, "bfloat16", "llama", "bf16"),
        (True, "float32", "gemma2", "bf16"),
        (False, "float16", "gemma2", "bf16"),
        (False, None, "llama", "fp32"),
    ],
)
def test_the_type_that_vllm_serves_a_model_in(
    pooling: bool | str, dtype: str | None, model_type: str, served_in: str, adapter: Path, tmp_path: Path
) -> None:
    """As `_resolve_auto_dtype` of vLLM chooses it; without a known type, nothing is said."""
    right = candidate(adapter)
    table = right.architectures
    described = table.lora["LlamaForCausalLM"].model_copy(update={"pooling": pooling is True})
    classes = table.lora | {"LlamaForCausalLM": described}
    source = right.served.source
    if isinstance(pooling, str):
        source = replace(source, location=str(tmp_path))
        (tmp_path / pooling).write_text('[{"type": "sentence_transformers.models.Transformer"}, {"type": "a.Pooling"}]')
    served = replace(right.served, dtype=dtype, model_type=model_type, source=source)
    asked = replace(right, served=served, architectures=table.model_copy(update={"lora": classes}), dtype="fp32")
    warned = findings(preflight(asked), "warning").get("storage type", "")
    assert f"is served in {served_in}" in warned if dtype else not warned
    assert "storage type" not in findings(preflight(replace(asked, dtype=served_in)), "warning")


def candidate(adapter: Path) -> Candidate:
    base = str(adapter.parent / "base")
    known = known_architectures()
    served = read_served(resolve_model(base), known.lora)
    return Candidate(read_adapter_dir(adapter), served, known, "name", base, "bf16")


@pytest.mark.parametrize(
    ("change", "rule", "words"),
    [
        ({"packed": {"o_proj": ("left", "right")}}, "targets", "vLLM expects its parts left, right instead"),
        ({"language_model": "language_model"}, "towers", "outside of language_model, the language model"),
    ],
)
def test_what_a_class_packs_or_leaves_out(change: dict[str, Any], rule: str, words: str, adapter: Path) -> None:
    right = candidate(adapter)
    assert preflight(right).passed
    table = right.architectures
    wrong = {**table.lora, "LlamaForCausalLM": table.lora["LlamaForCausalLM"].model_copy(update=change)}
    report = preflight(replace(right, architectures=table.model_copy(update={"lora": wrong})))
    assert words in findings(report)[rule]


@pytest.mark.parametrize(
    ("targets", "left_out"),
    [
        ((), ()),
        (("qkv_proj", "o_proj", "gate_up_proj", "down_proj"), ()),
        (("q_proj", "o_proj", "up_proj", "down_proj"), ()),
        (("qkv_proj", "gate_proj", "down_proj"), ("o_proj",)),
        (("model.layers.0.self_attn.o_proj", "k_proj", "gate_up_proj", "down_proj"), ("o_proj",)),
    ],
)
def test_what_the_option_target_modules_leaves_out(
    targets: tuple[str, ...], left_out: tuple[str, ...], adapter: Path
) -> None:
    """A part stands for the module that it is fused into, and a path for one module."""
    found = findings(preflight(replace(candidate(adapter), lora_targets=frozenset(targets))))
    assert found.keys() == ({"target modules"} if left_out else set())
    text = found.get("target modules", "").partition(":")[0]
    assert {path.rpartition(".")[2] for path in text.replace(" and ", ", ").split(", ") if path} == set(left_out)
    assert ("layers.0" in text) == (bool(left_out) and "model.layers.0.self_attn.o_proj" not in targets)


def test_an_adapter_may_not_be_called_like_the_model(adapter: Path) -> None:
    right = candidate(adapter)
    assert "requests would reach the base model" in findings(preflight(replace(right, name=right.address)))["name"]


def test_a_class_that_could_not_be_looked_at(adapter: Path) -> None:
    right = candidate(adapter)
    served = replace(right.served, architecture=right.architectures.unknown[0])
    assert "is not known" in findings(preflight(replace(right, served=served)))["architecture"]
