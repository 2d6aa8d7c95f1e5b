"""Files that were kept stay readable, bit for bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from golden.make import BASE_NAME, BASE_OPTIONS, DTYPES, EARLIER, FOLDER, RECIPES, make_golden
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

from loraover import OverParameterization, read_checkpoint
from loraover.checkpoint.checkpoint import Checkpoint
from loraover.checkpoint.metadata import SCHEMA_VERSION, SiteRecord
from loraover.checkpoint.training_state import restore
from loraover.overparam.importance import GradientScore

from support.make_checkpoint import tree
from support.refusals import fold
from support.tiny_models import tiny_llama

KEPT = sorted(path for path in FOLDER.parent.glob("schema_*/*") if path.is_dir())


@pytest.fixture(params=KEPT, ids=lambda p: f"{p.parent.name}-{p.name}")
def kept(request: pytest.FixtureRequest) -> Path:
    """A folder as it was committed: checkpoint and expected folds."""
    folder: Path = request.param
    return folder


@pytest.fixture
def golden(kept: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint alone."""
    return shutil.copytree(kept, tmp_path / kept.name, ignore=shutil.ignore_patterns("folded_*"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_todays_fold_gives_the_stored_matrices(kept: Path, golden: Path, dtype: str, tmp_path: Path) -> None:
    before = tree(golden)
    assert fold(golden, tmp_path / "out", "--dtype", dtype) == 0
    assert tree(golden) == before
    found, expected = (
        load_file(tmp_path / "out" / "adapter_model.safetensors"),
        load_file(kept / f"folded_{dtype}.safetensors"),
    )
    assert found.keys() == expected.keys()
    for key, matrix in expected.items():
        assert found[key].dtype == matrix.dtype == DTYPES[dtype]
        assert found[key].shape == matrix.shape
        assert raw_bytes(found[key]) == raw_bytes(matrix), key
        assert matrix.any()


def raw_bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def test_golden_files_are_of_the_version_that_is_read() -> None:
    assert {path.parent.name for path in KEPT} == {f"schema_{SCHEMA_VERSION}"} == {FOLDER.name}


def test_todays_reader_understands_the_metadata(kept: Path, golden: Path) -> None:
    found = read_checkpoint(golden)
    assert f"schema_{found.meta.schema_version}" == kept.parent.name
    assert found.meta.base_model == BASE_NAME
    assert found.meta.step == 2
    assert found.meta.config == RECIPES[golden.name].config
    assert {name.rsplit(".", 1)[1] for name in found.sites} == {"lora_A", "lora_B"}
    scaling = {"mpo": 4.0, "svd": 8 / 2**0.5, "chain": 4.0, "dynamic": 4.0, "eigen": 4.0, "eigen_packed": 4.0}[
        golden.name
    ]
    assert found.config.scaling("model.layers.0.self_attn.q_proj") == scaling
    rounds = {"dynamic": [(1, 1), (2, 1)]}.get(golden.name, [(0, len(found.sites))])
    assert [(r.step, len(r.chosen)) for r in found.meta.rounds] == rounds


def test_training_resumes_from_it(golden: Path) -> None:
    recipe, found = RECIPES[golden.name], read_checkpoint(golden)
    model = PeftModel.from_pretrained(tiny_llama(**BASE_OPTIONS), golden, is_trainable=True)
    over = OverParameterization(model, recipe.config, steps=recipe.total, inject=False)
    restore(over, found)
    over.attach(recipe.make_optimizer([p for p in model.parameters() if p.requires_grad]))
    tensors = load_file(golden / "loraover.safetensors")
    for site, (group, i) in over.injected.items():
        for k in range(len(group.stacks)):
            assert torch.equal(group.core(k, i), tensors[found.sites[site].core_key(k)])
        for k in group.trained:
            for key, value in group.core_state(k, i).items():
                assert torch.equal(value, tensors.pop(f"{site}.core.{k}.{key}"))
        if group in over.followers:
            for key, value in over.followers[group].site_state(i).items():
                stored = tensors.pop(f"{site}.gauge.{key}")
                if golden.name in EARLIER and key.startswith("moment."):
                    stored = in_axes_of_the_basis(
                        stored, group.core(0, i) if key == "moment.rows" else group.core(-1, i)
                    )
                assert torch.equal(value, stored)
    assert over.schedule.rounds == found.meta.rounds
    score = {key: tensors.pop(key) for key in list(tensors) if key.startswith("score.")}
    assert bool(score) is (golden.name == "dynamic")
    assert isinstance(over.schedule.score, GradientScore)
    restored = {f"score.{key}": value for key, value in over.schedule.score.state().items()}
    assert restored.keys() == score.keys()
    assert all(torch.equal(restored[key], score[key]) for key in score)
    assert tensors.keys() == {record.core_key(k) for record in found.meta.sites for k in cores_of_recipe(found, record)}
    shared = [record.shares for record in found.meta.sites if record.shares]
    assert len(shared) == (3 if golden.name.startswith("eigen") else 0)


def in_axes_of_the_basis(moment: Tensor, basis: Tensor) -> Tensor:
    """V^T C V of a moment C of one block, its upper triangle row by row, as it is kept."""
    turned = basis.mT @ moment[0] @ basis
    return torch.stack([turned[i, j] for i in range(len(turned)) for j in range(i, len(turned))])[None].bfloat16()


def cores_of_recipe(found: Checkpoint, record: SiteRecord) -> range:
    return range(len(found.decomposition.core_shapes(record.m, record.n)))


def paths(content: Any, prefix: str = "") -> set[str]:
    """Every key of a JSON value, with the type below it; list indices as "[]"."""
    if isinstance(content, dict):
        return {path for key, value in content.items() for path in paths(value, f"{prefix}.{key}")}
    if isinstance(content, list):
        return {path for value in content for path in paths(value, f"{prefix}[]")}
    return {f"{prefix}: {type(content).__name__}"}


def layout(file: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {key: (str(tensor.dtype), tuple(tensor.shape)) for key, tensor in load_file(file).items()}


@pytest.mark.parametrize("name", [name for name in RECIPES if name not in EARLIER])
def test_todays_writer_writes_the_same_format(name: str, tmp_path: Path) -> None:
    """A difference here is a new format: raise the schema version and make its golden files."""
    golden = FOLDER / name
    fresh = make_golden(golden.name, tmp_path / "fresh").path
    assert layout(fresh / "loraover.safetensors") == layout(golden / "loraover.safetensors")
    assert layout(fresh / "adapter_model.safetensors") == layout(golden / "adapter_model.safetensors")
    new, old = (json.loads((folder / "loraover.json").read_text()) for folder in (fresh, golden))
    assert paths(new) == paths(old)
    assert [{**site, "state": None} for site in new["sites"]] == [{**site, "state": None} for site in old["sites"]]


# The formats, byte by byte: A = [2] [3 4] = [6 8], B = [5 7]^T [2] = [10 14]^T, by a chain of two cores.
