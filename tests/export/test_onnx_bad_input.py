"""An ONNX export that cannot be done, or is ended: one message, exit code 2, and nothing written or overwritten."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from loraover_export.formats.onnx.run import ROWS, token_rows

from support.children import Child, limit_file_size
from support.make_checkpoint import edit_json, save_tokenizer
from support.onnx_export import OTHER, OnnxMade, export, read_report, tiny_base, tiny_lora
from support.plain_adapter import write_adapter
from support.refusals import Refused, only_error
from support.tiny_experts import tiny_moe
from support.tiny_models import tiny_bart, tiny_bert, tiny_gpt2, tiny_llama, tiny_t5
from support.vllm_damage import added, config

pytestmark = pytest.mark.engine

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
MODULE = "model.layers.0.self_attn.q_proj"
BERT_MODULE = "bert.encoder.layer.0.attention.self.query"
Q_B = f"base_model.model.{MODULE}.lora_B.weight"
MERGED, SWAPPABLE = ("--mode", "merged"), ("--mode", "swappable")


# Base models


def test_another_base_model_is_named(onnx_made: OnnxMade, source: Path, tmp_path: Path, refused: Refused) -> None:
    tiny_base(tmp_path / "narrower", "Llama", hidden_size=96)
    tiny_gpt2().save_pretrained(tmp_path / "gpt2")
    save_tokenizer(tmp_path / "gpt2")
    for base in (tmp_path / "narrower", tmp_path / "gpt2"):
        named = (str(source), "layers.", str(onnx_made.base), "--model")
        refused("onnx", source, *MERGED, "--model", base, named=named)


def test_a_base_model_that_is_lacking_is_named(
    onnx_made: OnnxMade, source: Path, tmp_path: Path, refused: Refused
) -> None:
    base = shutil.copytree(onnx_made.base, tmp_path / "base", ignore=shutil.ignore_patterns("tokenizer*"))
    refused("onnx", source, *MERGED, "--model", base, named=(str(base), "no tokenizer"))
    refused("onnx", source, *MERGED, "--model", "absent", named=("'absent'",))
    config(base_model_name_or_path=None)(source)
    refused("onnx", source, *MERGED, named=(str(source), "--model"))


def test_a_width_like_the_vocabularys_is_refused(tmp_path: Path, refused: Refused) -> None:
    """onnxruntime-genai's builder would mistake such a layer for the head, without a message."""
    base = tiny_base(tmp_path / "base", "Llama", vocab_size=96)
    tiny_lora(base, tmp_path / "adapter")
    named = ("mlp.gate_proj", "96", "--no-cache")
    refused("onnx", tmp_path / "adapter", *MERGED, "--no-check", named=named)


def test_sources_of_other_models_or_tasks_are_refused(onnx_made: OnnxMade, source: Path, refused: Refused) -> None:
    second = onnx_made.folder / "second"
    config(base_model_name_or_path="/another/model")(source)
    refused("onnx", source, second, *SWAPPABLE, named=("/another/model", str(onnx_made.base)))
    config(base_model_name_or_path=str(onnx_made.base), task_type="SEQ_CLS")(source)
    refused("onnx", source, second, *SWAPPABLE, named=("SEQ_CLS", "CAUSAL_LM"))
    config(task_type="QUESTION_ANS")(source)
    refused("onnx", source, *MERGED, named=("'QUESTION_ANS'", "CAUSAL_LM"))


def classifier(folder: Path, model: Any, module: str) -> Path:
    """An adapter of one module of a classifier, and its base model in `folder/base`."""
    model.save_pretrained(folder / "base")
    save_tokenizer(folder / "base")
    fields = {"task_type": "SEQ_CLS", "base_model_name_or_path": str(folder / "base")}
    return write_adapter(folder / "adapter", {module: (torch.ones(2, 32), torch.ones(32, 2))}, **fields)


def test_a_classifier_takes_no_int4(tmp_path: Path, refused: Refused) -> None:
    adapter = classifier(tmp_path, tiny_bert(num_labels=3), BERT_MODULE)
    named = ("BertForSequenceClassification", "fp32 or fp16")
    refused("onnx", adapter, *MERGED, "--precision", "int4", named=named)


@pytest.mark.parametrize("options", [(), ("--no-check",)])
def test_a_classifier_without_its_padding_token_is_refused(
    options: tuple[str, ...], tmp_path: Path, refused: Refused
) -> None:
    adapter = classifier(tmp_path, tiny_llama(pad_token_id=None), MODULE)
    refused("onnx", adapter, *MERGED, *options, named=("has no pad_token_id, and LlamaForSequence", "--model"))


def test_a_classifier_that_scores_the_first_token_needs_no_padding_token(tmp_path: Path) -> None:
    model = tiny_bert()
    model.config.pad_token_id = None
    assert export(classifier(tmp_path, model, BERT_MODULE), tmp_path / "out", *MERGED) in (0, 3)


ENCODER_DECODERS: dict[str, tuple[Callable[[], Any], tuple[str, ...], tuple[str, ...]]] = {
    "T5 without a cache": (tiny_t5, ("--no-cache",), ("--no-cache is for decoder models", "an encoder-decoder")),
    "BART": (tiny_bart, (), ("'bart'", "t5, mt5, umt5")),
}


@pytest.mark.parametrize("case", ENCODER_DECODERS)
def test_encoder_decoder_models_that_cannot_be_exported(case: str, tmp_path: Path, refused: Refused) -> None:
    make, options, named = ENCODER_DECODERS[case]
    make().save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base")
    fields = {"task_type": "SEQ_2_SEQ_LM", "base_model_name_or_path": str(tmp_path / "base")}
    matrices = {"anything": (torch.ones(2, 32), torch.ones(32, 2))}
    refused("onnx", write_adapter(tmp_path / "adapter", matrices, **fields), *MERGED, *options, named=named)


def test_experts_in_a_graph_without_a_cache_are_refused(tmp_path: Path, refused: Refused) -> None:
    """The check computes them in float64, which only one of transformers' implementations does."""
    base = tmp_path / "base"
    tiny_moe().save_pretrained(base)
    save_tokenizer(base)
    tiny_lora(base, tmp_path / "in", target_modules=["k_proj"], rank_pattern={}, alpha_pattern={})
    refused("onnx", tmp_path / "in", *MERGED, "--no-cache", named=("torch.onnx.export cannot trace",))


def test_a_tokenizer_that_knows_no_text_is_no_endless_loop() -> None:
    """Such as the empty one that transformers makes for a Qwen2 without files of a tokenizer."""
    assert token_rows(lambda *_, **__: SimpleNamespace(input_ids=[]), tiny_gpt2()).shape == ROWS


# Adapters


WRONG_ADAPTERS: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "a bias of a LoRA": (added(**{Q_B.replace("weight", "bias"): torch.ones(64)}), (TENSORS, "lora_B.bias")),
    "DoRA": (config(use_dora=True), ("use_dora",)),
    "an unknown field": (config(use_future_lora=True, peft_version="99.0"), ("use_future_lora", "does not know")),
    "trained tokens": (config(trainable_token_indices=[3]), ("trainable_token_indices", "in full")),
}


def test_a_wrong_adapter_is_named(source: Path, tmp_path: Path, refused: Refused) -> None:
    for case, (damage, named) in WRONG_ADAPTERS.items():
        damaged = shutil.copytree(source, tmp_path / case.replace(" ", "-"))
        damage(damaged)
        refused("onnx", damaged, *MERGED, named=(str(damaged), *named))


def test_swappable_takes_linear_layers_only(onnx_made: OnnxMade, tmp_path: Path, refused: Refused) -> None:
    tiny_lora(onnx_made.base, tmp_path / "a", target_modules=["embed_tokens", "q_proj"])
    refused("onnx", tmp_path / "a", *SWAPPABLE, named=("embed_tokens", "--mode merged"))
    tiny_lora(onnx_made.base, tmp_path / "b", modules_to_save=["norm"])
    refused("onnx", tmp_path / "b", *SWAPPABLE, named=("norm.weight", "--mode merged"))


# Graphs exported earlier


def test_a_graph_of_other_targets_or_another_base_is_named(
    onnx_made: OnnxMade, source: Path, graph: Path, tmp_path: Path, refused: Refused
) -> None:
    options = (*SWAPPABLE, "--graph", graph)
    refused("onnx", source, *options, named=("no input for", "other target modules"))
    base = tiny_base(tmp_path / "other", "Llama", hidden_size=96)
    tiny_lora(base, tmp_path / "a", **OTHER)
    refused("onnx", tmp_path / "a", *options, named=(str(graph), str(onnx_made.base), str(base), "--model"))


def test_a_graph_of_other_settings_is_named(onnx_made: OnnxMade, graph: Path, refused: Refused) -> None:
    """Settings that are usual without a graph are compared too, where they are asked for."""
    request = ("onnx", onnx_made.folder / "second", *SWAPPABLE, "--graph", graph)
    for options in (("--precision", "fp16"), ("--device", "cuda"), ("--no-cache",)):
        refused(*request, *options, named=(str(graph), " ".join(options)))
    edit_json(graph / "onnx_report.json", lambda content: content.update(precision="int4", device="cuda"))
    for field, found, asked in (("precision", "int4", "fp32"), ("device", "cuda", "cpu")):
        named = (f"exported with --{field} {found}; leave --{field} {asked} out",)
        refused(*request, f"--{field}", asked, named=named)


def test_the_recorded_command_names_what_the_graph_has(onnx_made: OnnxMade, graph: Path, tmp_path: Path) -> None:
    edit_json(graph / "onnx_report.json", lambda content: content.update(precision="int4"))
    assert export(onnx_made.folder / "second", tmp_path / "out", *SWAPPABLE, "--graph", str(graph), "--no-check") == 0
    assert "--precision int4 --device cpu" in (tmp_path / "out" / "README.md").read_text()
    report = read_report(tmp_path / "out")
    assert report.precision == "int4"
    assert (report.check_device, report.compute_dtype, report.checked_on) == (None, None, None)


def test_an_adapter_of_another_width_is_named(
    onnx_made: OnnxMade, graph: Path, tmp_path: Path, refused: Refused
) -> None:
    """Even if nothing is checked, and it claims the graph's base model."""
    matrices = {MODULE: (torch.ones(2, 96), torch.ones(64, 2))}
    adapter = write_adapter(tmp_path / "a", matrices, base_model_name_or_path=str(onnx_made.base))
    named = ("96 features", "has 64", str(onnx_made.base))
    refused("onnx", adapter, *SWAPPABLE, "--graph", graph, "--no-check", named=named)


WRONG_VALUES: dict[str, tuple[str, dict[str, Any]]] = {
    "no places": ("swappable.json", {"places": {}}),
    "another graph": ("swappable.json", {"places": {"a.lora_A": {"graph": "other.onnx", "input": "a", "features": 1}}}),
    "another schema of the report": ("onnx_report.json", {"schema_version": 2}),
    "a merged graph": ("onnx_report.json", {"mode": "merged"}),
}


def test_files_of_a_graph_that_cannot_be_used_are_named(onnx_made: OnnxMade, graph: Path, refused: Refused) -> None:
    request = ("onnx", onnx_made.folder / "second", *SWAPPABLE, "--graph", graph)
    for file, values in WRONG_VALUES.values():
        right = (graph / file).read_bytes()
        edit_json(graph / file, lambda content, values=values: content.update(values))  # type: ignore[misc]
        refused(*request, named=(str(graph),))
        (graph / file).write_bytes(right)
    model = graph / "model.onnx"
    model.write_bytes(model.read_bytes()[:1000])
    refused(*request, named=(str(model),))


def test_an_export_without_a_graph_is_named(onnx_made: OnnxMade, graph: Path, tmp_path: Path, refused: Refused) -> None:
    """Such a folder is left by an export that only added adapters to an earlier graph."""
    first = (*SWAPPABLE, "--graph", str(graph), "--no-check", "--name", "again")
    assert export(onnx_made.folder / "second", tmp_path / "later", *first) == 0
    named = (str(tmp_path / "later" / "swappable.json"), "no such file")
    refused("onnx", onnx_made.folder / "second", *SWAPPABLE, "--graph", tmp_path / "later", named=named)


# Outputs that exist


def test_force_replaces_an_export_whole_and_nothing_else(
    onnx_made: OnnxMade, graph: Path, source: Path, tmp_path: Path, refused: Refused
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "model.onnx").write_text("mine")
    refused("onnx", source, *MERGED, output=graph, named=(str(graph), "exists already"))
    refused("onnx", source, *MERGED, "--force", output=tmp_path / "mine", named=(str(tmp_path / "mine"),))
    (graph / "stray").write_text("of the older export")
    assert export(source, graph, *MERGED, "--no-check", "--force") == 0
    assert not {"stray", "second.onnx_adapter", "swappable.json"} & {path.name for path in graph.iterdir()}
    assert read_report(graph).mode == "merged"
    assert {path.name for path in tmp_path.iterdir()} == {"graph", "first", "mine"}


def test_an_output_inside_an_input_or_around_it_is_refused(
    onnx_made: OnnxMade, source: Path, graph: Path, refused: Refused
) -> None:
    second = onnx_made.folder / "second"
    refused("onnx", second, source, *SWAPPABLE, output=source / "out", named=("inside the input", str(source)))
    options = (*SWAPPABLE, "--graph", graph)
    refused("onnx", second, *options, output=graph / "out", named=("inside the input", str(graph)))
    refused("onnx", second, *options, "--force", output=graph, named=(str(graph),))
    inner = source.rename(graph / "first")
    refused("onnx", inner, *MERGED, "--force", output=graph, named=("holds the input", str(inner)))


# A limit of file sizes, and an end from outside


MERGED = ("--mode", "merged")


def test_a_file_size_limit_leaves_nothing(onnx_made: OnnxMade, tmp_path: Path) -> None:
    request = (onnx_made.folder / "first", tmp_path / "out", *MERGED, "--no-check")
    ended = Child(lambda: export(*request), prepare=lambda: limit_file_size(290_000)).end()
    assert ended.code == 2, ended.output
    assert "too large" in only_error(ended.output)
    assert list(tmp_path.iterdir()) == []


def ended_within(pid: int, seconds: float) -> bool:
    """Whether a process is gone by then, or a zombie that nobody has asked about."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if "State:\tZ" in Path(f"/proc/{pid}/status").read_text():
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_the_builder_ends_with_the_export(number: signal.Signals, onnx_made: OnnxMade, tmp_path: Path) -> None:
    """Ctrl-C reaches the process group of a terminal, and a kill the command alone, whose end its builder sees."""
    command = [str(Path(sys.executable).with_name("loraover-export")), "onnx", str(onnx_made.folder / "first")]
    arguments = ["-o", str(tmp_path / "out"), *MERGED]
    with subprocess.Popen(
        [*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        while not children.read_text() and process.poll() is None:
            time.sleep(0.02)
        (builder,) = children.read_text().split()
        (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
        out, err = process.communicate()
    assert ended_within(int(builder), seconds=5 if number == signal.SIGINT else 60)
    left = [path.name for path in tmp_path.iterdir()]
    if number == signal.SIGKILL:
        assert process.returncode == -number
        assert all(name.startswith(".out.") and name.endswith(".tmp") for name in left)
        return
    assert process.returncode == 130, err
    assert err.splitlines()[-1].startswith("Interrupted")
    assert "Traceback" not in out + err
    assert left == []
