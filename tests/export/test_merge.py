"""Merges in memory and from file to file, against NumPy in extended precision and against PEFT's own model."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
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
from loraover.adapters.numerics.matrix_certificate import MatrixCertificate
from loraover.checkpoint.peft_adapter import read_adapter_dir
from loraover.common.errors import CheckpointError, ExportError
from loraover.reference import unfolded
from loraover_export import MergeReport, convert_adapter, merge_adapter
from loraover_export.merge.arithmetic import merge

from strategies import normal
from support.make_checkpoint import LINEAR, edit_tensors, make_checkpoint, oracle_matrices
from support.merge_cases import CASES, Saved, deltas, long, outputs, save, shards
from support.tiny_models import tiny_gpt2, tiny_llama
from tolerances import UNIT


@dataclass(frozen=True)
class Merged:
    """A base model with its adapter merged in memory, and from file to file."""

    saved: Saved
    model: Any
    certificates: list[MatrixCertificate]
    report: MergeReport

    @property
    def files(self) -> Path:
        return self.saved.folder / "files"


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Merged]:
    """Merges a case once, by its name."""

    @cache
    def make(name: str) -> Merged:
        saved = save(name, tmp_path_factory.mktemp("merged"))
        model = saved.base()
        certificates = merge(model, read_adapter_dir(saved.adapter))
        report = merge_adapter(saved.adapter, saved.folder / "files", model=saved.folder / "base")
        return Merged(saved, model, certificates, report)

    return make


@pytest.mark.parametrize("name", CASES)
def test_every_weight_is_the_oracles_sum_rounded_once(name: str, merged: Callable[[str], Merged]) -> None:
    found = merged(name)
    saved, before, expected = found.saved, found.saved.base(), deltas(found.saved.adapter)
    assert [c.name for c in found.certificates] == [f"{module}.weight" for module in expected]
    assert {weight.matrix.name for weight in found.report.weights} == {f"{module}.weight" for module in expected}
    assert all(c.passed for c in found.certificates)
    assert found.report.passed
    stored = load_file(saved.adapter / "adapter_model.safetensors")
    others = {k.removeprefix("base_model.model.").replace(".base_layer.", "."): v for k, v in stored.items()}
    old, new = (dict(m.named_parameters(remove_duplicate=False)) for m in (before, found.model))
    assert old.keys() == new.keys()
    assert not others.keys() - new.keys() - {k for k in others if "lora_" in k}
    files = shards(found.files)
    changed = {f"{module}.weight": delta for module, delta in expected.items()}
    assert changed.keys() <= files.keys() <= new.keys()
    assert found.report.tensors == len(files)
    unit = UNIT[saved.case.dtype]
    for key, weight in (*new.items(), *files.items()):
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


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.dtype == torch.float32])
def test_every_merged_model_is_pefts(name: str, merged: Callable[[str], Merged], tmp_path: Path) -> None:
    """In memory, saved and loaded, from files, and unfolded: outputs are those of PEFT's unmerged model."""
    found = merged(name)
    saved, auto = found.saved, found.saved.case.auto
    found.model.save_pretrained(tmp_path / "saved")
    from_files, info = auto.from_pretrained(found.files, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    expected, base = outputs(saved.peft), outputs(model := saved.base())
    logits_ = [outputs(each) for each in (found.model, auto.from_pretrained(tmp_path / "saved"), from_files)]
    with unfolded(model, read_adapter_dir(saved.adapter)) as whole:
        logits_.append(outputs(whole))
    allowed = 64 * UNIT[torch.float32] * float(expected.abs().max())
    assert all(float((each - expected).abs().max()) <= allowed for each in logits_)
    assert float((base - expected).abs().max()) > 1000 * allowed
    assert torch.equal(outputs(model), base)


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("tied")])
def test_weights_are_untied_where_they_differ(name: str, merged: Callable[[str], Merged]) -> None:
    found = merged(name)
    stays = name == "tied, both saved alike"
    model, config = found.model, json.loads((found.files / "config.json").read_text())
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == stays
    assert model.config.tie_word_embeddings == config["tie_word_embeddings"] == stays
    assert sorted(found.report.untied) == ([] if stays else ["lm_head.weight", "model.embed_tokens.weight"])


def assert_merged_as_peft_loads(saved: Saved) -> Tensor:
    """Outputs in memory, unfolded and from files are those of PEFT, which are returned."""
    expected = outputs(PeftModel.from_pretrained(saved.base(), saved.adapter).eval())
    model = saved.base()
    with unfolded(model, read_adapter_dir(saved.adapter)) as whole:
        found = [outputs(whole)]
    merge(model, read_adapter_dir(saved.adapter))
    files = saved.folder / "files"
    assert merge_adapter(saved.adapter, files, model=saved.folder / "base").passed
    found += [outputs(model), outputs(AutoModelForCausalLM.from_pretrained(files))]
    for logits_ in found:
        assert float((logits_ - expected).abs().max()) <= 64 * UNIT[torch.float32] * float(expected.abs().max())
    return expected


@pytest.mark.parametrize("name", ["embedding", "tied embedding", "tied head", "tied, both"])
def test_changed_base_weights_reach_all_that_is_tied(name: str, tmp_path: Path) -> None:
    """PEFT loads them into the parameter that the embedding and the head share."""
    saved = save(name, tmp_path)

    def change(found: dict[str, Tensor]) -> None:
        for key in (key for key in found if key.endswith(".base_layer.weight")):
            found[key][7] += 1

    edit_tensors(saved.adapter / "adapter_model.safetensors", change)
    assert_merged_as_peft_loads(saved)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("tied embedding", "lm_head"),
        ("tied head", "model.embed_tokens"),
        ("tied, saved head", "model.embed_tokens"),
        ("tied, saved embedding", "lm_head"),
        ("biases", "lm_head"),
    ],
)
def test_a_parameter_reaches_all_that_is_tied_and_has_no_copy(name: str, key: str, tmp_path: Path) -> None:
    """As PEFT writes embeddings whose rows were added: without `modules_to_save`, and one name of two that are tied."""
    saved = save(name, tmp_path)

    def change(found: dict[str, Tensor]) -> None:
        for copy in [key for key in found if key.endswith(".base_layer.weight")]:
            del found[copy]
        found[f"base_model.model.{key}.weight"] = normal(5, 64, 32, dtype=torch.float32)

    edit_tensors(saved.adapter / "adapter_model.safetensors", change)
    expected = assert_merged_as_peft_loads(saved)
    assert float((outputs(saved.peft) - expected).abs().max()) > 0.1 * float(expected.abs().max())


IGNORED = {
    "adapted weight": ("base_model.model.model.layers.0.self_attn.q_proj.weight", (32, 32)),
    "adapted bias": ("base_model.model.model.layers.1.self_attn.q_proj.bias", (32,)),
    "wrapper of no module": ("base_model.model.model.layers.0.self_attn.o_proj.base_layer.weight", (32, 32)),
    "wrapped twice": ("base_model.model.model.layers.0.self_attn.q_proj.base_layer.base_layer.weight", (32, 32)),
    "no prefix": ("model.norm.weight", (32,)),
    "half a prefix": ("base_model.model.norm.weight", (32,)),
}


@pytest.mark.parametrize("case", IGNORED)
def test_what_peft_ignores_is_refused(case: str, tmp_path: Path) -> None:
    key, shape = IGNORED[case]
    saved = save("biases", tmp_path)
    edit_tensors(
        saved.adapter / "adapter_model.safetensors",
        lambda found: found.update({key: normal(5, *shape, dtype=torch.float32)}),
    )
    assert torch.equal(outputs(PeftModel.from_pretrained(saved.base(), saved.adapter).eval()), outputs(saved.peft))
    model, before = saved.base(), saved.base()
    with pytest.raises(CheckpointError, match=re.escape(f"{key} ") + r"(is neither A nor B|fits no parameter)"):
        merge(model, read_adapter_dir(saved.adapter))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))
    with pytest.raises(CheckpointError, match=re.escape(f"{key} ")):
        merge_adapter(saved.adapter, tmp_path / "out", model=saved.folder / "base")
    assert not (tmp_path / "out").exists()


def test_no_merge_is_advised_of_what_peft_ignores(tmp_path: Path) -> None:
    saved, key = save("rslora, r = 1", tmp_path), "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight"
    edit_tensors(saved.adapter / "adapter_model.safetensors", lambda found: found.update({key: torch.ones(32, 32)}))
    with pytest.raises(ExportError, match=re.escape(key)) as caught:
        convert_adapter(saved.adapter, tmp_path / "out", model=saved.folder / "base")
    assert "export merge" not in str(caught.value)


def test_two_values_of_one_parameter_are_refused(tmp_path: Path) -> None:
    saved = save("tied embedding", tmp_path)
    keys = [f"base_model.model.{name}.weight" for name in ("lm_head", "model.embed_tokens.base_layer")]
    edit_tensors(
        saved.adapter / "adapter_model.safetensors",
        lambda found: found.update({key: normal(i, 64, 32, dtype=torch.float32) for i, key in enumerate(keys)}),
    )
    with pytest.raises(CheckpointError, match=r"lm_head\.weight and .*base_layer\.weight replace one parameter"):
        merge_adapter(saved.adapter, tmp_path / "out", model=saved.folder / "base")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_checkpoint_is_merged_from_its_cores(dtype: torch.dtype, tmp_path: Path) -> None:
    config = LoraOverConfig(decomposition="chain", seed=5)
    made = make_checkpoint(tmp_path, config=config, dtype=dtype, target_modules=LINEAR)
    model = AutoModelForCausalLM.from_pretrained(made.base, dtype=dtype)
    certificates = merge(model, read_checkpoint(made.path))
    report = merge_adapter(made.path, tmp_path / "merged", model=made.base)
    assert all(c.passed and c.over_parameterised for c in (*certificates, *(w.matrix for w in report.weights)))
    exact, before = oracle_matrices(made.path, np.longdouble), shards(made.base)
    for weights in (dict(model.named_parameters()), shards(tmp_path / "merged")):
        for name in (certificate.name.removesuffix(".weight") for certificate in certificates):
            a, b = (exact[f"base_model.model.{name}.lora_{matrix}.weight"] for matrix in "AB")
            truth = long(before[f"{name}.weight"]) + 2 * (b @ a)
            error = abs(long(weights[f"{name}.weight"]) - truth)
            assert bool((error <= UNIT[dtype] * abs(truth) * (1 + 1e-6) + 1e-15).all()), name


@pytest.mark.parametrize("base", [partial(tiny_llama, num_hidden_layers=1), tiny_gpt2], ids=["flat", "GPT-2"])
def test_another_base_model_is_named(base: Callable[[], Any], tmp_path: Path) -> None:
    saved = save("linear", tmp_path)
    with pytest.raises(CheckpointError, match=r"layers\.\d.*with model\."):
        merge(base(), read_adapter_dir(saved.adapter))


def test_a_parameter_that_fits_nothing_changes_nothing(tmp_path: Path) -> None:
    saved = save("saved norm", tmp_path)

    def widen(tensors: dict[str, Tensor]) -> None:
        tensors["base_model.model.model.norm.weight"] = torch.ones(33)

    edit_tensors(saved.adapter / "adapter_model.safetensors", widen)
    model, before = saved.base(), saved.base()
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight fits no parameter"):
        merge(model, read_adapter_dir(saved.adapter))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))
