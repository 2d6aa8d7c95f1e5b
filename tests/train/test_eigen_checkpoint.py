"""Checkpoints of eigen are resumed bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import AdamW

from loraover.overparam.eigenbases import BasisFollower

from support.eigen_checkpoint import OPTIONS, made_of
from support.hooked_run import same
from support.make_checkpoint import (
    Made,
    adamw,
    reopened,
    save,
    train,
)
from support.parallel_run import cores
from support.tiny_models import lora_matrices


def assert_alike(one: Made, other: Made) -> None:
    assert same(cores(one.over), cores(other.over))
    assert same(lora_matrices(one.model), lora_matrices(other.model))


RESUMED = [*((kind, torch.float32) for kind in OPTIONS), ("both", torch.float64), ("both", torch.bfloat16)]


@pytest.mark.parametrize(("kind", "dtype"), RESUMED, ids=str)
def test_a_resumed_run_is_the_uninterrupted_one(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    made = made_of(tmp_path, kind, dtype=dtype)
    resumed = reopened(made, adamw)
    assert_alike(resumed, made)
    refreshes: list[BasisFollower] = []
    with pytest.MonkeyPatch.context() as patch:
        turn = BasisFollower._turn

        def watched(self: BasisFollower, *args: Any) -> None:
            refreshes.append(self)
            turn(self, *args)

        patch.setattr(BasisFollower, "_turn", watched)
        for each in (made, resumed):
            train(each.model, each.optimizer, range(3, 12))
    assert bool(refreshes) is (kind in ("gradient", "both", "carried", "once"))
    assert_alike(resumed, made)


@pytest.mark.parametrize("kind", ["gradient", "carried"])
def test_a_run_some_of_whose_sites_had_no_gradients_is_resumed(kind: str, tmp_path: Path) -> None:
    """One of a group of several, which is split; and all of another group, whose bases then follow fewer steps."""
    made = made_of(tmp_path, kind, steps=2)
    idle = [p for key, p in made.model.named_parameters() if "layers.1.self_attn.q_proj.lora_A" in key]
    idle += [p for key, p in made.model.named_parameters() if "k_proj.lora_B" in key or "v_proj.lora_B" in key]
    for parameter in idle:
        parameter.requires_grad_(False)
    train(made.model, made.optimizer, range(2, 5))
    for parameter in idle:
        parameter.requires_grad_(True)
    assert 0 < sum(group.is_joined for group in made.over.groups) < len(made.over.groups)
    assert len({follower.steps for follower in made.over.followers.values()}) == 2
    save(made.path, made.model, made.over, step=5)
    resumed = reopened(made, adamw)
    assert_alike(resumed, made)
    for each in (made, resumed):
        train(each.model, each.optimizer, range(5, 12))
    assert_alike(resumed, made)


def test_groups_of_two_rates_that_follow_other_steps_are_resumed(tmp_path: Path) -> None:
    """LoRA+ divides a group, and then only one part has gradients: it is one group again until the optimizer comes."""

    def rates(model: Any) -> list[dict[str, Any]]:
        named = [(key, p) for key, p in model.named_parameters() if p.requires_grad]
        return [{"params": [p for k, p in named if ("layers.0" in k) is first], "lr": 1e-2} for first in (True, False)]

    made = made_of(tmp_path, "gradient", steps=0)
    made.over.detach()
    optimizer = AdamW(rates(made.model))
    made.over.attach(optimizer)
    train(made.model, optimizer, range(2))
    idle = [p for key, p in made.model.named_parameters() if "layers.1" in key and "lora_" in key]
    for parameter in idle:
        parameter.requires_grad_(False)
    train(made.model, optimizer, range(2, 4))
    for parameter in idle:
        parameter.requires_grad_(True)
    assert {follower.steps for follower in made.over.followers.values()} == {2, 4}
    save(made.path, made.model, made.over, step=4)
    resumed = reopened(made, adamw)
    resumed.over.detach()
    again = AdamW(rates(resumed.model))
    resumed.over.attach(again)
    assert same(cores(resumed.over), cores(made.over))
    for model, stepped in ((made.model, optimizer), (resumed.model, again)):
        train(model, stepped, range(4, 10))
    assert_alike(resumed, made)
