"""A and B that were changed outside the optimizer step: reported by name, or adopted on request."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import set_peft_model_state_dict
from torch import Tensor
from torch.optim import SGD, AdamW

from loraover import OverParameterization, write_checkpoint
from loraover.common.errors import ConfigError
from loraover.overparam.decompositions import DECOMPOSITIONS

from support.hooked_run import make, train
from support.hooked_run import ordinary_step as step
from support.tiny_models import lora_matrices, trainable

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
