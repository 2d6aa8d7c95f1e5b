"""Parameter groups that change during a run, and matrices that are written from outside."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import set_peft_model_state_dict
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer

from loraover import LoraOverConfig, OverParameterization, write_checkpoint
from loraover.common.errors import ConfigError
from loraover.overparam.decompositions import DECOMPOSITIONS

from support.hooked_run import assert_contracted, make, same, train
from support.hooked_run import ordinary_step as step
from support.tiny_models import lora_matrices, tiny_net, trainable

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
    """Train four steps, with a change of the groups after the second."""
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


WRITTEN = "second.lora_B"


def run(steps: int = 2, optimizer: Any = AdamW, **config: Any) -> tuple[Any, OverParameterization, Any]:
    """A model, its cores and its optimizer after some steps."""
    model, over, chosen = make(lambda p: optimizer(p, lr=1e-2), **config)
    train(model, chosen, range(steps))
    return model, over, chosen


def cores(over: OverParameterization, name: str) -> list[Tensor]:
    group, i = over.injected[name]
    return [stack[i].clone() for stack in group.stacks]


# Ways to write


@torch.no_grad()
def _one_bit(model: Any, parameter: Tensor, folder: Path) -> None:
    parameter[1, 1] = torch.nextafter(parameter[1, 1], torch.tensor(math.inf))


def _nan(model: Any, parameter: Tensor, folder: Path) -> None:
    parameter.data[0, 0] = math.nan


def _load_adapter(model: Any, parameter: Tensor, folder: Path) -> None:
    kept = parameter.detach().clone()
    parameter.data.mul_(2)
    model.save_pretrained(folder / "other")
    parameter.data.copy_(kept)
    model.load_adapter(folder / "other", "default", is_trainable=True)


WRITES: dict[str, Callable[[Any, Tensor, Path], None]] = {
    "one bit": _one_bit,
    "nan": _nan,
    "load_adapter": _load_adapter,
}


@pytest.mark.parametrize("write", WRITES)
def test_a_write_is_noticed_by_name_at_the_next_step_at_a_save_and_at_the_finish(write: str, tmp_path: Path) -> None:
    model, over, optimizer = run()
    WRITES[write](model, over.sites[WRITTEN].parameter, tmp_path)
    before = lora_matrices(model)
    named = r"1 over-parameterised matrices, first second\.lora_B, were changed .* adopt_matrices\(\)"
    with pytest.raises(ConfigError, match=named):
        step(model, optimizer, 2)
    model.save_pretrained(tmp_path / "saved")
    with pytest.raises(ConfigError, match=named):
        write_checkpoint(tmp_path / "saved", over, step=2)
    assert not list((tmp_path / "saved").glob("loraover*"))
    with pytest.raises(ConfigError, match=named):
        over.finish()
    assert [len(group["params"]) for group in optimizer.param_groups] == [6]
    for key, matrix in lora_matrices(model).items():
        torch.testing.assert_close(matrix, before[key], rtol=0, atol=0, equal_nan=True)


def test_a_write_before_the_first_step_is_noticed() -> None:
    model, over, optimizer = run(steps=0)
    over.sites[WRITTEN].parameter.data.mul_(2)
    with pytest.raises(ConfigError, match=WRITTEN):
        step(model, optimizer, 0)


def test_a_plain_matrix_may_be_written() -> None:
    model, over, optimizer = run(sites=["first.*"])
    over.sites[WRITTEN].parameter.data.mul_(2)
    step(model, optimizer, 2)
    over.finish()


def test_weights_that_are_swapped_out_and_back_are_no_alarm() -> None:
    """As an evaluation of averaged weights does."""
    model, over, optimizer = run()
    reference, _, other = run()
    kept = lora_matrices(model)
    for parameter in trainable(model):
        parameter.data.zero_()
    set_peft_model_state_dict(model, {key.replace(".default", ""): matrix for key, matrix in kept.items()})
    for each, chosen in ((model, optimizer), (reference, other)):
        step(each, chosen, 2)
    expected = lora_matrices(reference)
    assert all(torch.equal(matrix, expected[key]) for key, matrix in lora_matrices(model).items())
    over.finish()


def test_nan_in_both_is_no_alarm() -> None:
    model, over, optimizer = run(optimizer=SGD)
    for parameter in trainable(model):
        parameter.grad = torch.full_like(parameter, math.nan)
    optimizer.step()
    assert all(site.parameter.isnan().all() for site in over.sites.values())
    step(model, optimizer, 2)
    over.finish()


# Adoption


@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
def test_adopted_matrices_get_new_cores_and_the_others_keep_theirs(decomposition: str) -> None:
    model, over, optimizer = run(decomposition=decomposition)
    written = {WRITTEN, "third.lora_A"}
    targets = {name: torch.linspace(-1, 1, over.sites[name].parameter.numel()) for name in written}
    for name in written:
        over.sites[name].parameter.data.copy_(targets[name].view(over.sites[name].shape))
    before = {name: cores(over, name) for name in over.sites}
    assert set(over.adopt_matrices()) == written
    for name in over.sites:
        group, i = over.injected[name]
        same = all(map(torch.equal, cores(over, name), before[name]))
        assert same is (name not in written)
        assert all(bool(group.core_state(k, i)) is (name not in written) for k in group.trained)
        if name in written:
            # |U| |s| |V| is at most 3 where |M| is at most 1; fewer than 50 roundings of float32.
            torch.testing.assert_close(
                over.sites[name].parameter.detach().flatten(), targets[name], rtol=0, atol=3 * 50 * 2**-24
            )
    over.check_unchanged()
    matrices = lora_matrices(model)
    step(model, optimizer, 2)
    assert not any(torch.equal(matrix, matrices[key]) for key, matrix in lora_matrices(model).items())
    over.finish()
