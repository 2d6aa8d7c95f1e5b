"""An ONNX export that cannot be done ends in one message and exit code 2, with nothing written or overwritten."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from support.make_checkpoint import edit_json, edit_tensors, save_tokenizer
from support.onnx_export import OnnxMade, export, tiny_base, tiny_lora
from support.plain_adapter import tiny_decoder, write_adapter
from support.tiny_experts import tiny_moe
from support.tiny_models import VOCABULARY, tiny_bart, tiny_bert, tiny_gpt2, tiny_t5
from support.vllm_damage import config

pytestmark = pytest.mark.engine

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
MODULE = "model.layers.0.self_attn.q_proj"
Q_A, Q_B = (f"base_model.model.{MODULE}.lora_{matrix}.weight" for matrix in "AB")
MODES = ("merged", "swappable")
SWAPPABLE = ("--mode", "swappable")
MERGED = ("--mode", "merged")

Damage = Callable[[Path], object]
Refused = Callable[..., str]


# Base models


def narrower(folder: Path) -> Path:
    return tiny_base(folder, "Llama", hidden_size=96)


def gpt2(folder: Path) -> Path:
    tiny_gpt2().save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.mark.parametrize("other", [narrower, gpt2])
@pytest.mark.parametrize("mode", MODES)
def test_another_base_model_is_named(
    mode: str,
    other: Callable[[Path], Path],
    made: OnnxMade,
    source: Path,
    tmp_path: Path,
    refused: Refused,
) -> None:
    base = other(tmp_path / "base")
    refused(
        source,
        "--mode",
        mode,
        "--model",
        str(base),
        named=(str(source), "layers.", str(made.base), "--model"),
    )


@pytest.mark.parametrize("mode", MODES)
def test_a_base_model_without_a_tokenizer_is_named(
    mode: str, made: OnnxMade, source: Path, tmp_path: Path, refused: Refused
) -> None:
    base = shutil.copytree(made.base, tmp_path / "base", ignore=shutil.ignore_patterns("tokenizer*"))
    refused(source, "--mode", mode, "--model", str(base), named=(str(base), "no tokenizer"))


@pytest.mark.parametrize("name", ["absent"])
def test_a_base_model_that_is_nowhere_is_named(name: str, source: Path, refused: Refused) -> None:
    refused(source, *MERGED, "--model", name, named=(repr(name),))


def test_an_adapter_that_names_no_base_model_asks_for_one(source: Path, refused: Refused) -> None:
    edit_json(source / CONFIG, lambda config: config.update(base_model_name_or_path=None))
    refused(source, *MERGED, named=(str(source), "--model"))


@pytest.mark.parametrize("mode", MODES)
def test_a_width_like_the_vocabularys_is_refused(mode: str, tmp_path: Path, refused: Refused) -> None:
    """onnxruntime-genai's builder would mistake such a layer for the head, without a message."""
    base = tiny_base(tmp_path / "base", "Llama", vocab_size=96)
    tiny_lora(base, tmp_path / "adapter")
    refused(tmp_path / "adapter", "--mode", mode, "--no-check", named=("mlp.gate_proj", "96", "--no-cache"))


# Options and names


def test_merged_takes_one_source(made: OnnxMade, source: Path, refused: Refused) -> None:
    refused([source, made.folder / "second"], *MERGED, named=("--mode merged takes one adapter, found 2",))


def test_two_sources_of_one_name_ask_for_names(made: OnnxMade, source: Path, refused: Refused) -> None:
    refused([source, made.folder / "first"], *SWAPPABLE, named=("'first'", "--name"))


def test_a_folder_with_spaces_needs_a_name(source: Path, tmp_path: Path, refused: Refused) -> None:
    folder = source.rename(tmp_path / "my first adapter")
    refused(folder, *SWAPPABLE, named=("'my first adapter'", "--name"))
    assert export(folder, tmp_path / "out", *SWAPPABLE, "--no-check", "--name", "mine") == 0
    assert (tmp_path / "out" / "mine.onnx_adapter").is_file()


def test_sources_of_other_models_or_tasks_are_refused(
    made: OnnxMade, source: Path, tmp_path: Path, refused: Refused
) -> None:
    edit_json(source / CONFIG, lambda config: config.update(base_model_name_or_path="/another/model"))
    refused([source, made.folder / "second"], *SWAPPABLE, named=("/another/model", str(made.base)))
    edit_json(source / CONFIG, lambda c: c.update(base_model_name_or_path=str(made.base), task_type="SEQ_CLS"))
    refused([source, made.folder / "second"], *SWAPPABLE, named=("SEQ_CLS", "CAUSAL_LM"))


def test_another_task_is_named(source: Path, refused: Refused) -> None:
    edit_json(source / CONFIG, lambda config: config.update(task_type="QUESTION_ANS"))
    refused(source, *MERGED, named=("'QUESTION_ANS'", "CAUSAL_LM"))


def test_a_classifier_takes_no_int4(tmp_path: Path, refused: Refused) -> None:
    tiny_bert(num_labels=3).save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base")
    matrices = {"bert.encoder.layer.0.attention.self.query": (torch.ones(2, 32), torch.ones(32, 2))}
    config = {"task_type": "SEQ_CLS", "base_model_name_or_path": str(tmp_path / "base")}
    adapter = write_adapter(tmp_path / "adapter", matrices, **config)
    refused(adapter, *MERGED, "--precision", "int4", named=("BertForSequenceClassification", "fp32 or fp16"))


def seq2seq_adapter(folder: Path, base: Any) -> Path:
    base.save_pretrained(folder / "base")
    save_tokenizer(folder / "base")
    config = {"task_type": "SEQ_2_SEQ_LM", "base_model_name_or_path": str(folder / "base")}
    return write_adapter(folder / "adapter", {"anything": (torch.ones(2, 32), torch.ones(32, 2))}, **config)


def test_t5_without_a_cache_is_refused(tmp_path: Path, refused: Refused) -> None:
    adapter = seq2seq_adapter(tmp_path, tiny_t5())
    refused(adapter, *MERGED, "--no-cache", named=("--no-cache is for decoder models", "t5"))


def test_experts_in_a_graph_without_a_cache_are_refused(tmp_path: Path, refused: Refused) -> None:
    """The check computes them in float64, which only one of transformers' implementations does."""
    base = tmp_path / "base"
    tiny_moe().save_pretrained(base)
    save_tokenizer(base)
    tiny_lora(base, tmp_path / "in", target_modules=["k_proj"], rank_pattern={}, alpha_pattern={})
    refused(tmp_path / "in", *MERGED, "--no-cache", named=("torch.onnx.export cannot trace",))


def test_a_tokenizer_that_knows_no_text_is_no_endless_loop(tmp_path: Path) -> None:
    """Such as the empty one that transformers makes for a Qwen2 without files of a tokenizer."""
    tiny_decoder("Qwen2", vocab_size=VOCABULARY).save_pretrained(tmp_path / "base")
    tiny_lora(tmp_path / "base", tmp_path / "in")
    assert export(tmp_path / "in", tmp_path / "out", *MERGED, "--no-cache") == 0


def test_encoder_decoder_models_other_than_t5_are_refused(tmp_path: Path, refused: Refused) -> None:
    refused(seq2seq_adapter(tmp_path, tiny_bart()), *MERGED, named=("'bart'", "t5, mt5, umt5"))


# Files of the adapter


def changed(change: Callable[[dict[str, Tensor]], object]) -> Damage:
    return lambda folder: edit_tensors(folder / TENSORS, change)


def cut(folder: Path) -> None:
    content = (folder / TENSORS).read_bytes()
    (folder / TENSORS).write_bytes(content[: len(content) // 2])


WRONG_ADAPTERS: dict[str, tuple[Damage, tuple[str, ...]]] = {
    "cut off": (cut, (TENSORS,)),
    "no tensors": (lambda folder: (folder / TENSORS).unlink(), (TENSORS, "no such file")),
    "a bias of a LoRA": (
        changed(lambda found: found.update({Q_B.replace("weight", "bias"): torch.ones(64)})),
        (TENSORS, "lora_B.bias"),
    ),
    "a tensor of nothing": (
        changed(lambda found: found.update({"base_model.model.nothing.weight": torch.ones(2)})),
        (TENSORS, "nothing.weight"),
    ),
    "a module listed twice": (
        changed(
            lambda found: found.update(
                {
                    f"base_model.model.{MODULE}.lora_embedding_A": torch.ones(4, 64),
                    f"base_model.model.{MODULE}.lora_embedding_B": torch.ones(64, 4),
                }
            )
        ),
        (TENSORS, MODULE, "listed twice"),
    ),
    "DoRA": (config(use_dora=True), ("use_dora",)),
    "an unknown field": (config(use_future_lora=True), ("use_future_lora", "does not know")),
    "trained tokens": (config(trainable_token_indices=[3]), ("trainable_token_indices", "in full")),
}


@pytest.mark.parametrize("case", WRONG_ADAPTERS)
@pytest.mark.parametrize("mode", MODES)
def test_a_wrong_adapter_is_named(mode: str, case: str, source: Path, refused: Refused) -> None:
    damage, named = WRONG_ADAPTERS[case]
    damage(source)
    refused(source, "--mode", mode, named=(str(source), *named))


def test_swappable_takes_no_embedding(made: OnnxMade, tmp_path: Path, refused: Refused) -> None:
    tiny_lora(made.base, tmp_path / "a", target_modules=["embed_tokens", "q_proj"])
    message = refused(tmp_path / "a", *SWAPPABLE)
    assert "embed_tokens" in message
    assert "--mode merged" in message


def test_swappable_takes_no_other_parameters(made: OnnxMade, tmp_path: Path, refused: Refused) -> None:
    tiny_lora(made.base, tmp_path / "a", modules_to_save=["norm"])
    refused(tmp_path / "a", *SWAPPABLE, named=("norm.weight", "--mode merged"))
