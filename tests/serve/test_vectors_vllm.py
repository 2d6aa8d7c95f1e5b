"""The real vLLM serves vectors and classes with adapters of several kinds: right ones pass, faults are named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoHaConfig, LoraConfig, get_peft_model

from loraover import LoraOverConfig, OverParameterization, write_checkpoint
from loraover.adapters.convert.run import convert_adapter
from loraover_export import fold_checkpoint
from loraover_serve import EngineResult, record_adapter, verify_adapter
from loraover_serve.judge.names import FLIPPED, LEAKS, NOT_APPLIED, POOLING, PREFIX, SCALED

from support.make_checkpoint import SERVABLE, edit_tensors
from support.tiny_hub import tiny_tokenizer
from support.tiny_models import fill_b, tiny_llama
from support.vllm_command import leaks_in_mixed_batches, vllm_command
from support.vllm_pooling import vllm_pooling

pytestmark = [pytest.mark.engine, pytest.mark.matrix]

RIGHT = ("lora", "loha", "over")
"""Adapters that are served as trained: a LoRA, a LoHa that was converted, and a checkpoint that was folded."""
TARGETS = ["q_proj", "v_proj", "down_proj"]


@dataclass(frozen=True)
class Kind:
    """A task with its model in transformers, and with what vLLM is told.

    Args:
        within: Largest distance from 1 of a right adapter's strength.
    """

    task: str
    auto: str
    convert: str
    dtype: str = "float32"
    within: float = 0.002


KINDS = {
    "vectors": Kind("FEATURE_EXTRACTION", "AutoModelForCausalLM", "embed"),
    "vectors in bfloat16": Kind("FEATURE_EXTRACTION", "AutoModelForCausalLM", "embed", "bfloat16", 0.04),
    "classes": Kind("SEQ_CLS", "AutoModelForSequenceClassification", "classify"),
    "classes in bfloat16": Kind("SEQ_CLS", "AutoModelForSequenceClassification", "classify", "bfloat16", 0.04),
}


@dataclass(frozen=True)
class Served:
    """A running server, with the folders of the base model and of each adapter."""

    kind: Kind
    url: str
    base: Path
    folder: Path


def save_base(folder: Path, kind: Kind) -> Path:
    """A tiny Llama that vLLM takes, with a head for three classes if it has any."""
    config = tiny_llama(max_position_embeddings=256, **SERVABLE).config
    if kind.task == "SEQ_CLS":
        config.id2label = dict(enumerate(("good", "bad", "odd")))
        config.label2id = {label: index for index, label in config.id2label.items()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = getattr(transformers, kind.auto).from_config(config)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.15)
    model.eval().save_pretrained(folder)
    tiny_tokenizer(adds="$A </s>").save_pretrained(folder)
    return folder


def adapted(base: Path, kind: Kind, config: Any, seed: int) -> Any:
    model = getattr(transformers, kind.auto).from_pretrained(base)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        found = get_peft_model(model, config)
        if isinstance(config, LoraConfig):
            fill_b(found, seed)
        else:
            for name, parameter in found.named_parameters():
                if "hada" in name:
                    torch.nn.init.normal_(parameter, std=0.4)
    return found


def without_head(folder: Path) -> Path:
    """The adapter alone: PEFT saves the head of a classifier with it, which was not trained here."""
    edit_tensors(
        folder / "adapter_model.safetensors", lambda found: [found.pop(key) for key in list(found) if "score" in key]
    )
    return changed(folder, modules_to_save=None)


def changed(folder: Path, **fields: Any) -> Path:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    return folder


def save_adapters(folder: Path, base: Path, kind: Kind) -> dict[str, Path]:
    """The right adapters, and those that are served in place of the LoRA."""
    options: dict[str, Any] = {"r": 4, "target_modules": TARGETS, "task_type": kind.task}
    for name, seed in (("lora", 1), ("other", 7)):
        adapted(base, kind, LoraConfig(lora_alpha=8, **options), seed).save_pretrained(folder / name)
        without_head(folder / name)
    for name, alpha in (("half", 4), ("idle", 1e-9)):
        changed(shutil.copytree(folder / "lora", folder / name), lora_alpha=alpha)
    adapted(base, kind, LoHaConfig(alpha=8, **options), 2).save_pretrained(folder / "loha-trained")
    without_head(folder / "loha-trained")
    convert_adapter(folder / "loha-trained", folder / "loha", model=str(base))
    model = adapted(base, kind, LoraConfig(lora_alpha=8, **options), 3)
    model.save_pretrained(folder / "over-trained")
    without_head(folder / "over-trained")
    write_checkpoint(folder / "over-trained", OverParameterization(model, LoraOverConfig(seed=5)), step=0)
    fold_checkpoint(folder / "over-trained", folder / "over")
    return {name: folder / name for name in (*RIGHT, "other", "half", "idle")}


@pytest.fixture(scope="module", params=KINDS)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    vllm_command()  # skips the tests before anything is made
    kind, folder = KINDS[request.param], tmp_path_factory.mktemp("served")
    base = save_base(folder / "base", kind)
    adapters = save_adapters(folder, base, kind)
    options = ("--convert", kind.convert, "--dtype", kind.dtype)
    with vllm_pooling(base, adapters, folder / "vllm.log", options) as url:
        yield Served(kind, url, base, folder)


def verified(served: Served, recorded: str, served_name: str, **options: Any) -> EngineResult:
    """The verdict by the reference of an adapter on answers under a name."""
    file = served.folder / f"{recorded}-{'-'.join(options) or 'right'}.json.gz"
    if not file.is_file():
        record_adapter(served.folder / recorded, model=str(served.base), device="cpu", output=file, **options)
    asked: dict[str, Any] = {"endpoint": served.url, "served_name": (served_name,), "base_name": str(served.base)}
    return verify_adapter(references=(file,), **asked).engines[0]


@pytest.mark.parametrize("name", RIGHT)
def test_vllm_serves_an_adapter_as_trained(name: str, served: Served) -> None:
    found = verified(served, "over-trained" if name == "over" else name, name)  # the checkpoint is recorded unfolded
    allowed = {("as trained", None)} | ({("differs", LEAKS)} if leaks_in_mixed_batches() else set())
    assert (found.verdict, found.fault) in allowed, found.reason
    assert found.strength is not None
    assert abs(found.strength.value - 1) < served.kind.within


PLANTED = {"idle": NOT_APPLIED, "half": SCALED, "other": None}


@pytest.mark.parametrize("name", PLANTED)
def test_another_adapter_under_the_name_is_found(name: str, served: Served) -> None:
    found = verified(served, "lora", name)
    assert (found.verdict, found.fault) == ("differs", PLANTED[name]), found.reason


def test_the_base_model_under_the_name_is_found(served: Served) -> None:
    assert verified(served, "lora", str(served.base)).fault == NOT_APPLIED


READ_OTHERWISE: dict[str, tuple[dict[str, Any], str]] = {
    "prefix": ({"prefix": "query: "}, PREFIX),
    "pooling": ({"pooling": "mean"}, POOLING),
    "length": ({"normalised": False}, FLIPPED),
}


def test_another_way_to_compute_both_models_is_named(served: Served) -> None:
    """The model was trained with another prefix, pooling or length than vLLM's; classes have a prefix only."""
    names = ["prefix"] if served.kind.task == "SEQ_CLS" else [*READ_OTHERWISE]
    for options, fault in map(READ_OTHERWISE.__getitem__, names):
        found = verified(served, "lora", "lora", **options)
        assert (found.verdict, found.fault) == ("differs", fault), found.reason
