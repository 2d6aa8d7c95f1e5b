"""Writes `tests/golden/schema_3`: checkpoints that later versions must read, and their folds.

    .venv/bin/python tests/golden/make.py

Run it once per schema version, with SCHEMA raised by hand; what is there already is never rewritten, because files
written by old code are the point. Each folder holds a checkpoint of a one-layer Llama of hidden size 16 (the base
model is not kept: a fold does not need it) and, for each storage type, the matrices that the oracles contract from its
cores in float64, rounded once. No element lies within 1e-12 of the middle between two numbers, so that another
order of summation cannot change a bit.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim import SGD, Optimizer

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from loraover import Budget, LoraOverConfig

from support.make_checkpoint import Made, MakeOptimizer, adamw, make_checkpoint, nearest, numpy64, oracle_matrices, save

SCHEMA = 3
FOLDER = Path(__file__).parent / f"schema_{SCHEMA}"
BASE_NAME = "loraover/golden-base"
BASE_OPTIONS = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 64}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def sgd(parameters: Iterable[nn.Parameter]) -> Optimizer:
    return SGD(parameters, lr=0.1)


@dataclass(frozen=True)
class Recipe:
    """A checkpoint after two of `total` steps."""

    config: LoraOverConfig
    make_optimizer: MakeOptimizer
    lora: Mapping[str, Any]
    total: int | None = None


QV: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"], "alpha_pattern": {"v_proj": 3}}
EIGEN = LoraOverConfig(decomposition="eigen", options={"long": "calibration", "block": 8, "growth": 1}, seed=7)
DYNAMIC = LoraOverConfig(
    schedule="dynamic", score="sensitivity", budget=Budget(sites=3), rounds=3, start=0.1, end=0.3, seed=7
)
RECIPES: dict[str, Recipe] = {
    "mpo": Recipe(LoraOverConfig(decomposition="mpo", seed=7), adamw, QV),
    "svd": Recipe(LoraOverConfig(decomposition="svd", seed=7), sgd, {"target_modules": ["q_proj"], "use_rslora": True}),
    "chain": Recipe(LoraOverConfig(decomposition="chain", seed=7), sgd, {"target_modules": ["q_proj"]}),
    "eigen": Recipe(EIGEN, adamw, {"target_modules": ["q_proj", "k_proj", "v_proj"]}),
    "eigen_packed": Recipe(EIGEN, adamw, {"target_modules": ["q_proj", "k_proj", "v_proj"]}),
    "dynamic": Recipe(DYNAMIC, adamw, QV, total=10),
}
"""The one of "dynamic" has had two of its three rounds; A of q, k and v share a basis in those of "eigen".

The files of "eigen" have moments in the matrices' own axes, which are read and no longer written.
"""

EARLIER = {"eigen": "eigen_packed"}
"""Files with what only earlier versions wrote, by the ones of the same recipe that are written today."""


def make_golden(name: str, scratch: Path) -> Made:
    """The checkpoint that a recipe describes, as the code of today writes it."""
    recipe = RECIPES[name]
    made = make_checkpoint(
        scratch,
        config=recipe.config,
        make_optimizer=recipe.make_optimizer,
        total=recipe.total,
        base_options=BASE_OPTIONS,
        r=2,
        **recipe.lora,
    )
    made.model.peft_config["default"].base_model_name_or_path = BASE_NAME
    save(made.path, made.model, made.over, step=2)
    return made


def write_folded(checkpoint: Path, dtype: str, file: Path) -> None:
    """What a fold must give, computed without our code."""
    matrices = {key: numpy64(tensor) for key, tensor in load_file(checkpoint / "adapter_model.safetensors").items()}
    matrices |= oracle_matrices(checkpoint)
    for key, matrix in matrices.items():
        below, above = (nearest(matrix * (1 + shift), dtype) for shift in (-1e-12, 1e-12))
        assert np.array_equal(below, above), f"{key} has an element too near to a tie; choose another seed"
    rounded = {
        key: torch.from_numpy(nearest(matrix, dtype)).to(DTYPES[dtype]).contiguous() for key, matrix in matrices.items()
    }
    save_file(rounded, file, metadata={"format": "pt"})


def main() -> None:
    for name in RECIPES:
        folder = FOLDER / name
        if folder.exists():
            print(f"{folder} is there already and stays as it is")
            continue
        with tempfile.TemporaryDirectory() as scratch:
            made = make_golden(name, Path(scratch))
            for dtype in DTYPES:
                write_folded(made.path, dtype, made.path / f"folded_{dtype}.safetensors")
            for file in made.path.iterdir():
                file.chmod(0o644)
            shutil.copytree(made.path, folder, ignore=shutil.ignore_patterns("README.md"))


if __name__ == "__main__":
    main()
