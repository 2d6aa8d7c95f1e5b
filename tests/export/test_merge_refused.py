"""Base models and adapters that cannot be merged: one message, exit code 2, and nothing at the output."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from loraover.common.errors import FoldError
from loraover_export import merge_adapter

from support.adapters_on_disk import save_base, save_lora, save_shards
from support.make_checkpoint import edit_json, edit_tensors
from support.refusals import Refused
from support.tiny_models import tiny_llama


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return save_shards(tmp_path)


def queries(change: Callable[[Tensor], Tensor]) -> Callable[[Path], object]:
    """Change the query projections' weights in the base model's file."""
    return lambda folder: edit_tensors(
        folder / "model.safetensors",
        lambda found: found.update({k: change(v).contiguous() for k, v in found.items() if "q_proj" in k}),
    )


def renamed(folder: Path) -> None:
    edit_tensors(
        folder / "model.safetensors",
        lambda found: [found.update({key.replace("q_proj", "qkv"): found.pop(key)}) for key in list(found)],
    )


def truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def narrower(folder: Path) -> None:
    shutil.rmtree(folder)
    save_base(folder, lambda: tiny_llama(hidden_size=16))


def with_fields(**fields: Any) -> Callable[[Path], object]:
    return lambda folder: edit_json(folder / "config.json", lambda config: config.update(fields))


BASES: dict[str, tuple[Callable[[Path], object], str]] = {
    "text for a number": (with_fields(hidden_size="32"), "has no usable config.json"),
    "a number for a class": (with_fields(architectures=[3]), "names no architectures (found [3])"),
    "shorter": (
        queries(lambda weight: weight[:-1]),
        "(31, 32) in the files, and config.json makes it (32, 32)",
    ),
    "bitsandbytes": (
        with_fields(quantization_config={"quant_method": "bitsandbytes"}),
        "is quantised (bitsandbytes), and a sum would be rounded again",
    ),
    "weights in bytes": (
        queries(lambda weight: weight.to(torch.uint8)),
        "is U8, so the model is quantised",
    ),
    "other names": (renamed, "its files hold no tensor 'model.layers.0.self_attn.q_proj.weight'"),
    "pickles": (
        lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
        "it has pytorch_model.bin. Save it again with save_pretrained",
    ),
    "NaN": (queries(lambda weight: weight * float("nan")), "q_proj.weight holds NaN or infinity"),
    "truncated": (truncated, "not a complete safetensors file"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "has no usable config.json"),
    "narrower": (narrower, "features in the base model, but"),
}


@pytest.mark.parametrize("case", BASES)
def test_a_base_that_cannot_be_used(case: str, tmp_path: Path, refused: Refused) -> None:
    change, message = BASES[case]
    base = save_base(tmp_path / "base")
    adapter = save_lora(base, tmp_path / "adapter", target_modules=["q_proj"])
    change(base)
    refused("merge", adapter, named=(message,))


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, refused: Refused) -> None:
    """One of the adapter, or of the base model, that nobody can read from its start."""
    base = save_base(tmp_path / "base")
    adapter = save_lora(base, tmp_path / "adapter", target_modules=["q_proj"])
    (adapter / "loraover.safetensors").symlink_to("/proc/self/mem")
    for verb in ("merge", "convert"):
        refused(verb, adapter, named=(f"{adapter}: cannot be read: Input/output error",))
    (adapter / "loraover.safetensors").unlink()
    (base / "notes.txt").symlink_to("/proc/self/mem")
    refused("merge", adapter, named=("notes.txt: cannot be read: Input/output error",))


INDICES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no map": (lambda index: index.pop("weight_map"), "weight_map: Field required"),
    "lost": (
        lambda index: index["weight_map"].update(x="a.safetensors"),
        "'a.safetensors', which is not a safetensors",
    ),
    "outside": (lambda index: index["weight_map"].update(x="../a"), "names '../a', which is not a safetensors file"),
    "the folder": (lambda index: index["weight_map"].update(x=""), "names '', which is not a safetensors file"),
}


def test_an_index_or_shards_that_cannot_be_used(pair: tuple[Path, Path], refused: Refused) -> None:
    base, adapter = pair
    index = base / "model.safetensors.index.json"
    right = index.read_text()
    for change, message in INDICES.values():
        edit_json(index, change)
        refused("merge", adapter, named=(message,))
        index.write_text(right)
    one, other = sorted(base.glob("*.safetensors"))[:2]
    edit_tensors(other, lambda found: found.update(load_file(one)))  # one would keep the weight that should change
    refused("merge", adapter, named=("several of its files hold a tensor 'model.embed_tokens.weight'",))


def test_a_sum_beyond_the_base_models_type_names_the_weight(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", dtype=torch.float16)
    adapter = save_lora(base, tmp_path / "adapter", target_modules=["q_proj"], lora_alpha=1e9)
    words = r"layers\.0\.self_attn\.q_proj\.weight: an element .* float16 .* in bfloat16 or float32 first"
    with pytest.raises(FoldError, match=words):
        merge_adapter(adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


ADAPTERS: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"use_dora": True}, "use_dora"),
    "GGUF": ({"base_model_name_or_path": "./model-Q4_K_M.gguf"}, "is a GGUF file"),
}


@pytest.mark.parametrize("case", ADAPTERS)
def test_an_adapter_that_cannot_be_merged(case: str, tmp_path: Path, refused: Refused) -> None:
    fields, message = ADAPTERS[case]
    adapter = save_lora(save_base(tmp_path / "base"), tmp_path / "adapter", target_modules=["q_proj"])
    edit_json(adapter / "adapter_config.json", lambda config: config.update(fields))
    refused("merge", adapter, named=(message,))
