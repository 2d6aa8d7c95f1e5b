"""Parameter groups that change during a run: cores follow their matrices' present groups, as a plain LoRA would."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from loraover import LoraOverConfig, OverParameterization
from loraover.common.errors import ConfigError

from support.hooked_run import assert_contracted, make, same, train
from support.tiny_models import tiny_net, trainable

RATES = 1e-2, 3e-2
"""Learning rates of all A, and of all B."""


def move_b(optimizer: Optimizer) -> None:
    """All B into a group of rate 0, which was added for them."""
    moved = optimizer.param_groups[1]["params"][:]
    del optimizer.param_groups[1]["params"][:]
    optimizer.add_param_group({"params": moved, "lr": 0.0})


def move_one(optimizer: Optimizer) -> None:
    """One B out of the middle of its stack, into the group of all A."""
    groups = optimizer.param_groups
    groups[0]["params"].append(groups[1]["params"].pop(1))


def reorder(optimizer: Optimizer) -> None:
    optimizer.param_groups.reverse()


def rebuild(optimizer: Optimizer) -> None:
    """As `load_state_dict` of a state with the groups in another order does."""
    optimizer.param_groups = [{**group, "params": [*group["params"]]} for group in reversed(optimizer.param_groups)]


def empty_first(optimizer: Optimizer) -> None:
    """The first group goes, and its matrices join the other one."""
    optimizer.param_groups[1]["params"] += optimizer.param_groups.pop(0)["params"]


CHANGES: dict[str, Callable[[Optimizer], None]] = {
    change.__name__: change for change in (move_b, move_one, reorder, rebuild, empty_first)
}


def trained(change: Callable[[Optimizer], None] | None, decomposition: str, *, alone: bool) -> dict[str, Tensor]:
    """Train four steps, with a change of the groups after the second.

    Args:
        change: Change to make.
        decomposition: Decomposition of the run.
        alone: Whether each matrix has a group of its own from the start, whose rate is that of the changed groups.
    """
    model = tiny_net(dtype=torch.float64)
    a, b = trainable(model)[::2], trainable(model)[1::2]
    optimizer = AdamW([{"params": a, "lr": RATES[0]}, {"params": b, "lr": RATES[1]}])
    followed = optimizer
    if alone:
        followed = AdamW([{"params": [p], "lr": RATES[i % 2]} for i, p in enumerate(trainable(model))])
    over = OverParameterization(model, LoraOverConfig(decomposition=decomposition)).attach(followed)
    train(model, followed, range(2))
    if change is not None:
        change(optimizer)
    if alone:
        rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        for group in followed.param_groups:
            group["lr"] = rates[id(group["params"][0])]
    matrices = train(model, followed, range(2, 4))
    assert_contracted(over)
    return matrices


@pytest.mark.parametrize("decomposition", ["mpo", "eigen"])
@pytest.mark.parametrize("change", CHANGES)
def test_cores_follow_the_present_groups_of_their_matrices(change: str, decomposition: str) -> None:
    found, expected = (trained(CHANGES[change], decomposition, alone=alone) for alone in (False, True))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    unchanged = trained(None, decomposition, alone=False)
    assert same(found, unchanged) is (change in ("reorder", "rebuild"))


def test_a_matrix_whose_group_was_deleted_is_refused_before_anything_changes() -> None:
    model, over, optimizer = make(lambda p: AdamW([{"params": p[::2]}, {"params": p[1::2]}], lr=1e-2))
    before = train(model, optimizer, range(2))
    del optimizer.param_groups[1]

    def step(model: Any, optimizer: Optimizer, number: int) -> None:
        with pytest.raises(ConfigError, match=r"does not hold \w+\.lora_B.*requires_grad_\(False\)"):
            train(model, optimizer, range(number, number + 1))

    assert same(train(model, optimizer, range(2, 4), step), before)
    assert [len(group["params"]) for group in optimizer.param_groups] == [3]
    for site in over.sites.values():
        site.parameter.requires_grad_(site.matrix == "A")
    optimizer.add_param_group({"params": [site.parameter for site in over.sites.values() if site.matrix == "B"]})
    after = train(model, optimizer, range(2, 4))
    assert {key for key in after if not torch.equal(after[key], before[key])} == {k for k in after if "lora_A" in k}
