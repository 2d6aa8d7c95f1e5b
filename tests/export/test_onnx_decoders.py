"""Tiny decoders through the real command, run in plain ONNX Runtime beside PEFT's model; others are variants."""

from __future__ import annotations

import pytest

from loraover_export.onnx.report import OnnxReport

from support.onnx_export import ADAPTERS, LINEAR, Adapter, Exports, assert_model, make_exports, read_report
from support.onnx_graph import FEEDS, Graph, worst_error
from support.versions import TOKENIZER_FILES

pytestmark = pytest.mark.engine

PROMPT, TOKENS = FEEDS["one row"].ids[:, :7], 12
BUILT = {"model.onnx", "model.onnx.data", "genai_config.json", *TOKENIZER_FILES}
WRITTEN = BUILT | {"onnx_report.json", "README.md"}


@pytest.fixture(scope="module", params=["Llama", "Qwen3", "Gemma"])
def exports(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exports:
    return make_exports(request.param, tmp_path_factory.mktemp(request.param))


def test_graphs_are_pefts_models(exports: Exports) -> None:
    assert_model(exports, PROMPT, TOKENS)


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
