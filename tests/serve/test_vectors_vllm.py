"""The real vLLM: vectors, classes and scores of adapters in each form, with planted faults."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model

from loraover import LoraOverConfig, OverParameterization, write_checkpoint
from loraover_export import convert_adapter, fold_checkpoint
from loraover_serve import EngineResult, record_adapter, verify_adapter
from loraover_serve.vllm.server import VllmServerConfig

from support.plain_adapter import tiny_decoder
from support.tiny_hub import tiny_tokenizer
from support.vector_server import CLASSES
from support.vllm_command import leaks_in_mixed_batches
from support.vllm_loading import FEW_BLOCKS, serving_loader

pytestmark = [pytest.mark.engine, pytest.mark.matrix]

LEAKS = "adapter leaks into the base model's answers in a mixed batch"
CHANGED = "the adapter's answers change in a mixed batch"
EMBED, CLASSIFY = "FEATURE_EXTRACTION", "SEQ_CLS"
POOLING = ("--runner", "pooling", "--enable-lora", "--max-lora-rank", "8", "--max-loras", "2", "--enforce-eager")
KINDS = ("lora", "loha", "folded")


def save_base(folder: Path, labels: tuple[str, ...] = ()) -> Path:
    """Save a tiny Llama that vLLM serves, with a head for the labels; its inputs matter."""
    config = tiny_decoder("Llama").config
    config.max_position_embeddings = 256
    task = CLASSIFY if labels else EMBED
    if labels:
        config.id2label, config.pad_token_id = dict(enumerate(labels)), 0
        config.label2id = {label: index for index, label in enumerate(labels)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        auto = CLASSES[task] if labels else "AutoModelForCausalLM"
        model = getattr(transformers, auto).from_config(config)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.12)
    model.eval().save_pretrained(folder)
    tiny_tokenizer(adds="$A </s>").save_pretrained(folder)
    return folder


def save_kind(base: Path, folder: Path, task: str, kind: str, **options: Any) -> Path:
    """Save a LoRA, a LoHa that is converted, or a LoRA-Over checkpoint that is folded; return its folder."""
    plain, targets = folder.with_name(f"{folder.name}-trained"), ["q_proj", "v_proj", "down_proj"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = getattr(transformers, CLASSES[task]).from_pretrained(base)
        config: Any = LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type=task, **options)
        if kind == "loha":
            config = LoHaConfig(r=2, alpha=4, target_modules=targets, task_type=task, **options)
        adapted: PeftModel = get_peft_model(model, config)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_B" in name or "hada_" in name:
                    parameter.normal_(std=0.3 if "hada_" in name else 0.1)
                if "modules_to_save" in name:
                    parameter.add_(0.1 * torch.randn(parameter.shape))
    adapted.save_pretrained(plain)
    if kind == "loha":
        convert_adapter(plain, folder, model=str(base))
    elif kind == "folded":
        write_checkpoint(plain, OverParameterization(adapted, LoraOverConfig(seed=5)), step=0)
        fold_checkpoint(plain, folder)
    else:
        plain.rename(folder)
    return folder


@contextmanager
def serving_vectors(base: Path, adapters: dict[str, Path], log: Path, *options: str) -> Iterator[str]:
    """The address of a vLLM that serves adapters of a model of vectors or classes."""
    loaded = [json.dumps({"name": name, "path": str(path)}) for name, path in adapters.items()]
    words = (*POOLING, *FEW_BLOCKS, "--max-model-len", "256", "--lora-modules", *loaded, *options)
    with serving_loader(VllmServerConfig(str(base), options=words), log) as server:
        yield server.url


def checked(url: str, adapter: Path, base: Path, name: str, **more: Any) -> EngineResult:
    """The verdict on an adapter of a server, by its reference."""
    reference = adapter / "adapter_reference.json.gz"
    if not reference.is_file():
        record_adapter(adapter, model=str(base), device="cpu")
    report = verify_adapter(
        references=(reference,), endpoint=url, served_name=(name,), base_name=str(base), repeats=1, **more
    )
    return report.engines[0]


def assert_right(found: EngineResult) -> None:
    """As trained; a vLLM that leaks may show that too."""
    leaks = leaks_in_mixed_batches() and found.fault in (LEAKS, CHANGED)
    assert found.verdict == "as trained" or leaks, found.reason
    assert found.strength is not None
    assert abs(found.strength.value - 1) < 0.02


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_vllm_serves_vectors_of_each_kind_of_adapter(dtype: str, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    adapters = {kind: save_kind(base, tmp_path / kind, EMBED, kind) for kind in KINDS}
    with serving_vectors(base, adapters, tmp_path / "log", "--convert", "embed", "--dtype", dtype) as url:
        for kind, adapter in adapters.items():
            assert_right(checked(url, adapter, base, kind, without_mixed=True))
        mixed = checked(url, adapters["lora"], base, "lora")
        if not leaks_in_mixed_batches():
            assert_right(mixed)
        crossed = checked(url, adapters["lora"], base, "folded", without_mixed=True)
        assert crossed.verdict == "differs"
        absent = checked(url, adapters["lora"], base, str(base), without_mixed=True)
        assert absent.fault == "served as base"
    pooled = '{"pooling_type": "MEAN", "use_activation": true}'
    options = ("--convert", "embed", "--dtype", dtype, "--pooler-config", pooled)
    with serving_vectors(base, {"lora": adapters["lora"]}, tmp_path / "log", *options) as url:
        found = checked(url, adapters["lora"], base, "lora", without_mixed=True)
        assert (found.verdict, found.fault) == ("differs", "another pooling")


@pytest.mark.parametrize("labels", [("good", "bad", "odd"), ("relevant",)])
def test_vllm_serves_classes_and_scores(labels: tuple[str, ...], tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", labels)
    adapters = {
        "plain": save_kind(base, tmp_path / "plain", CLASSIFY, "lora"),
        "headed": save_kind(base, tmp_path / "headed", CLASSIFY, "lora", modules_to_save=["score"]),
    }
    with serving_vectors(base, adapters, tmp_path / "log", "--convert", "classify", "--dtype", "float32") as url:
        results = {name: checked(url, adapter, base, name, without_mixed=True) for name, adapter in adapters.items()}
        print({name: (found.verdict, found.fault, found.reason) for name, found in results.items()})
        absent = checked(url, adapters["plain"], base, str(base), without_mixed=True)
    assert_right(results["plain"])
    assert absent.fault == "served as base"
