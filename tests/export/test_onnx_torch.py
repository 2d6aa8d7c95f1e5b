"""Graphs by torch's exporter, in plain ONNX Runtime: T5 with its caches, BERT classifiers, GPT-2 without a cache."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from support.make_checkpoint import edit_json, edit_tensors, save_tokenizer
from support.onnx_export import Sources, export, exported, exported_at_once, read_report
from support.onnx_graph import FEEDS, UNIT, Feed, Graph, fp32_tolerance
from support.tiny_models import fill_b, tiny_bert, tiny_gpt2, tiny_t5

pytestmark = pytest.mark.engine

SHAPES = ("one row", "batch", "padded on the left", "one real token", "padded on the right")
T5_TARGETS = ["q", "k", "v", "o", "wi", "wo"]


def save_base(folder: Path, model: Any) -> Path:
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def lora(base: Path, load: Callable[[Path], Any], folder: Path, **options: Any) -> Any:
    """An adapter with B, and other trained parameters, not as they started; returns PEFT's model in eval mode."""
    settings = {"r": 4, "lora_alpha": 6} | options
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.get("r", 4))
        model = get_peft_model(load(base), LoraConfig(**settings))
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.data += 0.1 * torch.randn(parameter.shape)
    fill_b(model, seed=2)
    model.save_pretrained(folder)
    return model.eval()


# T5: an encoder with the cross-attention's keys and values, and a decoder with a cache


class T5Graphs:
    """Both graphs, run with nothing of ours."""

    def __init__(self, folder: Path, name: str | None = None) -> None:
        files = (None, None) if name is None else (folder / f"{name}.{part}.onnx_adapter" for part in PARTS)
        self.encoder, self.decoder = (
            Graph(folder / f"{part}.onnx", adapter) for part, adapter in zip(PARTS, files, strict=True)
        )

    def logits(self, ids: Tensor, mask: Tensor, steps: Sequence[Tensor]) -> Tensor:
        """The decoder's logits of all steps' tokens, each step's cache handed to the next."""
        cross = self.encoder.run({"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
        cache, found = self.decoder.empty_cache(len(ids), 8), []
        for step in steps:
            feed = {"decoder_input_ids": step.numpy(), "attention_mask": mask.numpy()}
            outputs = self.decoder.run(feed | cross | cache)
            cache = {name: outputs[name.replace("past_key_values", "present")] for name in cache}
            found.append(torch.from_numpy(outputs["logits"]))
        return torch.cat(found, dim=1)


PARTS = ("encoder", "decoder")


@dataclass(frozen=True)
class T5:
    folder: Path
    models: dict[str, Any]

    @contextmanager
    def model(self, name: str | None) -> Iterator[Any]:
        if name is not None:
            yield self.models[name]
            return
        with self.models["first"].disable_adapter():
            yield self.models["first"]


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> T5:
    folder = tmp_path_factory.mktemp("t5")
    base = save_base(folder / "base", tiny_t5())
    load, task = transformers.AutoModelForSeq2SeqLM.from_pretrained, {"task_type": "SEQ_2_SEQ_LM"}
    patterns = {"rank_pattern": {"q": 2}, "alpha_pattern": {"wo": 3}}
    models = {
        "first": lora(base, load, folder / "first", target_modules=T5_TARGETS, **patterns, **task),
        "second": lora(base, load, folder / "second", target_modules=["q", "v"], r=7, **task),
    }
    exported("T5", [folder / "first", folder / "second"], folder / "swappable", "--mode", "swappable")
    return T5(folder, models)


@torch.no_grad()
def t5_worst(graphs: T5Graphs, model: Any) -> dict[str, float]:
    """Largest difference to PyTorch of each feed and way to decode, in tolerances."""
    worst = {}
    for name in SHAPES:
        ids, mask = FEEDS[name].ids, FEEDS[name].mask
        expected = model(input_ids=ids, attention_mask=mask, decoder_input_ids=ids, use_cache=False).logits
        singly = [ids[:, k : k + 1] for k in range(ids.shape[1])]
        for way, steps in {"at once": [ids], "3 and 9": [ids[:, :3], ids[:, 3:]], "singly": singly}.items():
            error = float((graphs.logits(ids, mask, steps) - expected).abs().max())
            worst[f"{name}, {way}"] = error / fp32_tolerance(expected)
    return worst


@pytest.mark.matrix
@pytest.mark.parametrize("name", ["first", "second", None])
def test_t5_swappable(t5: T5, name: str | None) -> None:
    with t5.model(name) as model:
        errors = t5_worst(T5Graphs(t5.folder / "swappable", name), model)
    assert max(errors.values()) <= 1, errors


@pytest.mark.matrix
def test_t5_merged(t5: T5, tmp_path: Path) -> None:
    exported("T5", t5.folder / "first", tmp_path / "merged", "--mode", "merged")
    graphs = T5Graphs(tmp_path / "merged")
    errors = t5_worst(graphs, t5.models["first"])
    assert max(errors.values()) <= 1, errors
    with t5.model(None) as base:
        assert min(t5_worst(graphs, base).values()) > 1000


@pytest.mark.matrix
def test_t5_files(t5: T5) -> None:
    """Two graphs with their weights, and two files of each adapter."""
    found = {path.name for path in (t5.folder / "swappable").iterdir()}
    adapters = {f"{name}.{part}.onnx_adapter" for name in ("first", "second") for part in PARTS}
    assert {path for path in found if path.endswith(".onnx_adapter")} == adapters
    assert {"encoder.onnx", "decoder.onnx", "config.json", "generation_config.json", "tokenizer.json"} <= found
    report = read_report(t5.folder / "swappable")
    assert all(check.greedy is not None and check.greedy.first_difference is None for check in report.checks)
    assert [check.adapter_effect > 1e3 * check.bound for check in report.checks] == [False, True, True]


# BERT


def typed_feed(ids: Tensor, mask: Tensor, types: Tensor) -> dict[str, Any]:
    """Inputs of a model that tells two texts apart."""
    return {"input_ids": ids.numpy(), "attention_mask": mask.numpy(), "token_type_ids": types.numpy()}


def scores(graph: Graph, feed: Feed) -> Tensor:
    typed = typed_feed(feed.ids, feed.mask, torch.zeros_like(feed.ids))
    return torch.from_numpy(graph.run(typed)["logits"]).float()


@torch.no_grad()
def errors(graph: Graph, model: Any) -> dict[str, float]:
    worst = {}
    for name in SHAPES:
        feed = FEEDS[name]
        expected = model(input_ids=feed.ids, attention_mask=feed.mask).logits
        found = scores(graph, feed)
        assert found.shape == expected.shape
        if expected.ndim == 3:
            expected, found = feed.real(expected), feed.real(found)
        worst[name] = float((found - expected).abs().max()) / fp32_tolerance(expected)
    return worst


@dataclass(frozen=True)
class Bert:
    """`whole` has a classifier, its base model has none; with `plain` it is the other way round."""

    folder: Path
    whole: Any
    plain: Any


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Bert:
    folder = tmp_path_factory.mktemp("bert")
    auto = transformers.AutoModelForSequenceClassification
    options = {"target_modules": ["query", "value", "dense"], "alpha_pattern": {"query": 11}, "task_type": "SEQ_CLS"}
    headless = save_base(folder / "headless", tiny_bert().bert)
    whole = lora(headless, partial(auto.from_pretrained, num_labels=3), folder / "whole", **options)
    assert any("classifier" in name for name, p in whole.named_parameters() if p.requires_grad)
    base = save_base(folder / "base", tiny_bert(num_labels=3))
    lora(base, auto.from_pretrained, folder / "plain", **options)
    weights = folder / "plain" / "adapter_model.safetensors"
    edit_tensors(weights, lambda found: [found.pop(key) for key in list(found) if "classifier" in key])
    edit_json(folder / "plain" / "adapter_config.json", lambda config: config.update(modules_to_save=None))
    shutil.copytree(folder / "plain", folder / "peft")  # PEFT asks for a classifier where the task is SEQ_CLS
    edit_json(folder / "peft" / "adapter_config.json", lambda config: config.update(task_type=None))
    plain = PeftModel.from_pretrained(auto.from_pretrained(base), folder / "peft").eval()
    return Bert(folder, whole, plain)


def test_bert_merged_with_its_classifier(bert: Bert, tmp_path: Path) -> None:
    report = exported("BERT", bert.folder / "whole", tmp_path / "out", "--mode", "merged")
    found = errors(Graph(tmp_path / "out" / "model.onnx"), bert.whole)
    assert max(found.values()) <= 1, found
    assert min(errors(Graph(tmp_path / "out" / "model.onnx"), bert.plain).values()) > 1000
    assert [check.greedy for check in report.checks] == [None]


@pytest.mark.matrix
def test_bert_swappable(bert: Bert, tmp_path: Path) -> None:
    report = exported("BERT", bert.folder / "plain", tmp_path / "out", "--mode", "swappable")
    assert not report.cache
    graph = tmp_path / "out" / "model.onnx"
    found = errors(Graph(graph, tmp_path / "out" / "plain.onnx_adapter"), bert.plain)
    assert max(found.values()) <= 1, found
    with bert.plain.disable_adapter():
        assert max(errors(Graph(graph), bert.plain).values()) <= 1
        assert min(errors(Graph(graph, tmp_path / "out" / "plain.onnx_adapter"), bert.plain).values()) > 1000


def test_bert_tells_the_texts_of_a_pair_apart(bert: Bert, tmp_path: Path) -> None:
    exported("BERT", bert.folder / "whole", tmp_path / "out", "--mode", "merged")
    graph = Graph(tmp_path / "out" / "model.onnx")
    ids, mask = FEEDS["batch"].ids, FEEDS["batch"].mask
    found = []
    for types in (torch.zeros_like(ids), (torch.arange(ids.shape[1]) > 4).long().expand_as(ids)):
        with torch.no_grad():
            expected = bert.whole(input_ids=ids, attention_mask=mask, token_type_ids=types).logits
        found.append(graph.run(typed_feed(ids, mask, types))["logits"])
        assert np.abs(found[-1] - expected.numpy()).max() <= fp32_tolerance(expected)
    assert np.abs(found[0] - found[1]).max() > 1e-3


# A model of vectors, without a head


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("embedder")
    base = save_base(folder / "base", tiny_bert().bert)
    options = {"target_modules": ["query", "dense"], "exclude_modules": [r"pooler.dense"]}
    load = transformers.AutoModel.from_pretrained
    return folder, lora(base, load, folder / "adapter", task_type="FEATURE_EXTRACTION", **options)


@pytest.mark.parametrize("mode", ["merged", "swappable"])
def test_vectors_of_tokens(mode: str, embedder: tuple[Path, Any], tmp_path: Path) -> None:
    folder, model = embedder
    report = exported("BERT", folder / "adapter", tmp_path / "out", "--mode", mode)
    assert {(check.compared, check.quantity) for check in report.checks} == {("states", "hidden state")}
    assert report.verdict == "passed"
    adapter = tmp_path / "out" / "adapter.onnx_adapter" if mode == "swappable" else None
    feed = FEEDS["padded on the right"]
    typed = typed_feed(feed.ids, feed.mask, torch.zeros_like(feed.ids))
    found = feed.real(torch.from_numpy(Graph(tmp_path / "out" / "model.onnx", adapter).run(typed)["last_hidden_state"]))
    with torch.no_grad():
        expected = feed.real(model(input_ids=feed.ids, attention_mask=feed.mask).last_hidden_state)
        with model.disable_adapter():
            base = feed.real(model(input_ids=feed.ids, attention_mask=feed.mask).last_hidden_state)
    assert (found - expected).abs().max() <= fp32_tolerance(expected)
    assert (found - base).abs().max() > 1000 * fp32_tolerance(expected)


def test_a_model_of_vectors_that_decodes_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = save_base(tmp_path / "base", tiny_t5())
    options = {"target_modules": ["q"], "task_type": "FEATURE_EXTRACTION"}
    lora(base, transformers.AutoModel.from_pretrained, tmp_path / "adapter", **options)
    assert export(tmp_path / "adapter", tmp_path / "out", "--mode", "merged") == 2
    assert "has an encoder and a decoder; no graph of vectors" in capsys.readouterr().err


# GPT-2, which onnxruntime-genai's builder does not know


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("gpt2")
    base = save_base(folder / "base", tiny_gpt2())
    load, targets = transformers.AutoModelForCausalLM.from_pretrained, ["c_attn", "c_proj", "c_fc"]
    options = {"target_modules": targets, "task_type": "CAUSAL_LM", "fan_in_fan_out": True}
    return folder, lora(base, load, folder / "adapter", rank_pattern={"c_fc": 2}, **options)


def test_gpt2_has_no_graph_with_a_cache(
    gpt2: tuple[Path, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = gpt2
    assert export(folder / "adapter", tmp_path / "out", "--mode", "merged") == 2
    message = capsys.readouterr().err
    assert "no decoder graph for GPT2LMHeadModel" in message
    assert "--no-cache" in message
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def gpt2_graphs(gpt2: tuple[Path, Any]) -> dict[str, Path]:
    folder, _ = gpt2
    graphs = {"merged": folder / "merged", "swappable": folder / "swappable"}
    precisions = {"merged": "fp16", "swappable": "fp32"}
    requests: dict[Path, tuple[Sources, Sequence[str]]] = {
        graphs[mode]: (folder / "adapter", ("--mode", mode, "--precision", precision, "--no-cache"))
        for mode, precision in precisions.items()
    }
    exported_at_once("GPT-2", requests)
    return graphs


@pytest.mark.matrix
@pytest.mark.parametrize("mode", ["merged", "swappable"])
def test_gpt2_without_a_cache(mode: str, gpt2: tuple[Path, Any], gpt2_graphs: dict[str, Path]) -> None:
    _, model = gpt2
    folder = gpt2_graphs[mode]
    assert not read_report(folder).cache
    allowed = 1 if mode == "swappable" else 8 * 2.0**-11 / (64 * UNIT)  # merged in float16
    adapter = folder / "adapter.onnx_adapter" if mode == "swappable" else None
    found = errors(Graph(folder / "model.onnx", adapter), model)
    assert max(found.values()) <= allowed, found
    if mode == "swappable":
        with model.disable_adapter():
            assert max(errors(Graph(folder / "model.onnx"), model).values()) <= allowed
    inputs = {value.name: value.type for value in Graph(folder / "model.onnx").session.get_inputs()}
    assert inputs == {"input_ids": "tensor(int64)", "attention_mask": "tensor(int64)"}
