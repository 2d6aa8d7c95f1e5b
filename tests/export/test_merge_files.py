"""Merges from file to file: shards and other files, what rounding erases, and what is not published."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlavaForConditionalGeneration

from loraover.adapters.numerics.delta import Delta
from loraover.common.command_line import run
from loraover.common.errors import ExportError
from loraover.common.reporter import Reporter
from loraover_export import merge_adapter
from loraover_export.cli import cli
from loraover_export.merge import arithmetic
from loraover_export.merge.arithmetic import NF4, Lost, four_bits, lost_by_four_bits

from strategies import normal
from support.adapters_on_disk import save_base, save_lora, save_shards
from support.faults import Rounding
from support.make_checkpoint import edit_json, edit_tensors, tree
from support.merge_cases import deltas, long, outputs, save, shards
from support.tiny_experts import tiny_moe
from support.tiny_llava import save_llava
from support.tiny_models import tiny_llama, with_lora
from tolerances import UNIT

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return save_shards(tmp_path)


def test_shards_and_other_files_come_along(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = pair
    left = ("attestation.json", "model.sig", "pytorch_model.bin")
    for name in left:
        (base / name).write_text("{}")
    report = merge_adapter(adapter, tmp_path / "merged")
    out = tmp_path / "merged"
    index = json.loads((out / "model.safetensors.index.json").read_text())
    names = sorted(path.name for path in base.glob("*.safetensors"))
    assert len(names) > 2
    assert sorted(path.name for path in out.glob("*.safetensors")) == names
    for name in names:
        assert set(load_file(out / name)) == {key for key, place in index["weight_map"].items() if place == name}
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in shards(out).values())
    assert (out / "tokenizer.json").read_text() == "{}"
    assert not [name for name in left if (out / name).exists()]
    assert (out / "generation_config.json").read_bytes() == (base / "generation_config.json").read_bytes()
    assert json.loads((out / "merge_certificate.json").read_text()) == report.model_dump(mode="json")
    assert f"loraover export merge {adapter} -o {out}" in (out / "README.md").read_text()
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert torch.equal(model.model.embed_tokens.weight, AutoModelForCausalLM.from_pretrained(base).lm_head.weight)


@pytest.mark.parametrize("name", ["model-00001-of-00001.safetensors", "model.safetensors"])
def test_transformers_loads_the_merge_of_a_single_file(name: str, tmp_path: Path) -> None:
    """A shard that an index alone finds, and a file that transformers takes before the index and shards beside it."""
    base = save_base(tmp_path / "base")
    adapter = save_lora(base, tmp_path / "adapter", target_modules=["q_proj"])
    tiny_llama(seed=5).save_pretrained(tmp_path / "older", max_shard_size="8KB")
    for file in (tmp_path / "older").glob("model*"):
        shutil.copyfile(file, base / file.name)
    if name != "model.safetensors":
        for file in base.glob("model-*"):
            file.unlink()
        (base / "model.safetensors").rename(base / name)
        places = dict.fromkeys(load_file(base / name), name)
        edit_json(base / "model.safetensors.index.json", lambda index: index.update(weight_map=places))
    merge_adapter(adapter, tmp_path / "merged")
    expected = outputs(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter)))
    found = outputs(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    assert float((found - expected).abs().max()) <= 64 * UNIT[torch.float32] * float(expected.abs().max())


def test_a_file_without_the_prefix_of_the_headless_model(tmp_path: Path) -> None:
    """As in the first GPT-2's file on the hub, whose keys begin with "h." and not with "transformer.h."."""
    saved = save("Conv1D", tmp_path)
    expected = outputs(saved.peft)
    edit_tensors(
        tmp_path / "base" / "model.safetensors",
        lambda found: [found.update({key.removeprefix("transformer."): found.pop(key)}) for key in list(found)],
    )
    merge_adapter(saved.adapter, tmp_path / "merged", model=tmp_path / "base")
    assert all(not key.startswith("transformer.") for key in shards(tmp_path / "merged"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert float((outputs(model) - expected).abs().max()) <= 64 * UNIT[torch.float32] * float(expected.abs().max())


@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], ["lm_head", "fc1"]], ids=str)
def test_files_with_the_names_of_an_earlier_transformers(targets: list[str], tmp_path: Path) -> None:
    """transformers 5 saves LLaVA by the names of version 4, and renames its tensors as it loads them."""
    base = save_llava(tmp_path / "base")
    model = LlavaForConditionalGeneration.from_pretrained(base)
    assert not shards(base).keys() & dict(model.named_parameters()).keys()
    with_lora(model, target_modules=targets).save_pretrained(tmp_path / "adapter")
    plain = LlavaForConditionalGeneration.from_pretrained(base)
    before, expected = outputs(plain), outputs(PeftModel.from_pretrained(plain, tmp_path / "adapter"))
    assert merge_adapter(tmp_path / "adapter", tmp_path / "merged", model=base).passed
    assert shards(tmp_path / "merged").keys() == shards(base).keys()
    found = outputs(LlavaForConditionalGeneration.from_pretrained(tmp_path / "merged"))
    allowed = 64 * UNIT[torch.float32] * float(expected.abs().max())
    assert float((found - expected).abs().max()) <= allowed
    assert float((found - before).abs().max()) > 100 * allowed


def test_tensors_that_transformers_makes_of_others_are_merged_once_saved_as_it_has_them(tmp_path: Path) -> None:
    base = tmp_path / "base"
    tiny_moe().save_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    with_lora(model, target_modules=["q_proj"], modules_to_save=["experts"]).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ExportError, match=r"save_pretrained\(\.\.\., save_original_format=False\)"):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged", model=base)
    plain = AutoModelForCausalLM.from_pretrained(base)
    plain.save_pretrained(tmp_path / "saved", save_original_format=False)
    assert merge_adapter(tmp_path / "adapter", tmp_path / "merged", model=tmp_path / "saved").passed
    expected = outputs(PeftModel.from_pretrained(plain, tmp_path / "adapter"))
    found = outputs(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    assert float((found - expected).abs().max()) <= 64 * UNIT[torch.float32] * float(expected.abs().max())


def test_small_deltas_are_said_to_be_erased(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """The shares, by NumPy from the files: in bfloat16, most of a small delta changes no element."""
    base, adapter = pair
    edit_json(adapter / CONFIG, lambda config: config.update(lora_alpha=config["lora_alpha"] / 1024))
    report = merge_adapter(adapter, tmp_path / "merged")
    before, after, expected = shards(base), shards(tmp_path / "merged"), deltas(adapter)
    total = error = erased = 0.0
    for weight in report.weights:
        module = weight.matrix.name.removesuffix(".weight")
        old = before.get(weight.matrix.name, before["model.embed_tokens.weight"])
        new, delta = after[weight.matrix.name], expected[module]
        kept = long(new) - long(old)
        share = float((delta[kept == 0] ** 2).sum() / (delta**2).sum())
        assert weight.stored.erased == pytest.approx(share, rel=1e-9)
        size = float(np.sqrt((delta**2).sum()))
        assert weight.stored.error == pytest.approx(float(np.sqrt(((kept - delta) ** 2).sum())) / size, rel=1e-9)
        total, erased = total + float((delta**2).sum()), erased + float((delta[kept == 0] ** 2).sum())
        error += float(((kept - delta) ** 2).sum())
    assert report.stored.erased == pytest.approx(erased / total, rel=1e-9)
    assert report.stored.error == pytest.approx((error / total) ** 0.5, rel=1e-9)
    assert 0.1 < report.stored.erased < 0.9
    assert 0.01 < report.four_bit.erased < 0.9 < report.four_bit.error


def test_every_row_counts_where_some_are_tried() -> None:
    """A tall weight of equal rows loses much, and a low one little: the sample has to weigh them by their heights."""

    def lost(height: int, seed: int, size: float) -> Lost:
        row, a = normal(seed, 1, 64), normal(seed + 2, 1, 64)
        delta = Delta.of_factors("m", False, torch.full((height, 1), size, dtype=torch.float64), a)
        return lost_by_four_bits(row.expand(height, 64), delta)

    sampled, whole = Lost(), Lost()
    for height, seed, size in ((2000, 1, 1e-3), (100, 2, 1.0)):
        sampled.add(lost(height, seed, size))
        one = lost(1, seed, size)
        for _ in range(height):
            whole.add(one)
    found, expected = sampled.result(), whole.result()
    assert found.erased == pytest.approx(expected.erased, rel=1e-9)
    assert found.error == pytest.approx(expected.error, rel=1e-9)
    assert 1e-6 < expected.erased < expected.error < 1


def test_the_quantiser_is_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    weight = normal(1, 6, 192, dtype=torch.float32)
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    theirs = functional.dequantize_4bit(packed, state)
    allowed = 4 * UNIT[torch.float32] * float(weight.abs().max())
    assert float((four_bits(weight.double()) - theirs.double()).abs().max()) <= allowed
    assert len(NF4) == 16


def test_four_bits_of_rows_that_no_block_divides() -> None:
    weight = normal(2, 3, 70)
    found = four_bits(weight)
    assert torch.equal(found[:, :64], four_bits(weight[:, :64]))
    assert torch.equal(found[:, 64:], four_bits(weight[:, 64:]))
    assert not four_bits(torch.zeros(2, 5, dtype=torch.float64)).any()


def test_an_infinite_limit_of_the_base_is_kept(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """As time_step_limit of models with a state space."""
    limit = [0.0, float("inf")]
    edit_json(pair[0] / "config.json", lambda config: config.update(time_step_limit=limit))
    merge_adapter(pair[1], tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["time_step_limit"] == limit


def test_a_wrong_weight_is_not_published(
    pair: tuple[Path, Path], tmp_path: Path, wrong_rounding: Rounding, capsys: pytest.CaptureFixture[str]
) -> None:
    """One element, two units in the last place."""

    def wrong(weight: Tensor) -> Tensor:
        weight[1, 2] = torch.nextafter(torch.nextafter(weight[1, 2], 9 + 0 * weight[1, 2]), 9 + 0 * weight[1, 2])
        return weight

    before = tree(tmp_path)
    wrong_rounding(wrong, (arithmetic, "round_nearest"))
    assert run(cli, ["merge", str(pair[1]), "-o", str(tmp_path / "out")]) == 1
    assert "nothing was written" in capsys.readouterr().out
    assert tree(tmp_path) == before


def test_one_tensor_is_in_memory(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """A changed weight has been written before the next one is read, the untied head among them."""
    sizes: list[int] = []

    class Watching(Reporter):
        @contextmanager
        def task(self, label: str, total: int) -> Iterator[Callable[[int], None]]:
            yield lambda done: sizes.append(sum(path.stat().st_size for path in tmp_path.glob(".merged.*.tmp/*.safe*")))

    merge_adapter(pair[1], tmp_path / "merged", report=Watching())
    assert len(set(sizes)) > 4
    assert sizes == sorted(sizes)
