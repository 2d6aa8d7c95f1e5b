"""DeepSpeed's ZeRO: processes hold pieces of the matrices, and training is as in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from loraover import read_checkpoint
from loraover.checkpoint.tensor_file import open_tensors

from support.parallel_run import deviation, equal
from support.parallel_trainer import STEPS
from support.parallel_trainer import run as train
from support.parallel_zero import CONFIGS, RUNS, alone

pytestmark = pytest.mark.process

TOLERANCE = 2e-5
"""Largest change of a number: sums of float32 gradients in another order, through six steps of a rate of 0.01."""


@pytest.fixture(scope="module")
def saw(zero_folder: Path) -> list[dict[str, Any]]:
    """What each process saw of its runs."""
    return [torch.load(zero_folder / f"{rank}.pt") for rank in range(2)]


@pytest.fixture(scope="module")
def one_process() -> dict[str, dict[str, Any]]:
    return {config: alone(config) for config in CONFIGS}


@pytest.mark.parametrize("name", RUNS)
def test_every_stage_trains_as_one_process_does(
    name: str, saw: list[dict[str, Any]], one_process: dict[str, dict[str, Any]]
) -> None:
    first, second = (found[name] for found in saw)
    expected = one_process[RUNS[name][1]]
    assert first["losses"] == pytest.approx(expected["losses"], rel=1e-6)
    assert deviation(first["matrices"], expected["matrices"]) < TOLERANCE
    assert [found["chosen"] for found in first["rounds"]] == [found["chosen"] for found in expected["rounds"]]
    assert first["step"] == second["step"] == STEPS
    assert equal(first["matrices"], second["matrices"])
    assert equal(first["cores"], second["cores"])


@pytest.mark.parametrize("stage", [2, 3])
def test_the_trainer_logs_what_one_process_does_and_resumes(
    stage: int, saw: list[dict[str, Any]], tmp_path: Path
) -> None:
    one = train(tmp_path, rows=4, dropout=0.0)
    for found in (each[f"trainer-{stage}"] for each in saw):
        whole, resumed = found["whole"], found["resumed"]
        assert whole["logged"] == pytest.approx(one["logged"], rel=1e-5)
        assert [each["chosen"] for each in whole["rounds"]] == [each["chosen"] for each in one["rounds"]]
        assert resumed["losses"] == whole["losses"][len(whole["losses"]) // 2 :]
        assert equal(resumed["cores"], whole["cores"])


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.usefixtures("saw")
def test_what_is_saved_is_a_plain_adapter_with_its_cores(stage: int, zero_folder: Path) -> None:
    checkpoint = read_checkpoint(zero_folder / f"trainer-{stage}")
    assert (checkpoint.meta.step, checkpoint.meta.world_size, len(checkpoint.sites)) == (STEPS, 2, 8)
    with open_tensors(checkpoint.tensors_path) as file:
        assert len(file.keys) == 28


@pytest.mark.parametrize(
    ("case", "named"),
    [
        ("groups", "the 2 parameter groups"),
        ("parts", "ZeRO 3 steps a group of this model's trained parameters in"),
        ("measured", "gives no gradients outside of a training step"),
        ("experts", "LoRA of experts is not supported under DeepSpeed's ZeRO"),
    ],
)
def test_what_zero_cannot_train_is_refused_in_every_process(case: str, named: str, saw: list[dict[str, Any]]) -> None:
    for found in saw:
        assert named in found["refused"][case]
        assert "not known here" not in found["refused"][case]  # as of another version of DeepSpeed
