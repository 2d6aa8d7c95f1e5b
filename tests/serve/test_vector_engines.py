"""Vectors, classes and scores of engines in this process: right ones pass, and faults of ONNX exports are named."""

from __future__ import annotations

import gzip
import importlib.metadata
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper
from onnxruntime.quantization import QuantType, quantize_dynamic
from tokenizers.processors import TemplateProcessing

from loraover.checkpoint.files import REFERENCE_FILE
from loraover.common.errors import CheckpointError, ConfigError, DataError, EngineError, LoraOverError
from loraover_export import export_onnx
from loraover_serve import record_adapter, verify_adapter
from loraover_serve.engines import engine_class
from loraover_serve.verify.request import VerifyRequest
from loraover_serve.verify.vector_engines import GraphVectors

from support.make_checkpoint import edit_json
from support.tiny_hub import tiny_tokenizer
from support.vector_server import SHOP, Service, save_encoder, save_vector_adapter, vector_server

OPSET = helper.make_opsetid("", 18)

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
    assert {(one.compared, one.number_format) for one in report.engines} == {("vectors", "fp32")}
    unseen = [[line.partition(":")[0] for line in one.not_checked] for one in report.engines]
    pooled = ["pooling, length of vectors and prefix"] if mine.task == "FEATURE_EXTRACTION" else []
    assert unseen == [[], ["padding", *pooled]]
    assert all(abs(one.strength.value - 1) < 1e-3 for one in report.engines if one.strength is not None)
    page = (tmp_path / "out" / "verify.html").read_text()
    assert "distances of vectors or logits, relative to their RMS size" in page


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    mine = made(tmp_path_factory.mktemp("encoder"), "vectors")
    record_adapter(mine.adapter, model=str(mine.base), device="cpu")
    return mine


@pytest.fixture(scope="module")
def reranker(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    mine = made(tmp_path_factory.mktemp("reranker"), "scores of pairs")
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
    return changed(mine.adapter, folder, lora_alpha={"right": 8, "half": 4, "quarter": 2, "base": 1e-9}[fault])


FAULTS = {
    ("encoder", "right"): None,
    ("encoder", "half"): "wrong scaling",
    ("encoder", "base"): "served as base",
    ("classifier", "right"): None,
    ("classifier", "quarter"): "wrong scaling",
    ("classifier", "base"): "only the head of the adapter applied",
    ("classifier", "another adapter"): None,
    ("reranker", "right"): None,
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
    assert found.engine == SHOP


def test_a_swappable_export_is_judged_by_the_name_of_its_adapter(encoder: Encoder, tmp_path: Path) -> None:
    half, far = (
        changed(encoder.adapter, tmp_path / "half", lora_alpha=4),
        faulty(encoder, "another adapter", tmp_path / "far"),
    )
    graph = tmp_path / "graph"
    export_onnx((encoder.adapter, half, far), graph, mode="swappable", model=str(encoder.base), check=False)
    asked: dict[str, Any] = {"references": (encoder.adapter,), "graph": graph}
    right = verify_adapter(**asked, engines=("onnx",)).engines[0]
    assert (right.verdict, right.number_format) == ("as trained", "fp32")
    assert verify_adapter(**asked, served_name=("half",)).engines[0].fault == "wrong scaling"
    another = verify_adapter(**asked, served_name=("far",)).engines[0]
    assert (another.verdict, another.fault) == ("differs", None)
    assert "another adapter may be served" in another.reason
    with pytest.raises(ConfigError, match="are the adapters far, half, shop, expected other; choose with served_name"):
        verify_adapter(**asked, served_name=("other",))
    again = verify_adapter(encoder.adapter, model=str(encoder.base), engines=("onnx",), graph=graph)
    assert again.verdict == "as trained"


@pytest.fixture(scope="module")
def graph(encoder: Encoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Graph of the right adapter, merged, with the hidden state of each token."""
    folder = tmp_path_factory.mktemp("graph") / "merged"
    export_onnx((encoder.adapter,), folder, mode="merged", model=str(encoder.base), check=False)
    return folder


def with_output(graph: Path, folder: Path, name: str, *nodes: onnx.NodeProto, kind: int = TensorProto.FLOAT) -> Path:
    """A copy of a graph with nodes that make another output; `first`, `axis` and `nan` are numbers for them."""
    shutil.copytree(graph, folder)
    model = onnx.load(folder / "model.onnx")
    for constant, of, dims, value in (
        ("first", TensorProto.INT64, [], 0),
        ("axis", TensorProto.INT64, [1], 1),
        ("nan", TensorProto.FLOAT, [], float("nan")),
    ):
        model.graph.initializer.append(helper.make_tensor(constant, of, dims, [value]))
    model.graph.node.extend(nodes)
    model.graph.output.append(helper.make_tensor_value_info(name, kind, None))
    onnx.save(model, folder / "model.onnx")
    return folder


STATES, VECTOR = "last_hidden_state", "sentence_embedding"
LENGTH_1 = helper.make_node("LpNormalization", ["pooled"], [VECTOR], axis=-1, p=2)
FIRST = helper.make_node("Gather", [STATES, "first"], ["pooled"], axis=1)
POOLED = {
    "right": (None, [FIRST, LENGTH_1]),
    "mean": ("another pooling", [helper.make_node("ReduceMean", [STATES, "axis"], ["pooled"], keepdims=0), LENGTH_1]),
    "as pooled": ("vectors not normalised", [helper.make_node("Gather", [STATES, "first"], [VECTOR], axis=1)]),
}


@pytest.mark.parametrize("name", POOLED)
def test_a_graph_that_pools_by_itself_is_judged_as_it_answers(
    name: str, encoder: Encoder, graph: Path, tmp_path: Path
) -> None:
    """Some tools write the pooling into the graph; here the right one is the first token's, with the length 1."""
    fault, nodes = POOLED[name]
    (found,) = verify_adapter(
        references=(encoder.adapter,), graph=with_output(graph, tmp_path / "graph", VECTOR, *nodes)
    ).engines
    assert found.fault == fault, found.reason
    assert not any(line.startswith("pooling") for line in found.not_checked), "the graph's own was checked"


def test_an_engine_without_finite_numbers_fails_beside_the_others(encoder: Encoder, tmp_path: Path) -> None:
    export_onnx((encoder.adapter,), tmp_path / "graph", mode="swappable", model=str(encoder.base), check=False)
    nodes = [FIRST, helper.make_node("Mul", ["pooled", "nan"], [VECTOR])]
    broken = with_output(tmp_path / "graph", tmp_path / "broken", VECTOR, *nodes)
    asked: dict[str, Any] = {"model": str(encoder.base), "graph": broken}
    report = verify_adapter(encoder.adapter, engines=("onnx", "torch"), **asked)
    assert [one.verdict for one in report.engines] == ["failed", "as trained"]
    assert "an answer cannot be read, since a number is not finite" in report.engines[0].reason
    with pytest.raises(EngineError, match="a number is not finite"):
        verify_adapter(references=(encoder.adapter,), graph=broken)


def test_graphs_of_other_tools_get_the_inputs_that_they_need(encoder: Encoder, graph: Path, tmp_path: Path) -> None:
    """Decoders have a cache, some tools write ids of 32 bits, and an output of texts is left alone."""
    text = helper.make_node("Cast", [STATES], ["texts"], to=TensorProto.STRING)
    folder = with_output(graph, tmp_path / "graph", "texts", text, kind=TensorProto.STRING)
    model = onnx.load(folder / "model.onnx")
    for node in model.graph.node:
        node.input[:] = ["wide" if name == "input_ids" else name for name in node.input]
    model.graph.node.insert(0, helper.make_node("Cast", ["input_ids"], ["wide"], to=TensorProto.INT64))
    next(each for each in model.graph.input if each.name == "input_ids").type.tensor_type.elem_type = TensorProto.INT32
    cache = helper.make_tensor_value_info("past_key_values.0.key", TensorProto.FLOAT, ["batch", 2, "past", 8])
    model.graph.input.append(cache)
    onnx.save(model, folder / "model.onnx")
    (found,) = verify_adapter(references=(encoder.adapter,), graph=folder).engines
    assert found.verdict == "as trained", found.reason
    assert any(line.startswith("pooling, length of vectors and prefix: they were") for line in found.not_checked)


def test_an_adapter_beside_a_graph_of_another_tool_is_run(encoder: Encoder, tmp_path: Path) -> None:
    graph = tmp_path / "graph"
    export_onnx((encoder.adapter,), graph, mode="swappable", model=str(encoder.base), check=False)
    (graph / "swappable.json").unlink()
    asked: dict[str, Any] = {"references": (encoder.adapter,), "graph": graph}
    assert verify_adapter(**asked).engines[0].verdict == "as trained"
    with pytest.raises(ConfigError, match="are the adapters shop, expected shpo"):
        verify_adapter(**asked, served_name=("shpo",))


@pytest.mark.parametrize("of", ["encoder", "classifier"])
def test_a_graph_in_int8_is_as_trained_or_inconclusive(of: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """ONNX Runtime's own rounding, which also rounds the inputs of each layer; the base model is not as trained."""
    mine: Encoder = request.getfixturevalue(of)
    for name, adapter in {"right": mine.adapter, "base": faulty(mine, "base", tmp_path / "adapter")}.items():
        exact, rounded = tmp_path / name, tmp_path / f"{name}-int8"
        export_onnx((adapter,), exact, mode="merged", model=str(mine.base), check=False)
        shutil.copytree(exact, rounded, ignore=shutil.ignore_patterns("model.onnx*"))
        quantize_dynamic(exact / "model.onnx", rounded / "model.onnx", weight_type=QuantType.QInt8)
        (found,) = verify_adapter(references=(mine.adapter,), graph=rounded, served_format="int8").engines
        assert found.verdict != ("differs" if name == "right" else "as trained"), found.reason


def written(reference: Path, place: Path, **fields: Any) -> Path:
    """A copy of a reference with other fields."""
    content = json.loads(gzip.decompress(reference.read_bytes()))
    place.write_bytes(gzip.compress(json.dumps(content | fields).encode()))
    return place


def test_one_reference_that_fails_leaves_the_results_of_the_others(
    encoder: Encoder, classifier: Encoder, graph: Path, tmp_path: Path
) -> None:
    mine, others = encoder.adapter / REFERENCE_FILE, classifier.adapter / REFERENCE_FILE
    more = written(mine, tmp_path / "more.json.gz", adapter="more", sensitivity=7.0)
    classes = written(others, tmp_path / "classes.json.gz", adapter="classes")
    (tmp_path / "none.json.gz").write_text("{}")
    references = (mine, classes, tmp_path / "none.json.gz", more)
    report = verify_adapter(references=references, graph=graph, junit=tmp_path / "junit.xml")
    assert [(one.engine, one.verdict) for one in report.engines] == [
        (SHOP, "as trained"),
        ("classes", "failed"),
        (str(tmp_path / "none.json.gz"), "failed"),
        ("more", "as trained"),
    ]
    assert (report.sensitivity, report.exit_code) == (7.0, 2)
    shown = report.engines[0]
    assert (shown.program, shown.version) == ("onnx", importlib.metadata.version("onnxruntime"))


def test_vectors_need_onnx_runtime_without_its_generator(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_class("onnx"), "distributions", ("absent",))
    asked: dict[str, Any] = {"model": str(encoder.base), "engines": ("onnx",)}
    assert verify_adapter(encoder.adapter, **asked).verdict == "as trained"
    monkeypatch.setattr(GraphVectors, "distributions", ("absent",))
    with pytest.raises(EngineError, match=r"onnx.* is not installed here; install it: pip install"):
        verify_adapter(encoder.adapter, **asked)


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


def test_graphs_that_cannot_be_judged_are_refused(
    encoder: Encoder, classifier: Encoder, graph: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="references needs endpoint, or graph of vectors, classes or scores"):
        verify_adapter(references=(encoder.adapter,))
    with pytest.raises(ConfigError, match="served_name needs endpoint"):
        verify_adapter(encoder.adapter, served_name=("a",), engines=("torch",))
    with pytest.raises(ConfigError, match="references is compared with one of endpoint and graph"):
        verify_adapter(references=(encoder.adapter,), graph=tmp_path, engines=("onnx",), endpoint="http://localhost:1")
    with pytest.raises(CheckpointError, match=r"has no model\.onnx or onnx/model\.onnx"):
        verify_adapter(references=(encoder.adapter,), graph=encoder.base)
    with pytest.raises(CheckpointError, match=r"absent: has no model\.onnx or"):
        verify_adapter(references=(encoder.adapter,), graph=tmp_path / "absent")
    with pytest.raises(ConfigError, match="beside the graph are the adapters none, expected shop; choose"):
        verify_adapter(references=(encoder.adapter,), graph=graph, served_name=(SHOP,))
    export_onnx((classifier.adapter,), tmp_path / "graph", mode="merged", model=str(classifier.base), check=False)
    with pytest.raises(EngineError, match="the graph has the outputs logits, expected sentence_embedding or last"):
        verify_adapter(references=(encoder.adapter,), graph=tmp_path / "graph")


def scalar_graph(folder: Path) -> None:
    """Write a graph whose hidden state is one number."""
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, [1, "tokens"])
    nodes = [
        helper.make_node("Cast", ["input_ids"], ["numbers"], to=TensorProto.FLOAT),
        helper.make_node("ReduceSum", ["numbers"], [STATES], keepdims=0),
    ]
    output = helper.make_tensor_value_info(STATES, TensorProto.FLOAT, [])
    made = helper.make_model(helper.make_graph(nodes, "scalar", [ids], [output]), opset_imports=[OPSET], ir_version=10)
    onnx.save(made, folder / "model.onnx")


UNREADABLE: dict[str, tuple[Callable[[Path], object], type[LoraOverError], str]] = {
    "a tokenizer that is no object": (
        lambda folder: (folder / "tokenizer_config.json").write_text("[]"),
        ConfigError,
        "has no tokenizer",
    ),
    "one number": (scalar_graph, EngineError, "onnx: IndexError"),
    "a text without tokens": (lambda folder: tiny_tokenizer().save_pretrained(folder), DataError, "has no tokens"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_graphs_and_texts_that_cannot_be_read_are_refused(
    name: str, encoder: Encoder, graph: Path, tmp_path: Path
) -> None:
    change, kind, message = UNREADABLE[name]
    change(shutil.copytree(graph, tmp_path / "graph"))
    reference = encoder.adapter / REFERENCE_FILE
    questions = json.loads(gzip.decompress(reference.read_bytes()))["questions"]
    questions[3]["text"] = ""
    asked = written(reference, tmp_path / "asked.json.gz", questions=questions)
    with pytest.raises(kind, match=message):
        verify_adapter(references=(asked,), graph=tmp_path / "graph")


OF_SERVERS: dict[str, Any] = {
    "caches": True,
    "reload": "true",
    "churn_s": 5.0,
    "quick": True,
    "repeats": 1,
    "without_mixed": True,
    "prompts": "prompts.txt",
    "new_tokens": 4,
    "headers": ("A=B",),
    "protocol": "openai",
    "confusable": ("other",),
    "check_timeout_s": 5.0,
    "model": "other",
    "max_memory_gib": 4.0,
    "device": "cuda",
}


@pytest.mark.parametrize("name", OF_SERVERS)
def test_options_that_a_graph_has_no_use_for_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"{name}.*: not used when references is compared with a graph"):
        VerifyRequest(references=(tmp_path,), graph=tmp_path, **{name: OF_SERVERS[name]})


def test_a_seal_is_checked_before_a_graph_is_asked(encoder: Encoder, graph: Path) -> None:
    reference = encoder.adapter / REFERENCE_FILE
    with pytest.raises(CheckpointError, match="names no sealed reference"):
        verify_adapter(references=(reference,), published=reference, graph=graph)
