"""Fingerprints notice every change of a matrix, and an accelerator's answer is read a step late or at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from loraover import OverParameterization
from loraover.common.errors import ConfigError
from loraover.overparam.fingerprint import LateAnswer, fingerprints

from strategies import SEEDS, normal
from support.apple import apple_gpu
from support.hooked_run import make, train
from support.make_checkpoint import save
from support.speed import examples
from support.tiny_models import tiny_net

# Fingerprints

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16}


def drawn(data: st.DataObject, dtype: torch.dtype) -> Tensor:
    """Three matrices of 2 to 40 numbers, of which few differ, so that bits and values repeat."""
    count = data.draw(st.integers(2, 40))
    kind = data.draw(st.sampled_from(["normal", "signs", "powers"]))
    values = normal(data.draw(SEEDS), 3, count, 1)
    if kind == "signs":
        values = values.sign()
    if kind == "powers":
        values = 2.0 ** (4 * values).round()
    return values.to(dtype)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@given(data=st.data())
@examples(100)
def test_any_flipped_bit_is_noticed(dtype: torch.dtype, data: st.DataObject) -> None:
    matrices = drawn(data, dtype)
    bits = 8 * dtype.itemsize
    at, bit = data.draw(st.integers(0, matrices[0].numel() - 1)), data.draw(st.integers(0, bits - 1))
    changed = matrices.clone()
    integers = changed.view(INTEGERS[dtype.itemsize])
    integers[1].view(-1)[at] ^= -(2 ** (bits - 1)) if bit == bits - 1 else 2**bit
    assert (fingerprints(changed) != fingerprints(matrices)).tolist() == [False, True, False]


def changes(matrices: Tensor, i: int, j: int) -> dict[str, Tensor]:
    """What a sum of bits alone would overlook."""
    swapped, signs = matrices.clone(), matrices.clone()
    swapped[1, [i, j]] = matrices[1, [j, i]]
    signs[1, [i, j]] *= -1
    return {"swapped": swapped, "signs": signs}


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@given(data=st.data())
@examples(100)
def test_two_swapped_elements_and_two_flipped_signs_are_noticed(dtype: torch.dtype, data: st.DataObject) -> None:
    matrices = drawn(data, dtype)
    i, j = data.draw(st.lists(st.integers(0, matrices[0].numel() - 1), min_size=2, max_size=2, unique=True))
    for changed in changes(matrices, i, j).values():
        is_changed = not torch.equal(changed, matrices)
        assert (fingerprints(changed) != fingerprints(matrices)).tolist() == [False, is_changed, False]


def test_fingerprints_depend_on_bits_alone() -> None:
    zeros = torch.zeros(2, 3, 4)
    zeros[1] *= -1
    assert len(set(fingerprints(zeros).tolist())) == 2
    nan = torch.full((1, 3, 4), torch.nan)
    assert torch.equal(fingerprints(nan), fingerprints(nan.clone()))
    strided = normal(0, 2, 4, 3).mT
    assert torch.equal(fingerprints(strided), fingerprints(strided.contiguous()))
    assert fingerprints(torch.zeros(2, 0, 4)).tolist() == [0, 0]  # a process's share of a small matrix


# An accelerator's late answer


class Accelerator(LateAnswer):
    """As on an accelerator: what is asked now is answered when the next question comes."""

    def __init__(self) -> None:
        super().__init__()
        self.on_its_way: list[list[bool]] | None = None

    def ask(self, differs: Any) -> list[list[bool]] | None:
        before, self.on_its_way = self.on_its_way, [flags.tolist() for flags in differs]
        return before if before is not None and any(map(any, before)) else None

    def settle(self) -> list[list[bool]] | None:
        before, self.on_its_way = self.on_its_way, None
        return before if before is not None and any(map(any, before)) else None


def late(**config: Any) -> tuple[Any, OverParameterization, Any]:
    model, over, optimizer = make(**config)
    over._late = Accelerator()
    train(model, optimizer, range(2))
    return model, over, optimizer


def test_a_changed_matrix_is_named_one_step_late() -> None:
    model, over, optimizer = late()
    over.sites["second.lora_B"].parameter.data.mul_(2)
    train(model, optimizer, range(2, 3))
    with pytest.raises(ConfigError, match=r"first second\.lora_B, were changed outside"):
        train(model, optimizer, range(3, 4))


ASKING: dict[str, Callable[[OverParameterization, Any, Path], Any]] = {
    "save": lambda over, model, folder: save(folder, model, over, step=2),
    "finish": lambda over, model, folder: over.finish(),
    "inject": lambda over, model, folder: over.inject(["first.lora_A"]),
    "check": lambda over, model, folder: over.check_unchanged(),
}


@pytest.mark.parametrize("when", ["before the step", "after the step"])
@pytest.mark.parametrize("asking", ASKING)
def test_saving_finishing_and_injecting_ask_at_once(asking: str, when: str, tmp_path: Path) -> None:
    """A matrix changed since the last step, and one that the last step has overwritten meanwhile."""
    model, over, optimizer = late(sites=["second.*", "third.*", "first.lora_B"])
    over.sites["second.lora_B"].parameter.data.mul_(2)
    if when == "before the step":
        train(model, optimizer, range(2, 3))
    with pytest.raises(ConfigError, match=r"first second\.lora_B, were changed outside"):
        ASKING[asking](over, model, tmp_path)


def test_adopting_matrices_forgets_the_question() -> None:
    model, over, optimizer = late()
    over.sites["second.lora_B"].parameter.data.mul_(2)
    assert over.adopt_matrices() == ["second.lora_B"]
    train(model, optimizer, range(2, 5))
    over.finish()


def test_a_processor_answers_at_once() -> None:
    answer = LateAnswer()
    assert answer.ask([torch.tensor([False, False])]) is None
    assert answer.ask([torch.tensor([False]), torch.tensor([False, True])]) == [[False], [False, True]]
    assert answer.ask([]) is None
    assert answer.settle() is None


def test_a_device_that_answers_late_is_read_at_the_next_question() -> None:
    """The flags' own path, on a stand-in for an Apple GPU."""

    def there(*flags: bool) -> Tensor:
        return torch.tensor(flags, device="mps")

    answer = LateAnswer()
    with apple_gpu(tiny_net()):
        assert answer.ask([there(False, True), there(False)]) is None
        assert answer.ask([there(False)]) == [[False, True], [False]]
        assert answer.ask([there(True)]) is None
        assert answer.settle() == [[True]]
        assert answer.settle() is None
