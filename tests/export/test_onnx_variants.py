"""Tiny decoders through the real command, run in plain ONNX Runtime beside PEFT's model, and how they differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from loraover.checkpoint.source import read_source
from loraover.models.load import load_model, resolve_model
from loraover_export.formats.onnx.check import rounded_copy
from loraover_export.formats.onnx.report import OnnxReport

from support.compatibility import record
from support.onnx_export import (
    ADAPTERS,
    LINEAR,
    Adapter,
    Exports,
    assert_model,
    export,
    exported,
    make_exports,
    read_report,
    tiny_base,
    tiny_lora,
)
from support.onnx_graph import FEEDS, UNIT, Graph, genai_tokens, torch_logits, torch_tokens, worst_error
from support.versions import TOKENIZER_FILES

pytestmark = pytest.mark.engine

PROMPT, TOKENS = FEEDS["one row"].ids[:, :7], 20
WINDOW = 10
"""Shorter than a batch of the product's check, and than what is generated here."""

SLIDING = [name for name in FEEDS if name != "cached, padded on the right"]
"""transformers counts a window in columns, padding between real tokens included."""


OPTIONS: dict[str, dict[str, Any]] = {
    "Mistral": {},
    "Gemma2": {},
    "Phi3": {"original_max_position_embeddings": 128, "lora": {"target_modules": ["o_proj"], "r": 9}},
    "Qwen2": {"use_sliding_window": True, "max_window_layers": 1},
}


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[pytest.mark.matrix] * (name in ("Gemma2", "Phi3"))) for name in OPTIONS]
)
def test_a_sliding_window_shorter_than_the_text(family: str, tmp_path: Path) -> None:
    exports = make_exports(family, tmp_path, sliding_window=WINDOW, **OPTIONS[family])
    assert_model(exports, PROMPT, TOKENS, SLIDING)
    exports.models["first"].config.sliding_window = 2 * WINDOW
    assert worst_error(exports.merged, exports.models["first"], ["batch"])["batch"] > 1000


@pytest.mark.matrix
@pytest.mark.parametrize("family", ["Granite", "SmolLM3", "Ernie4_5"])
def test_other_families(family: str, tmp_path: Path) -> None:
    assert_model(make_exports(family, tmp_path), PROMPT, TOKENS)


def test_fused_projections(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The builder cuts the B of a fused projection into parts, which no adapter's file has a place for."""
    base = tiny_base(tmp_path / "base", "Phi3", original_max_position_embeddings=128)
    model = tiny_lora(base, tmp_path / "fused", target_modules=["qkv_proj", "gate_up_proj"])
    exported("Phi3", tmp_path / "fused", tmp_path / "merged", "--mode", "merged")
    errors = worst_error(Graph(tmp_path / "merged" / "model.onnx"), model)
    assert max(errors.values()) <= 1, errors
    assert export(tmp_path / "fused", tmp_path / "out", "--mode", "swappable") == 2
    message = capsys.readouterr().err
    assert "no place for" in message
    assert "use --mode merged" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", ["Olmo", "Phi"])
def test_a_graph_that_the_builder_gets_wrong_is_not_left_behind(family: str, tmp_path: Path) -> None:
    """onnxruntime-genai 0.18 builds both without a message, with wrong logits; a later version may get them right."""
    model = tiny_lora(tiny_base(tmp_path / "base", family), tmp_path / "adapter", rank_pattern={})
    code = export(tmp_path / "adapter", tmp_path / "out", "--mode", "merged")
    assert code in (0, 1)
    assert (tmp_path / "out").exists() == (code == 0)
    assert {path.name for path in tmp_path.iterdir()} <= {"base", "adapter", "out"}
    if code == 0:
        assert max(worst_error(Graph(tmp_path / "out" / "model.onnx"), model).values()) <= 1
    else:
        record(family, "ONNX Runtime", "merged", "fp32", "failed", None, None)


# Other precisions


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Exports:
    return make_exports("Llama", tmp_path_factory.mktemp("fp16"), "--precision", "fp16")


def test_fp16(half: Exports) -> None:
    """8 roundings of the largest logit in float16, as 1024 tolerances of fp32."""
    allowed = 8 * 2.0**-11 / (64 * UNIT)
    for name in ("first", "second", None):
        with half.model(name) as model:
            errors = worst_error(half.swappable(name), model)
        assert max(errors.values()) <= allowed, errors
    errors = worst_error(half.merged, half.models["first"])
    assert max(errors.values()) <= allowed, errors
    with half.model(None) as base:
        assert worst_error(half.merged, base, ["batch"])["batch"] > 10 * allowed


def test_fp16_with_norms_of_queries_and_keys(tmp_path: Path) -> None:
    exports = make_exports("Qwen3", tmp_path, "--precision", "fp16")
    errors = worst_error(exports.merged, exports.models["first"])
    assert max(errors.values()) <= 2048, errors


def test_fp16_decodes(half: Exports) -> None:
    """Its graph is laid out for CUDA, and runs on the CPU."""
    expected = torch_tokens(half.models["first"], PROMPT, TOKENS)
    assert genai_tokens(half.folder / "merged", PROMPT, TOKENS) == expected
    assert genai_tokens(half.folder / "swappable", PROMPT, TOKENS, half.adapter("first")) == expected
    inputs = {value.name: value.type for value in half.merged.session.get_inputs()}
    assert {kind for name, kind in inputs.items() if "past" in name} == {"tensor(float16)"}


@pytest.fixture(scope="module")
def int4(tmp_path_factory: pytest.TempPathFactory) -> Exports:
    return make_exports("Llama", tmp_path_factory.mktemp("int4"), "--precision", "int4")


def test_int4_keeps_what_an_adapter_changes(int4: Exports) -> None:
    """Rounding a random model's weights to 15 levels moves its logits by as much as the second adapter does.

    What is measured: the change that an adapter makes, and how far the engine's change is from it, in Frobenius norms.
    """
    feed = FEEDS["batch"]
    with int4.model(None) as model:
        base = torch_logits(model, feed)
    found_base = int4.swappable(None).logits(feed)
    for name in ("first", "second"):
        change = torch_logits(int4.models[name], feed) - base
        assert float((int4.swappable(name).logits(feed) - found_base - change).norm() / change.norm()) < 0.3, name
        assert float((found_base - base).norm()) > 1e-3 * float(change.norm())
    change = torch_logits(int4.models["first"], feed) - base
    assert float((int4.merged.logits(feed) - base - change).norm() / change.norm()) < 0.3


def test_int4_rounds_as_the_noise_has_it(int4: Exports) -> None:
    """The bound of an int4 graph is made of what PyTorch's rounded copy does to the logits."""
    feed = FEEDS["one row"]
    model = load_model(resolve_model(str(int4.folder / "base")))
    source = read_source(int4.folder / "first")
    copy = rounded_copy(model, source)
    expected, rounded = torch_logits(int4.models["first"], feed), torch_logits(copy, feed)
    noise = float((rounded - expected).abs().max())
    assert float((int4.merged.logits(feed) - rounded).abs().max()) < 0.2 * noise
    with int4.model(None) as base:
        assert float((torch_logits(model, feed) - torch_logits(base, feed)).abs().max()) < 1e-6  # left as it was


def test_int4_spares_the_adapters_matrices(int4: Exports) -> None:
    found = read_report(int4.folder / "swappable")
    lora = int4.swappable(None).session.get_overridable_initializers()
    assert len(lora) == len(found.matrices) - 8  # the second adapter's targets are the first one's too
    assert {value.type for value in lora} == {"tensor(float)"}
    assert {check.noise_of for check in found.checks} == {"PyTorch with weights in 4 bits and activations in 8"}
    largest = (int4.folder / "swappable" / "model.onnx.data").stat().st_size
    assert largest < 0.6 * (int4.folder / "base" / "model.safetensors").stat().st_size


# Every check of a whole export


BUILT = {"model.onnx", "model.onnx.data", "genai_config.json", *TOKENIZER_FILES}
WRITTEN = BUILT | {"onnx_report.json", "README.md"}


@pytest.fixture(scope="module", params=["Llama", "Qwen3", "Gemma"])
def exports(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exports:
    return make_exports(request.param, tmp_path_factory.mktemp(request.param))


def test_graphs_are_pefts_models(exports: Exports) -> None:
    assert_model(exports, PROMPT, 12)


def test_the_comparison_tells_adapters_apart(exports: Exports) -> None:
    graphs: list[tuple[Adapter, Graph]] = [(name, exports.swappable(name)) for name in ADAPTERS]
    for name, graph in graphs:
        for other in set(ADAPTERS) - {name}:
            with exports.model(other) as model:
                errors = worst_error(graph, model, ["batch", "cached, padded on the left"])
                assert min(errors.values()) > 1000, (name, other)


def test_the_merged_report(exports: Exports) -> None:
    found = read_report(exports.folder / "merged")
    assert {path.name for path in (exports.folder / "merged").iterdir()} == WRITTEN
    assert (found.mode, found.precision, found.device, found.cache) == ("merged", "fp32", "cpu", True)
    assert found.base_model == str(exports.folder / "base")
    assert found.adapters == {"first": str(exports.folder / "first")}
    assert [matrix.name for matrix in found.matrices] == merged_names()
    assert [check.adapter for check in found.checks] == ["first"]
    assert_checks(found)


def test_the_swappable_report(exports: Exports) -> None:
    found = read_report(exports.folder / "swappable")
    adapters = {"first.onnx_adapter", "second.onnx_adapter"}
    assert {path.name for path in (exports.folder / "swappable").iterdir()} == WRITTEN | adapters | {"swappable.json"}
    assert (found.mode, list(found.adapters)) == ("swappable", ["first", "second"])
    assert len(found.matrices) == 2 * (2 * len(LINEAR) + 2 * 2)
    assert [check.adapter for check in found.checks] == [None, "first", "second"]
    assert_checks(found)


def merged_names() -> list[str]:
    blocks = {"q_proj": "self_attn", "k_proj": "self_attn", "v_proj": "self_attn", "o_proj": "self_attn"}
    names = [f"{blocks.get(name, 'mlp')}.{name}" for name in LINEAR]
    return sorted(f"model.layers.{layer}.{name}.weight" for layer in range(2) for name in names)


def assert_checks(found: OnnxReport) -> None:
    for check in found.checks:
        assert len(check.cases) == 8
        assert {case.max_logit <= check.bound for case in check.cases} == {True}
        assert 0 < check.noise < 2e-6
        assert (check.adapter_effect == 0) if check.adapter is None else (check.adapter_effect > 1e3 * check.bound)
        assert check.greedy is not None
        assert check.greedy.first_difference is None or check.greedy.gap == 0  # two tokens are equally likely
    assert all(matrix.passed for matrix in found.matrices)
