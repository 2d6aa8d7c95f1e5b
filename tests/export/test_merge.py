"""Weights with their delta, against NumPy in extended precision and against PEFT's own model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from loraover import LoraOverConfig, read_checkpoint
from loraover.checkpoint.peft_adapter import read_adapter_dir
from loraover.common.errors import CheckpointError, FoldError
from loraover.reference.unfolded_model import unfolded
from loraover_export import merge_adapter
from loraover_export.merge import arithmetic
from loraover_export.merge.in_memory import merge
from loraover_export.numerics.rounding import round_nearest

from support.make_checkpoint import LINEAR, edit_tensors, logits, make_checkpoint, oracle_matrices
from support.merge_cases import CASES, deltas, long, outputs, save
from support.plain_adapter import write_adapter
from support.tiny_models import tiny_gpt2, tiny_llama
from tolerances import UNIT


@pytest.mark.parametrize("name", CASES)
def test_every_weight_is_the_oracles_sum_rounded_once(name: str, tmp_path: Path) -> None:
    saved = save(name, tmp_path)
    model, before = saved.base(), saved.base()
    certificates = merge(model, read_adapter_dir(saved.adapter))
    expected = deltas(saved.adapter)
    assert [c.name for c in certificates] == [f"{module}.weight" for module in expected]
    assert all(c.passed for c in certificates)
    stored = load_file(saved.adapter / "adapter_model.safetensors")
    others = {k.removeprefix("base_model.model.").replace(".base_layer.", "."): v for k, v in stored.items()}
    old, new = (dict(m.named_parameters(remove_duplicate=False)) for m in (before, model))
    assert old.keys() == new.keys()
    changed = {f"{module}.weight": delta for module, delta in expected.items()}
    unit = UNIT[saved.case.dtype]
    for key, weight in new.items():
        assert weight.dtype == saved.case.dtype
        start = others[key] if key in others else old[key]
        if key not in changed:
            assert torch.equal(weight, start), key
            continue
        module = before.get_submodule(key.removesuffix(".weight"))
        delta = changed[key].T if isinstance(module, Conv1D | nn.Embedding) else changed[key]
        truth = long(start) + delta
        allowed = unit * abs(truth) * (1 + 1e-6) + np.longdouble(2.0**-25) * (saved.case.dtype == torch.float16) + 1e-16
        assert bool((abs(long(weight) - truth) <= allowed).all()), key
        assert float(np.linalg.norm(delta.astype(np.float64))) > 1e-3, key
    assert not others.keys() - new.keys() - {k for k in others if "lora_" in k}


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.dtype == torch.float32])
def test_the_merged_model_is_pefts(name: str, tmp_path: Path) -> None:
    """Its outputs are those of PEFT's unmerged model, after being saved and loaded too."""
    saved = save(name, tmp_path)
    model = saved.base()
    expected, base = outputs(saved.peft), outputs(model)
    merge(model, read_adapter_dir(saved.adapter))
    model.save_pretrained(tmp_path / "merged")
    allowed = 64 * UNIT[torch.float32] * float(expected.abs().max())
    for merged in (model, saved.case.auto.from_pretrained(tmp_path / "merged")):
        assert float((outputs(merged) - expected).abs().max()) <= allowed
    assert float((base - expected).abs().max()) > 1000 * allowed


@pytest.mark.parametrize("name", ["embedding", "tied embedding", "tied head", "tied, both"])
def test_changed_base_weights_reach_all_that_is_tied(name: str, tmp_path: Path) -> None:
    """PEFT loads them into the parameter that the embedding and the head share."""
    saved = save(name, tmp_path)

    def change(found: dict[str, Tensor]) -> None:
        for key in (key for key in found if key.endswith(".base_layer.weight")):
            found[key][7] += 1

    edit_tensors(saved.adapter / "adapter_model.safetensors", change)
    expected = outputs(PeftModel.from_pretrained(saved.base(), saved.adapter).eval())
    model = saved.base()
    with unfolded(model, read_adapter_dir(saved.adapter)) as whole:
        found = [outputs(whole)]
    merge(model, read_adapter_dir(saved.adapter))
    assert merge_adapter(saved.adapter, tmp_path / "files", model=saved.folder / "base").passed
    found += [outputs(model), outputs(AutoModelForCausalLM.from_pretrained(tmp_path / "files"))]
    for logits_ in found:
        assert float((logits_ - expected).abs().max()) <= 64 * UNIT[torch.float32] * float(expected.abs().max())


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.dtype == torch.float32])
def test_the_unfolded_model_is_pefts_and_the_base_model_is_left_as_it_was(name: str, tmp_path: Path) -> None:
    saved = save(name, tmp_path)
    model = saved.base()
    before, expected = outputs(model), outputs(saved.peft)
    with unfolded(model, read_adapter_dir(saved.adapter)) as whole:
        assert float((outputs(whole) - expected).abs().max()) <= 64 * UNIT[torch.float32] * float(expected.abs().max())
    assert torch.equal(outputs(model), before)


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("tied")])
def test_the_configuration_says_whether_weights_are_tied(name: str, tmp_path: Path) -> None:
    saved = save(name, tmp_path)
    model = saved.base()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    merge(model, read_adapter_dir(saved.adapter))
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings == tied == (name == "tied, both saved alike")


@pytest.mark.parametrize("name", ["linear", "Conv1D", "embedding", "saved norm"])
def test_peft_merges_to_the_same_weights_but_for_its_own_rounding(name: str, tmp_path: Path) -> None:
    saved = save(name, tmp_path)
    model = saved.base()
    merge(model, read_adapter_dir(saved.adapter))
    theirs = dict(saved.peft.merge_and_unload().named_parameters())
    for key, weight in model.named_parameters():
        # the product in float32, r = 4 at most and the scaling; then the sum: all terms are below 2
        assert float((weight - theirs[key]).abs().max()) <= 16 * UNIT[torch.float32], key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_checkpoint_is_merged_from_its_cores(dtype: torch.dtype, tmp_path: Path) -> None:
    config = LoraOverConfig(decomposition="chain", seed=5)
    made = make_checkpoint(tmp_path, config=config, dtype=dtype, target_modules=LINEAR)
    model, before = (AutoModelForCausalLM.from_pretrained(made.base, dtype=dtype) for _ in range(2))
    certificates = merge(model, read_checkpoint(made.path))
    assert all(c.passed and c.over_parameterised for c in certificates)
    exact = oracle_matrices(made.path, np.longdouble)
    for name in (certificate.name.removesuffix(".weight") for certificate in certificates):
        a, b = (exact[f"base_model.model.{name}.lora_{matrix}.weight"] for matrix in "AB")
        truth = long(before.get_submodule(name).weight) + 2 * (b @ a)
        error = abs(long(model.get_submodule(name).weight) - truth)
        assert bool((error <= UNIT[dtype] * abs(truth) * (1 + 1e-6) + 1e-15).all()), name
    if dtype == torch.float32:
        assert float((logits(model) - made.logits()).abs().max()) < 1e-6


MUTANTS: dict[str, Callable[[Tensor], Tensor]] = {
    "one element": lambda weight: weight.index_put((torch.tensor(1), torch.tensor(2)), weight[1, 2] * (1 + 2.0**-21)),
    "truncated to bfloat16": lambda weight: weight.bfloat16().to(weight.dtype),
    "a row lost": lambda weight: weight.index_fill(0, torch.tensor(3), 0.0),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_certificates_reject_a_wrong_weight(mutant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = save("linear", tmp_path)
    monkeypatch.setattr(arithmetic, "round_nearest", lambda value, dtype: MUTANTS[mutant](round_nearest(value, dtype)))
    assert not any(c.passed for c in merge(saved.base(), read_adapter_dir(saved.adapter)))


WRONG_BASES: dict[str, Callable[[], Any]] = {
    "narrower": lambda: tiny_llama(hidden_size=16),
    "fewer layers": lambda: tiny_llama(num_hidden_layers=1),
    "another architecture": tiny_gpt2,
}


@pytest.mark.parametrize("case", WRONG_BASES)
def test_another_base_model_is_named(case: str, tmp_path: Path) -> None:
    saved = save("linear", tmp_path)
    with pytest.raises(CheckpointError, match=r"layers\.\d.*--model"):
        merge(WRONG_BASES[case](), read_adapter_dir(saved.adapter))


def test_a_parameter_that_fits_nothing_changes_nothing(tmp_path: Path) -> None:
    saved = save("saved norm", tmp_path)

    def widen(tensors: dict[str, Tensor]) -> None:
        tensors["base_model.model.model.norm.weight"] = torch.ones(33)

    edit_tensors(saved.adapter / "adapter_model.safetensors", widen)
    model, before = saved.base(), saved.base()
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight fits no parameter"):
        merge(model, read_adapter_dir(saved.adapter))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))


def test_a_weight_beyond_its_range_is_refused(tmp_path: Path) -> None:
    a, b = torch.full((1, 32), 1e3), torch.full((32, 1), 1e3)
    adapter = write_adapter(tmp_path / "a", {"model.layers.0.self_attn.q_proj": (a, b)})
    with pytest.raises(FoldError, match="float16"):
        merge(tiny_llama().half(), read_adapter_dir(adapter))
