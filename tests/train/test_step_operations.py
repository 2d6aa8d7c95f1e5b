"""What LoRA-Over adds to an optimizer step is a number of operations that does not grow with the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from loraover.overparam.fingerprint import LateAnswer

from benchmarks.step_overhead import ARMS, EIGEN, make_step

AT_MOST = {"mpo": 120, EIGEN: 190, "eigen, bases at rest": 120}


@pytest.mark.parametrize("arm", AT_MOST)
def test_operations_are_few_and_the_same_for_every_number_of_layers(arm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for layers in (2, 3):
        step = make_step(ARMS[arm], layers, torch.device("cpu"))
        for _ in range(3):
            step.timed()
        counted = step.counted()
        assert counted.readings() == 1  # whether A or B were changed outside the step, which a CPU answers at once
        found.append(counted.operations())
    assert found[0] == found[1] <= AT_MOST[arm]
    monkeypatch.setattr(LateAnswer, "ask", _without_an_answer)
    assert step.counted().readings() == 0


def _without_an_answer(self: LateAnswer, differs: Any) -> None:
    pass
