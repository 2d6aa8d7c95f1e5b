"""Vectors, classes and scores of engines in this process: right ones pass, and faults of ONNX exports are named."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing

from loraover.common.errors import CheckpointError, ConfigError, EngineError
from loraover_export import export_onnx
from loraover_serve import record_adapter, verify_adapter

from support.make_checkpoint import edit_json
from support.tiny_hub import tiny_tokenizer
from support.vector_server import SHOP, Service, save_encoder, save_vector_adapter, vector_server

pytestmark = pytest.mark.engine

WITH_HEAD = "vectors of a decoder that was trained with its head"
TASKS: dict[str, tuple[str, tuple[str, ...], bool, dict[str, Any]]] = {
    "vectors": ("FEATURE_EXTRACTION", (), False, {"target_modules": ["query", "value"]}),
    "vectors of a decoder": ("FEATURE_EXTRACTION", (), True, {}),
    WITH_HEAD: ("FEATURE_EXTRACTION", (), True, {"auto": "AutoModelForCausalLM"}),
    "vectors, with the pooler": ("FEATURE_EXTRACTION", (), False, {}),
    "classes": ("SEQ_CLS", ("good", "bad", "odd"), False, {"target_modules": ["query", "value"]}),
    "scores of pairs": ("SEQ_CLS", ("relevant",), False, {"target_modules": ["query", "value"]}),
    "classes of tokens": ("TOKEN_CLS", ("name", "other"), False, {"target_modules": ["query", "value"]}),
}


@dataclass(frozen=True)
class Encoder:
    """A base model and an adapter of a task, in a folder."""

    task: str
    base: Path
    adapter: Path


def save_typing_tokenizer(base: Path) -> None:
    """Give a model a tokenizer that types the tokens of a pair's second text 1, as BERT's does."""
    tokenizer = tiny_tokenizer()
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    pair = {"single": "<s> $A </s>", "pair": "<s> $A </s> $B:1 </s>:1", "special_tokens": special}
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(**pair)
    edit_json(
        Path(tokenizer.save_pretrained(base)[0]).with_name("tokenizer_config.json"),
        lambda found: found.update(model_input_names=["input_ids", "token_type_ids", "attention_mask"]),
    )


def made(folder: Path, name: str) -> Encoder:
    task, labels, decoder, options = TASKS[name]
    base = save_encoder(folder, task, labels, decoder=decoder)
    if name == "scores of pairs":
        save_typing_tokenizer(base)
    return Encoder(task, base, save_vector_adapter(base, folder / SHOP, task, **options))


@pytest.mark.parametrize("name", TASKS)
def test_right_engines_are_as_trained(name: str, tmp_path: Path) -> None:
    mine = made(tmp_path, name)
    report = verify_adapter(mine.adapter, model=str(mine.base), engines=("torch", "onnx"), output=tmp_path / "out")
    assert [(one.engine, one.verdict) for one in report.engines] == [("torch", "as trained"), ("onnx", "as trained")]
    found = {(one.compared, one.number_format, *one.not_checked) for one in report.engines}
    assert found == {("vectors", "fp32")}
    assert all(abs(one.strength.value - 1) < 1e-3 for one in report.engines if one.strength is not None)
    assert (tmp_path / "out" / "verify.html").is_file()


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    mine = made(tmp_path_factory.mktemp("encoder"), "vectors")
    record_adapter(mine.adapter, model=str(mine.base), device="cpu")
    return mine


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    mine = made(tmp_path_factory.mktemp("classifier"), "classes")
    record_adapter(mine.adapter, model=str(mine.base), device="cpu")
    return mine


def changed(adapter: Path, folder: Path, **fields: Any) -> Path:
    """A copy of an adapter with other fields in its configuration."""
    shutil.copytree(adapter, folder)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    return folder


def faulty(mine: Encoder, fault: str, folder: Path) -> Path:
    """An adapter that is exported in place of the right one."""
    if fault == "another adapter":
        return save_vector_adapter(mine.base, folder, mine.task, seed=7, target_modules=["query", "value"])
    return changed(mine.adapter, folder, lora_alpha={"right": 8, "half": 4, "base": 1e-9}[fault])


FAULTS = {
    ("encoder", "right"): None,
    ("encoder", "half"): "wrong scaling",
    ("encoder", "base"): "served as base",
    ("classifier", "right"): None,
    ("classifier", "half"): "wrong scaling",
    ("classifier", "base"): "only the head of the adapter applied",
    ("classifier", "another adapter"): None,
}


@pytest.mark.parametrize(("of", "fault"), FAULTS)
def test_a_merged_export_is_judged_by_a_reference(
    of: str, fault: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    mine: Encoder = request.getfixturevalue(of)
    wrong = faulty(mine, fault, tmp_path / "wrong")
    export_onnx((wrong,), tmp_path / "graph", mode="merged", model=str(mine.base), check=False)
    report = verify_adapter(references=(mine.adapter,), graph=tmp_path / "graph")
    (found,) = report.engines
    assert (found.verdict == "as trained") == (fault == "right"), found.reason
    assert found.fault == FAULTS[of, fault]
    assert found.engine == "onnx"


def test_a_swappable_export_is_judged_by_the_name_of_its_adapter(encoder: Encoder, tmp_path: Path) -> None:
    half, far = (
        changed(encoder.adapter, tmp_path / "half", lora_alpha=4),
        faulty(encoder, "another adapter", tmp_path / "far"),
    )
    graph = tmp_path / "graph"
    export_onnx((encoder.adapter, half, far), graph, mode="swappable", model=str(encoder.base), check=False)
    asked: dict[str, Any] = {"references": (encoder.adapter,), "graph": graph}
    right = verify_adapter(**asked, engines=("onnx",)).engines[0]
    assert (right.verdict, right.number_format, right.not_checked) == ("as trained", "fp32", [])
    assert verify_adapter(**asked, served_name=("half",)).engines[0].fault == "wrong scaling"
    another = verify_adapter(**asked, served_name=("far",)).engines[0]
    assert (another.verdict, another.fault) == ("differs", None)
    assert "another adapter may be served" in another.reason
    with pytest.raises(ConfigError, match="are the adapters far, half, shop, expected other; choose with served_name"):
        verify_adapter(**asked, served_name=("other",))
    again = verify_adapter(encoder.adapter, model=str(encoder.base), engines=("onnx",), graph=graph)
    assert again.verdict == "as trained"


def test_a_graph_that_pools_by_itself_is_judged(encoder: Encoder, tmp_path: Path) -> None:
    """Some tools write the pooling into the graph; here the right one is the first token's, and not the mean."""
    import onnx
    from onnx import TensorProto, helper

    export_onnx((encoder.adapter,), tmp_path / "graph", mode="merged", model=str(encoder.base), check=False)
    for place, fault in (("first", None), ("mean", "another pooling")):
        folder = shutil.copytree(tmp_path / "graph", tmp_path / place)
        graph = onnx.load(folder / "model.onnx")
        output = graph.graph.output[0].name
        graph.graph.initializer.append(helper.make_tensor("axis", TensorProto.INT64, [1], [1]))
        graph.graph.initializer.append(helper.make_tensor("at", TensorProto.INT64, [], [0]))
        if place == "first":
            node = helper.make_node("Gather", [output, "at"], ["sentence_embedding"], axis=1)
        else:
            node = helper.make_node("ReduceMean", [output, "axis"], ["sentence_embedding"], keepdims=0)
        graph.graph.node.append(node)
        graph.graph.output.append(helper.make_tensor_value_info("sentence_embedding", TensorProto.FLOAT, ["b", 32]))
        onnx.save(graph, folder / "model.onnx")
        assert verify_adapter(references=(encoder.adapter,), graph=folder).engines[0].fault == fault


def test_a_server_is_asked_without_a_file_of_a_reference(classifier: Encoder) -> None:
    service = Service(classifier.base, classifier.adapter, classifier.task)
    with vector_server(service) as server:
        report = verify_adapter(
            classifier.adapter,
            model=str(classifier.base),
            endpoint=server.url,
            served_name=(SHOP,),
            base_name="base",
        )
    assert (report.verdict, report.engines[0].engine) == ("as trained", "endpoint")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "an engine": ({"engines": ("llamacpp",)}, r"llamacpp.*: not started here for vectors.*llama\.cpp.*endpoint"),
    "tokens": ({"new_tokens": 4}, "new_tokens: for generated text, and .* has none"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_only_generated_text_has_is_refused(name: str, classifier: Encoder) -> None:
    options, message = REFUSED[name]
    with pytest.raises(ConfigError, match=message):
        verify_adapter(classifier.adapter, model=str(classifier.base), **({"engines": ("torch",)} | options))


def test_graphs_that_cannot_be_judged_are_refused(encoder: Encoder, classifier: Encoder, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="references needs endpoint, or graph of vectors, classes or scores"):
        verify_adapter(references=(encoder.adapter,))
    with pytest.raises(ConfigError, match="served_name needs endpoint"):
        verify_adapter(encoder.adapter, served_name=("a",), engines=("torch",))
    with pytest.raises(ConfigError, match="references is compared with one of endpoint and graph"):
        verify_adapter(references=(encoder.adapter,), graph=tmp_path, engines=("onnx",), endpoint="http://localhost:1")
    with pytest.raises(CheckpointError, match=r"has no model\.onnx or onnx/model\.onnx"):
        verify_adapter(references=(encoder.adapter,), graph=encoder.base)
    export_onnx((classifier.adapter,), tmp_path / "graph", mode="merged", model=str(classifier.base), check=False)
    with pytest.raises(EngineError, match="the graph has the outputs logits, expected sentence_embedding or last"):
        verify_adapter(references=(encoder.adapter,), graph=tmp_path / "graph")
