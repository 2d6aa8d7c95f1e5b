"""Embeddings in the decomposition eigen: the axis of the tokens keeps the identity."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from loraover import LoraOverConfig, read_checkpoint
from loraover.checkpoint.tensor_file import open_tensors
from loraover_export import fold_checkpoint

from support.make_checkpoint import adamw, make_checkpoint, reopened, train

OPTIONS: dict[str, dict[str, Any]] = {
    "gradient": {"block": 12},
    "calibration": {"short": "calibration", "long": "calibration", "block": 12},
    "trained": {"short": "calibration", "long": "calibration", "block": 12, "train_auxiliary": True},
}


@pytest.mark.parametrize("source", OPTIONS)
def test_the_axis_of_tokens_has_no_basis(source: str, tmp_path: Path) -> None:
    config = LoraOverConfig(decomposition="eigen", options=OPTIONS[source], seed=5)
    made = make_checkpoint(tmp_path, config=config, steps=4, target_modules=["embed_tokens", "q_proj"])
    name = next(name for name in made.over.sites if name.endswith("lora_embedding_A"))
    group, i = made.over.injected[name]
    r, _ = group.shape
    assert [tuple(group.core(k, i).shape) for k in range(len(group.stacks))] == [(r, r), group.shape]
    assert made.over.schedule.most_parameters[0] == made.over.num_parameters()[0]
    assert list(made.over.followers[group].blocks) == (["rows"] if source == "gradient" else [])

    found = read_checkpoint(made.path)
    with open_tensors(found.cores_path) as file:
        assert len(found.read_cores(file, found.sites[name])) == 2
    assert fold_checkpoint(made.path, tmp_path / "folded", check_error=True).verdict != "failed"

    resumed = reopened(made, adamw, config)
    for each in (made, resumed):
        train(each.model, each.optimizer, range(4, 6))
    assert torch.equal(resumed.logits(), made.logits())
