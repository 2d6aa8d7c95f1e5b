"""Checkpoints of eigen: resumed bit for bit, folded, and left behind at the end of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.optim import AdamW

from loraover import OverParameterization
from loraover.common.command_line import run
from loraover.overparam.eigenbases import BasisFollower
from loraover_export.cli import cli
from loraover_export.fold.certificate import FoldCertificate

from support.eigen_checkpoint import OPTIONS, V, made_of
from support.hooked_run import same
from support.make_checkpoint import (
    Made,
    adamw,
    cores_of,
    nearest,
    numpy64,
    oracle_matrices,
    reopened,
    save,
    train,
)
from support.tiny_models import lora_matrices


def follower_states(over: OverParameterization) -> dict[str, Any]:
    return {name: over.followers[group].site_state(i) for name, (group, i) in over.injected.items()}


def states(over: OverParameterization) -> dict[str, Any]:
    return {
        f"{name}.{k}": dict(group.core_state(k, group.owner(k, i)))
        for name, (group, i) in over.injected.items()
        for k in group.trained
    }


def assert_alike(one: Made, other: Made) -> None:
    assert same(cores_of(one.over), cores_of(other.over))
    assert same(states(one.over), states(other.over))
    assert same(follower_states(one.over), follower_states(other.over))
    assert same(lora_matrices(one.model), lora_matrices(other.model))


# Resumed


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
    assert same(follower_states(resumed.over), follower_states(made.over))
    for model, stepped in ((made.model, optimizer), (resumed.model, again)):
        train(model, stepped, range(4, 10))
    assert_alike(resumed, made)


# Folded


@pytest.mark.parametrize("kind", ["both", "trained"])
def test_a_fold_is_the_oracles_contraction_with_its_certificate(kind: str, tmp_path: Path) -> None:
    made = made_of(tmp_path, kind, steps=5)
    assert run(cli, ["fold", str(made.path), "-o", str(tmp_path / "folded")]) == 0
    folded = load_file(tmp_path / "folded" / "adapter_model.safetensors")
    expected = oracle_matrices(made.path)
    assert folded.keys() == expected.keys()
    for key, matrix in folded.items():
        difference = abs(numpy64(matrix) - nearest(expected[key], "fp32"))
        assert (difference <= 2.0**-23 * abs(expected[key])).all(), key  # a float64 sum that lies at a tie
        assert (difference == 0).mean() > 0.99
    certificate = FoldCertificate.model_validate_json((tmp_path / "folded" / "fold_certificate.json").read_bytes())
    assert {matrix.name for matrix in certificate.matrices} == set(made.over.injected)
    assert all(matrix.passed for matrix in certificate.matrices)


# The end of a run


def test_a_finished_run_leaves_plain_lora_and_readable_cores(tmp_path: Path) -> None:
    made = made_of(tmp_path, "both")
    before = lora_matrices(made.model)
    made.over.finish()
    assert [len(group["params"]) for group in made.optimizer.param_groups] == [16]
    train(made.model, made.optimizer, range(3, 4))
    assert not same(lora_matrices(made.model), before)
    for group in made.over.groups:
        for i, site in enumerate(group.sites):
            key = next(key for key in before if site.module in key and f"lora_{site.matrix}" in key)
            torch.testing.assert_close(group.contract()[i], before[key], rtol=0, atol=1e-6)


def test_adopted_matrices_survive_a_checkpoint(tmp_path: Path) -> None:
    made = made_of(tmp_path, "both")
    made.over.sites[V].parameter.data.fill_(0.25)
    assert made.over.adopt_matrices() == [V]
    save(made.path, made.model, made.over, step=3)
    resumed = reopened(made, adamw)
    assert_alike(resumed, made)
    for each in (made, resumed):
        train(each.model, each.optimizer, range(3, 8))
    assert_alike(resumed, made)
