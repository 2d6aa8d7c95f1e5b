"""Comparisons of two adapters, against NumPy on dense deltas and PEFT's own models."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from loraover.adapters.combine.diff import compare_deltas
from loraover.adapters.numerics.delta import Delta
from loraover.adapters.prompts import read_prompts
from loraover.checkpoint.exact_tensors import Exact
from loraover.common.command_line import run
from loraover.models.load import resolve_model
from loraover.reporting.svg import short
from loraover_export import diff_adapters
from loraover_export.cli import cli

from strategies import matrices, sizes
from support.adapters_on_disk import Array, deltas, save_base, save_lora
from support.make_checkpoint import edit_json, edit_tensors
from support.refusals import only_error
from support.speed import examples
from support.tiny_models import with_lora
from tolerances import UNIT

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model and adapters that tests only read."""
    folder = tmp_path_factory.mktemp("made")
    base = save_base(folder / "base")
    save_lora(base, folder / "one", 1)
    save_lora(base, folder / "other", 2, r=3, use_rslora=True, target_modules=["q_proj", "v_proj", "embed_tokens"])
    save_lora(base, folder / "head", 3, target_modules=["q_proj"], modules_to_save=["lm_head"])
    return folder


def spaces(delta: Array, rank: int) -> tuple[Array, Array]:
    u, _, vt = np.linalg.svd(delta)
    return u[:, :rank], vt[:rank].T


def test_norms_differences_and_angles(made: Path) -> None:
    report = diff_adapters(made / "one", made / "other")
    one, other = deltas(made / "one"), deltas(made / "other")
    assert {module.module for module in report.modules} == one.keys() | other.keys()
    for module in report.modules:
        first, second = one.get(module.module), other.get(module.module)
        assert module.norms[0] == pytest.approx(0 if first is None else np.linalg.norm(first), rel=1e-12)
        assert module.norms[1] == pytest.approx(0 if second is None else np.linalg.norm(second), rel=1e-12)
        if first is None or second is None:
            assert module.difference == pytest.approx(sum(module.norms), rel=1e-12)
            assert module.column_angles == module.row_angles == []
            continue
        assert module.difference == pytest.approx(float(np.linalg.norm(first - second)), rel=1e-12)
        assert module.ranks == (4, 3)
        for found, one_space, other_space in zip(
            (module.column_angles, module.row_angles), spaces(first, 4), spaces(second, 3), strict=True
        ):
            cosines = np.linalg.svd(one_space.T @ other_space, compute_uv=False)
            assert np.abs(np.cos(np.radians(found)) - cosines).max() < 1e-12
    total = np.sqrt(sum(module.difference**2 for module in report.modules))
    assert report.difference == pytest.approx(total)
    assert report.relative_difference > 0.5


@examples(40)
@given(data=st.data())
def test_a_change_of_basis_is_no_difference(data: Any) -> None:
    """B G and G^-1 A have the delta of B and A, for any invertible G."""
    m, n, r = (data.draw(sizes()) for _ in range(3))
    a, b = data.draw(matrices(r, n))[0], data.draw(matrices(m, r))[0]
    gauge = torch.linalg.qr(torch.randn(r, r, generator=torch.Generator().manual_seed(1), dtype=torch.float64)).Q * 3.0

    def delta(b: Tensor, a: Tensor) -> Delta:
        return Delta("m", False, *(Exact(x, x.new_zeros(()).expand_as(x), None) for x in (a, b)))

    found = compare_deltas("m", delta(b, a), delta(b @ gauge, torch.linalg.solve(gauge, a)))
    size = float(b.norm() * a.norm())
    assert found.difference <= 1e-12 * size
    assert found.ranks[0] == found.ranks[1]
    assert all(angle < 1e-4 for angle in (*found.column_angles, *found.row_angles))


@torch.no_grad()
def test_logits_are_pefts(made: Path) -> None:
    report = diff_adapters(made / "one", made / "other", logits=True, device="cpu")
    assert report.logits is not None
    batches = read_prompts(resolve_model(str(made / "base"))).batches
    base = AutoModelForCausalLM.from_pretrained(made / "base")
    plain = torch.cat([base(input_ids=ids).logits for ids in batches])
    found = []
    for name in ("one", "other"):
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(made / "base"), made / name)
        found.append(torch.cat([model(input_ids=ids).logits for ids in batches]))
    allowed = 256 * UNIT[torch.float32] * float(max(x.abs().max() for x in found))
    assert report.logits.difference.max_logit == pytest.approx(float((found[0] - found[1]).abs().max()), abs=allowed)
    for effect, logits in zip(report.logits.effects, found, strict=True):
        assert effect.max_logit == pytest.approx(float((logits - plain).abs().max()), abs=allowed)
        assert effect.max_logit > 100 * allowed


@torch.no_grad()
def test_logits_of_classifiers_are_pefts(made: Path, tmp_path: Path) -> None:
    """Each adapter brings its head of three labels, which the base model lacks."""
    load = partial(AutoModelForSequenceClassification.from_pretrained, made / "base", num_labels=3)
    models = []
    for seed, name in enumerate(("one", "other")):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            models.append(with_lora(load(), target_modules=["q_proj"], task_type="SEQ_CLS"))
        models[-1].save_pretrained(tmp_path / name)
    report = diff_adapters(tmp_path / "one", tmp_path / "other", logits=True, device="cpu")
    assert report.logits is not None
    prompts = read_prompts(resolve_model(str(made / "base"))).batches
    one, other = (torch.cat([model.eval()(input_ids=ids).logits for ids in prompts]) for model in models)
    allowed = 256 * UNIT[torch.float32] * float(one.abs().max())
    assert report.logits.difference.max_logit == pytest.approx(float((one - other).abs().max()), abs=allowed)
    assert report.logits.difference.max_logit > 100 * allowed


def test_other_parameters_are_named(made: Path, tmp_path: Path) -> None:
    assert diff_adapters(made / "head", made / "one").other_tensors == ["lm_head.weight"]
    assert diff_adapters(made / "head", made / "head").other_tensors == []
    copied = shutil.copytree(made / "head", tmp_path / "copy")
    key = next(key for key in load_file(copied / TENSORS) if "lora" not in key)
    edit_tensors(copied / TENSORS, lambda found: found.update({key: found[key] + 1}))
    assert diff_adapters(made / "head", copied).other_tensors == ["lm_head.weight"]


def test_the_command(made: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    words = ["diff", str(made / "one"), str(made / "other"), "--logits", "--device", "cpu", "--json"]
    assert run(cli, words) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert len(found["modules"]) == 15
    assert f"norm of their difference {found['difference']:.4g}" in err
    assert short(found["logits"]["difference"]["max_logit"], ".2e") in err
    assert "…" not in err


REFUSED: dict[str, tuple[Callable[[Path], object], list[str], str]] = {
    "another base": (
        lambda f: edit_json(f / CONFIG, lambda c: c.update(base_model_name_or_path="owner/other")),
        [],
        "trained on owner/other",
    ),
    "another task": (
        lambda f: edit_json(f / CONFIG, lambda found: found.update(task_type="SEQ_CLS")),
        ["--logits", "--device", "cpu"],
        "different tasks (CAUSAL_LM, SEQ_CLS)",
    ),
    "no prompts": (
        lambda f: None,
        ["--logits", "--device", "cpu", "--prompts", "missing.txt"],
        "missing.txt: cannot be read",
    ),
}


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("case", REFUSED)
def test_bad_input(case: str, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before a model is loaded."""
    change, options, message = REFUSED[case]
    other = shutil.copytree(made / "other", tmp_path / "other")
    change(other)
    assert run(cli, ["diff", str(made / "one"), str(other), *options]) == 2
    assert message in only_error(capsys.readouterr().err)
