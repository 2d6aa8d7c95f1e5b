"""Adapters whose configuration and file do not have the same modules: PEFT applies the named ones only."""

from __future__ import annotations

import warnings
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import nullcontext
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT_DEFAULTS
from peft.utils.other import get_pattern_key, match_target_against_key
from transformers import AutoModelForCausalLM

from loraover.checkpoint import path_patterns
from loraover.checkpoint.path_patterns import ALL, ENDING, match_path
from loraover.checkpoint.peft_adapter import read_adapter_dir
from loraover.checkpoint.target_modules import DEFAULTS, Targets
from loraover.common.errors import CheckpointError, ExportError
from loraover.models.load import resolve_model
from loraover_export import check_adapter, convert_adapter, export_gguf, export_vllm, merge_adapter
from loraover_lab.evaluation.subjects import in_memory

from support.adapters_on_disk import save_base, save_lora
from support.check_cases import lose_layer_1
from support.conversions import SOURCES, Source, make_base, make_source
from support.exports import REFUSING
from support.make_checkpoint import edit_json, edit_tensors
from support.plain_adapter import tiny_decoder
from support.tiny_experts import EXPERT_SIZES, expert_lora, tiny_moe
from support.versions import needs_expert_stacks

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"

PATHS = [
    *(f"model.layers.{i}.{name}" for i in (0, 1, 11) for name in ("self_attn.q_proj", "mlp.gate_proj", "mlp")),
    *("model.layers.1.mlp.experts.0.up_proj", "model.decoder.block.1.q_proj", "lm_head", "model.embed_tokens"),
    *("q_proj", "layers.0.q_proj", "h.0.attn.q_proj", "encoder.layers.1.q_proj", "score.q_proj"),
]
FIELDS: list[dict[str, Any]] = [
    {"target_modules": ["q_proj"]},
    {"target_modules": ["proj", "lm_head", "self_attn.q_proj"]},
    {"target_modules": ["model.layers.1.self_attn.q_proj", "gate_proj"], "layers_to_transform": 0},
    {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1, 11]},
    {"target_modules": ["q_proj", "lm_head"], "layers_to_transform": []},
    {"target_modules": ["q_proj", "lm_head"], "layers_to_transform": [0]},
    {"target_modules": ["q_proj"], "layers_to_transform": [0, 1], "layers_pattern": "block"},
    {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": ["h", r"lay\w+"]},
    {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": ""},
    {"target_modules": r".*layers\.[01]\..*_proj"},
    {"target_modules": r"layers\.0"},
    {"target_modules": ["q_proj", "gate_proj"], "exclude_modules": ["self_attn.q_proj"]},
    {"target_modules": ["q_proj", "gate_proj"], "exclude_modules": r".*\.1\..*"},
    {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["score", "lm_head"]},
    {"target_modules": [], "target_parameters": ["w"]},
]


@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_modules_are_named_as_in_peft(fields: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LoraConfig(**fields)
    found = [path for path in PATHS if Targets(**fields).names(path)]
    assert found == [path for path in PATHS if check_target_module_exists(config, path)]


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"target_modules": "all-linear"}, True),
        ({"target_modules": "All-Linear", "exclude_modules": ["q_proj"]}, False),
        ({}, True),
        ({"layers_to_transform": [0]}, False),
        ({"target_parameters": ["mlp.gate.weight"]}, False),
        ({"target_parameters": ["q_proj.weight"]}, True),
    ],
    ids=str,
)
def test_what_the_model_decides_is_accepted(fields: dict[str, Any], named: bool) -> None:
    assert Targets(**fields).names("model.layers.1.self_attn.q_proj") == named


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("targets") / "base")


def lose(folder: Path, part: str) -> None:
    """Remove the tensors of an adapter that have a text in their keys."""
    edit_tensors(folder / TENSORS, lambda found: [found.pop(key) for key in list(found) if part in key])


FEWER: list[dict[str, Any]] = [
    {"target_modules": ["q_proj"]},
    {"target_modules": r".*\.q_proj"},
    {"layers_to_transform": [0]},
    {"exclude_modules": ["down_proj"]},
    {"modules_to_save": ["mlp"]},
    {"target_modules": "all-linear", "exclude_modules": r".*down_proj"},
]


@pytest.mark.parametrize("fields", FEWER, ids=str)
def test_matrices_that_peft_ignores_are_refused(fields: dict[str, Any], base: Path, tmp_path: Path) -> None:
    """The message names the modules on both sides; all exports read by this function, or a conversion."""
    source = save_lora(base, tmp_path / "source", target_modules=["q_proj", "down_proj"])
    edit_json(source / CONFIG, lambda config: config.update(fields))
    message = r"does not name .*(down_proj|layers\.1).* beside those of .*q_proj"
    with pytest.raises(CheckpointError, match=message):
        read_adapter_dir(source)
    for export in (convert_adapter, export_vllm):
        with pytest.raises(CheckpointError, match=message):
            export(source, tmp_path / "out")


@pytest.mark.parametrize("name", ["loha", "trained tokens"])
def test_other_kinds_are_held_to_their_names(name: str, tmp_path: Path) -> None:
    prime = make_base(tmp_path / "base", "prime")
    source = make_source(prime, tmp_path / "source", SOURCES[name])
    edit_json(source / CONFIG, lambda config: config.update(target_modules=["v_proj"]))
    with pytest.raises(CheckpointError, match=r"does not name .* beside those of no other module"):
        convert_adapter(source, tmp_path / "out", approximate_to_rank=4)


@pytest.mark.parametrize(
    "fields", [{}, {"layers_to_transform": [0, 1]}, {"target_modules": r".*\.(q|down)_proj"}], ids=str
)
def test_a_file_that_lacks_named_modules_is_refused(fields: dict[str, Any], base: Path, tmp_path: Path) -> None:
    source = save_lora(base, tmp_path / "source", target_modules=["q_proj", "down_proj"])
    edit_json(source / CONFIG, lambda config: config.update(fields))
    edit_tensors(source / TENSORS, lose_layer_1)
    message = r"names .*layers\.1.*, and the file .* holds only .*layers\.0"
    for export in REFUSING.values():
        with pytest.raises((CheckpointError, ExportError), match=message):
            export(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("written", [{}, {"target_modules": None}], ids=["missing", "null"])
def test_modules_left_to_the_model_are_those_of_its_type(written: dict[str, Any], base: Path, tmp_path: Path) -> None:
    """Of a Llama, PEFT adapts q_proj and v_proj then, and ignores the matrices of other modules."""
    for number, (trained, is_right) in enumerate({("q_proj", "v_proj"): True, ("q_proj", "k_proj"): False}.items()):
        source = save_lora(base, tmp_path / str(number), target_modules=[*trained])
        edit_json(source / CONFIG, lambda config: [config.pop("target_modules"), config.update(written)])
        loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(source))
        assert loaded.peft_config["default"].target_modules == {"q_proj", "v_proj"}
        checked = {check.engine: check.as_it_is.verdict for check in check_adapter(source).engines}
        assert checked["torch"] == checked["onnx"] == ("right" if is_right else "wrong silently")
        assert checked["vllm"] == (checked["torch"] if written else "refused")  # which needs the field
        for export in REFUSING.values():
            with nullcontext() if is_right else pytest.raises(CheckpointError, match=r"does not name .*k_proj, whose"):
                export(source, tmp_path / f"{number}-{export.__name__}")
        assert export_vllm(source, tmp_path / f"{number}-vllm").passed == is_right


def test_modules_left_to_the_model_are_those_of_some_type(base: Path, tmp_path: Path) -> None:
    """Readers that do not know the base model refuse what is right on none."""
    source = save_lora(base, tmp_path / "source", target_modules=["q_proj", "down_proj"])
    edit_json(source / CONFIG, lambda config: config.update(target_modules=None))
    with pytest.raises(CheckpointError, match=r"PEFT's default for any type of model, .* not name .*down_proj, whose"):
        read_adapter_dir(source)


def test_the_default_modules_are_pefts() -> None:
    assert {kind: DEFAULTS.get(kind) for kind in PEFT_DEFAULTS} == PEFT_DEFAULTS


BESIDE: dict[str, tuple[dict[str, Any], str, str]] = {
    "head": ({"modules_to_save": ["lm_head", "score"]}, "lm_head", r"names lm_head\.weight, which the file .* lacks"),
    "one of two": ({"modules_to_save": ["mlp", "norm"]}, "model.norm", r"names model\.norm\.weight, which the file"),
    "tokens": ({"trainable_token_indices": [3, 5]}, "token_adapter", "lacks .*trainable_tokens_delta"),
    "tokens of one of two": (
        {"trainable_token_indices": {"embed_tokens": [3], "lm_head": [5]}},
        "lm_head.token_adapter",
        "lacks .*trainable_tokens_delta",
    ),
}


@pytest.mark.parametrize("case", BESIDE)
def test_what_was_trained_beside_the_matrices_may_not_be_lost(case: str, base: Path, tmp_path: Path) -> None:
    fields, part, message = BESIDE[case]
    source = save_lora(base, tmp_path / "source", target_modules=["q_proj"], **fields)
    lose(source, part)
    with pytest.raises(KeyError, match=part):
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(source))
    for export in (convert_adapter, merge_adapter)[: 2 if "modules_to_save" in fields else 1]:
        with pytest.raises(CheckpointError, match=message):
            export(source, tmp_path / "out")


@needs_expert_stacks
@pytest.mark.parametrize("part", ["layers.1.mlp", "layers.1.mlp.experts.lora", "mlp"])
def test_lost_experts_are_refused(part: str, tmp_path: Path) -> None:
    """Those of a layer, one parameter's of them, and all."""
    model, source = tiny_moe(), tmp_path / "source"
    model.save_pretrained(tmp_path / "base")
    expert_lora(model, source)
    edit_json(source / CONFIG, lambda config: config.update(base_model_name_or_path=str(tmp_path / "base")))
    assert convert_adapter(source, tmp_path / "converted").passed
    assert export_vllm(source, tmp_path / "exported").passed
    lose(source, part)
    message = r"names model\.layers\.[01]\.mlp\.experts\.\w+_proj.*, and the file|expected one pair for each"
    for export in (convert_adapter, export_gguf):
        with pytest.raises(CheckpointError, match=message):
            export(source, tmp_path / "out")
    if part != "layers.1.mlp.experts.lora":
        findings = export_vllm(source, tmp_path / "out").preflight.findings
        assert any(found.rule == "modules" and found.level == "error" for found in findings)


@needs_expert_stacks
def test_a_lost_router_is_refused(tmp_path: Path) -> None:
    """PEFT takes it by the name of its parameter, and keeps an ordinary pair of its module."""
    model, source = tiny_moe(), tmp_path / "source"
    model.save_pretrained(tmp_path / "base")
    expert_lora(model, source, target_parameters=["mlp.gate.weight"])
    edit_json(source / CONFIG, lambda config: config.update(base_model_name_or_path=str(tmp_path / "base")))
    assert check_adapter(source, engines="torch").engines[0].as_it_is.verdict == "right"
    lose(source, "layers.1.mlp.gate")
    (lost,) = check_adapter(source, engines="torch").engines[0].as_it_is.findings
    assert (lost.feature, lost.level) == ("lost modules", "wrong silently")
    assert "names model.layers.1.mlp.gate, and the file" in lost.found


def test_the_preflight_finds_a_lost_layer(base: Path, tmp_path: Path) -> None:
    source = save_lora(base, tmp_path / "source", target_modules=["q_proj", "down_proj"])
    edit_tensors(source / TENSORS, lose_layer_1)
    report = export_vllm(source, tmp_path / "out")
    (error,) = [finding for finding in report.preflight.findings if finding.level == "error"]
    assert error.rule == "modules"
    assert "model.layers.1.self_attn.q_proj" in error.found


@pytest.mark.parametrize("targets", [["q_proj", "down_proj", "absent"], "all-linear"], ids=str)
def test_names_that_no_module_has_are_right(targets: list[str] | str, base: Path, tmp_path: Path) -> None:
    """PEFT accepts them, and many configurations hold names of several families of models."""
    source = save_lora(base, tmp_path / "source", target_modules=["q_proj", "down_proj"])
    edit_json(source / CONFIG, lambda config: config.update(target_modules=targets))
    assert convert_adapter(source, tmp_path / "out").passed


@pytest.mark.parametrize("text", ["(q_proj", "q{99999999999}", "(" * 3000 + ")" * 3000], ids=["open", "huge", "deep"])
@pytest.mark.parametrize("field", ["target_modules", "rank_pattern"])
def test_a_name_that_is_no_expression_is_refused(field: str, text: str, base: Path, tmp_path: Path) -> None:
    source = save_lora(base, tmp_path / "source", target_modules=["q_proj"])
    value = text if field == "target_modules" else {text: 2}
    edit_json(source / CONFIG, lambda config: config.update({field: value}))
    with pytest.raises(CheckpointError, match="is not a regular expression"):
        read_adapter_dir(source)


ENDLESS = r"(\w*\.*\w*)*!"
"""Expression that keeps Python's `re` busy for years with any path that has no "!" in it."""


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "fields",
    [
        {"rank_pattern": {ENDLESS: 4}},
        {"alpha_pattern": {ENDLESS: 4}},
        {"target_modules": ENDLESS},
        {"exclude_modules": ENDLESS},
        {"modules_to_save": [ENDLESS]},
        {"layers_to_transform": [0], "layers_pattern": ENDLESS},
    ],
    ids=lambda fields: next(reversed(fields)),
)
def test_an_expression_without_end_is_refused(
    fields: dict[str, Any], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a thread, where no signal could stop `re`; and what is matched afterwards is right."""
    monkeypatch.setattr(path_patterns, "LIMIT_S", 0.2)
    source = save_lora(base, tmp_path / "source", target_modules=["q_proj"])
    edit_json(source / CONFIG, lambda config: config.update(fields))
    with ThreadPoolExecutor(1) as thread, pytest.raises(CheckpointError, match=r"takes more than 0.2 s .* in PEFT"):
        thread.submit(lambda: read_adapter_dir(source).modules).result()
    with pytest.raises(CheckpointError, match=r"takes more than 0.2 s"):
        in_memory(resolve_model(str(base)), None, source, dtype="fp32", batch_size=1)
    assert match_path(ALL, "(model|q)+", "modelqq") is not None


PIECES = [
    "q",
    "proj",
    ".",
    r"\.",
    ".*",
    r"\d+",
    "(a|q)",
    "[a-z_]*",
    "(?:q_)?",
    "$",
    r"\b",
    "{e}",
    "[[:alpha:]]",
    r"(.)\1",
]


@settings(max_examples=100)
@given(st.lists(st.sampled_from(PIECES), min_size=1, max_size=4).map("".join), st.sampled_from(PATHS))
def test_expressions_mean_what_they_mean_in_peft(entry: str, path: str) -> None:
    assert (match_path(ENDING, entry, path) is not None) == (get_pattern_key([entry], path) == entry)
    assert (match_path(ALL, entry, path) is not None) == (match_target_against_key(entry, path) is not None)


def test_a_fork_matches_with_a_process_of_its_own() -> None:
    assert match_path(ALL, "(q|r)+", "qr") is not None
    with ProcessPoolExecutor(2, get_context("fork")) as forks:
        asked = [forks.submit(match_path, ALL, f"(q|r){{{count}}}", "qr" * 9) for count in range(40)]
        assert [count for count, found in enumerate(asked) if found.result() is not None] == [18]


@needs_expert_stacks
def test_stacked_experts_are_no_modules(tmp_path: Path) -> None:
    """PEFT adapts the shared expert by this name, and not the others, which are one parameter."""
    sizes = {"shared_expert_intermediate_size": 40, **EXPERT_SIZES}
    model = tiny_decoder("Qwen2Moe", **{name: size for name, size in sizes.items() if name != "norm_topk_prob"})
    model.save_pretrained(tmp_path / "base")
    source = tmp_path / "source"
    expert_lora(model, source, target_modules=["down_proj"], target_parameters=None, rank_pattern={})
    edit_json(source / CONFIG, lambda config: config.update(base_model_name_or_path=str(tmp_path / "base")))
    assert any("shared_expert" in path for path in read_adapter_dir(source).modules)
    assert export_vllm(source, tmp_path / "out").passed


@needs_expert_stacks
def test_experts_and_routers_are_named_by_their_parameters(tmp_path: Path) -> None:
    expert_lora(tiny_moe(), tmp_path, target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])
    assert read_adapter_dir(tmp_path).stacks
    edit_json(tmp_path / CONFIG, lambda config: config.update(target_parameters=None))
    with pytest.raises(CheckpointError, match=r"does not name model\.layers\.0\.mlp\.experts"):
        read_adapter_dir(tmp_path)


def test_what_peft_adds_to_tied_ends_need_not_be_named(tmp_path: Path) -> None:
    """The head of a tied model has matrices or new rows in the file, and only the embedding is named."""
    tied = make_base(tmp_path / "base", "tied")
    lora = save_lora(tied, tmp_path / "lora", target_modules=["embed_tokens"], ensure_weight_tying=True)
    assert "lm_head" in read_adapter_dir(lora).modules
    tokens = Source("TRAINABLE_TOKENS", {"token_indices": [5, 2], "target_modules": None}, base="tied")
    assert convert_adapter(make_source(tied, tmp_path / "tokens", tokens), tmp_path / "out").passed
