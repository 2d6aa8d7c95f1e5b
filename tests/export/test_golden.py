"""Files that were kept stay readable, bit for bit, and the formats are what their bytes say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from golden.make import BASE_NAME, BASE_OPTIONS, DTYPES, FOLDER, RECIPES, make_golden
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

from loraover import OverParameterization, read_checkpoint
from loraover.checkpoint.checkpoint import Checkpoint
from loraover.checkpoint.metadata import SCHEMA_VERSION, SiteRecord
from loraover.checkpoint.resume import restore
from loraover.checkpoint.tensor_file import open_tensors
from loraover.overparam.importance import GradientScore

from support.make_checkpoint import tree
from support.refusals import fold
from support.tiny_models import tiny_llama

CHECKPOINT = ["adapter_config.json", "adapter_model.safetensors", "loraover.json", "loraover.safetensors"]


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
    scaling = {"mpo": 4.0, "svd": 8 / 2**0.5, "chain": 4.0, "dynamic": 4.0, "eigen": 4.0}[golden.name]
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
                assert torch.equal(value, tensors.pop(f"{site}.gauge.{key}"))
    assert over.schedule.rounds == found.meta.rounds
    score = {key: tensors.pop(key) for key in list(tensors) if key.startswith("score.")}
    assert bool(score) is (golden.name == "dynamic")
    assert isinstance(over.schedule.score, GradientScore)
    restored = {f"score.{key}": value for key, value in over.schedule.score.state().items()}
    assert restored.keys() == score.keys()
    assert all(torch.equal(restored[key], score[key]) for key in score)
    assert tensors.keys() == {record.core_key(k) for record in found.meta.sites for k in cores_of_recipe(found, record)}
    shared = [record.shares for record in found.meta.sites if record.shares]
    assert len(shared) == (3 if golden.name == "eigen" else 0)


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


@pytest.mark.parametrize("name", RECIPES)
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

CORES_BYTES = (
    b"\x40\x01\x00\x00\x00\x00\x00\x00"
    b'{"__metadata__":{"format":"pt"},"q.lora_A.core.0":{"dtype":"F32","shape":[1,1],"data_offsets":[0,4]},'
    b'"q.lora_A.core.1":{"dtype":"F32","shape":[1,2],"data_offsets":[4,12]},'
    b'"q.lora_B.core.0":{"dtype":"F32","shape":[2,1],"data_offsets":[12,20]},'
    b'"q.lora_B.core.1":{"dtype":"F32","shape":[1,1],"data_offsets":[20,24]}}       '
    b"\x00\x00\x00\x40\x00\x00\x40\x40\x00\x00\x80\x40\x00\x00\xa0\x40\x00\x00\xe0\x40\x00\x00\x00\x40"
)
ADAPTER_BYTES = (
    b"\xd0\x00\x00\x00\x00\x00\x00\x00"
    b'{"__metadata__":{"format":"pt"},"base_model.model.q.lora_A.weight":{"dtype":"F32","shape":[1,2],'
    b'"data_offsets":[0,8]},"base_model.model.q.lora_B.weight":{"dtype":"F32","shape":[2,1],'
    b'"data_offsets":[8,16]}}   '
    b"\x00\x00\xc0\x40\x00\x00\x00\x41\x00\x00\x20\x41\x00\x00\x60\x41"
)
CONFIG_BYTES = b'{"peft_type": "LORA", "base_model_name_or_path": "some/base", "r": 1, "lora_alpha": 3, "extra": [1]}'
META_BYTES = b"""{
  "format": "loraover-checkpoint",
  "schema_version": 3,
  "base_model": "some/base",
  "step": 9,
  "config": {
    "decomposition": "chain",
    "options": {"depth": 2, "expansion": 1.0},
    "sites": ["*"],
    "aux_lr_scale": 0.5,
    "decay_auxiliary": true,
    "seed": null
  },
  "core_dtype": "float32",
  "sites": [
    {"name": "q.lora_A", "m": 1, "n": 2, "step": 0, "joined": true, "shares": {}, "state": {}},
    {
      "name": "q.lora_B", "m": 2, "n": 1, "step": 4, "joined": false, "shares": {},
      "state": {"q.lora_B.core.0.step": 5}
    }
  ],
  "rounds": [{"step": 4, "scores": {"q.lora_B": 0.5}, "chosen": ["q.lora_B"], "added": 1, "forwards": 2}],
  "optimizer_steps": 8,
  "optimizer": "SGD",
  "world_size": 1,
  "versions": {"loraover": "0.1.0"},
  "sha256": {
    "adapter_config.json": "62e38e9116bc22f07f5d3b6a41b7f3bb3cb0b00148e61359f48636dd2caebb7f",
    "adapter_model.safetensors": "e328794630868399bf94ded98e2d00db4d9cec6d68b49b51bce067bdbcc370fd",
    "loraover.safetensors": "61024a4689c0e0d82241b58a319824689668ec711e3b3f3a8d84b3c10e5f78df"
  },
  "digest": "9ce4831d2a4b98dcc3cdce32527c98607a11244d0706ad4da3d3e28497979ad2"
}
"""
FOLDED_CONFIG = b"""{
  "base_model_name_or_path": "some/base",
  "extra": [
    1
  ],
  "inference_mode": true,
  "lora_alpha": 3,
  "peft_type": "LORA",
  "r": 1
}
"""


@pytest.fixture
def literal(tmp_path: Path) -> Path:
    folder = tmp_path / "literal"
    folder.mkdir()
    for name, content in zip(CHECKPOINT, (CONFIG_BYTES, ADAPTER_BYTES, META_BYTES, CORES_BYTES), strict=True):
        (folder / name).write_bytes(content)
    return folder


def test_a_literal_checkpoint_is_read(literal: Path) -> None:
    found = read_checkpoint(literal)
    assert found.meta.step == 9
    assert found.meta.config.aux_lr_scale == 0.5
    assert found.meta.config.seed is None
    assert [(r.step, r.ranked, r.added, r.forwards) for r in found.meta.rounds] == [(4, {"q.lora_B": 0.5}, 1, 2)]
    assert (found.meta.optimizer_steps, found.meta.optimizer, found.meta.world_size) == (8, "SGD", 1)
    assert found.sites["q.lora_B"].step == 4
    assert found.sites["q.lora_B"].state == {"q.lora_B.core.0.step": 5}
    assert found.config.scaling("q") == 3
    with open_tensors(found.cores_path) as file:
        assert [core[0].tolist() for core in found.read_cores(file, found.sites["q.lora_A"])] == [[[2]], [[3, 4]]]
        assert [core[0].tolist() for core in found.read_cores(file, found.sites["q.lora_B"])] == [[[5], [7]], [[2]]]


def test_a_literal_checkpoint_folds_to_literal_bytes(literal: Path, tmp_path: Path) -> None:
    assert fold(literal, tmp_path / "out") == 0
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == ADAPTER_BYTES
    assert (tmp_path / "out" / "adapter_config.json").read_bytes() == FOLDED_CONFIG
