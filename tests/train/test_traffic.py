"""What processes send and hold: as docs/predict_traffic.py says; and DeepSpeed's ZeRO trains as one process does."""

from __future__ import annotations

import runpy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from loraover import read_checkpoint
from loraover.checkpoint.tensor_file import open_tensors

from support.parallel_run import deviation, equal
from support.parallel_traffic import CASES, Case
from support.parallel_trainer import STEPS
from support.parallel_trainer import run as train
from support.parallel_zero import CONFIGS, RUNS, alone
from support.processes import TESTS, TORCHRUN, launched

pytestmark = pytest.mark.process

DOCS = TESTS.parent / "docs"
PREDICTED: Any = runpy.run_path(str(DOCS / "predict_traffic.py"))
KINDS = {
    "allreduce_": "all-reduce",
    "_allgather_base_": "all-gather",
    "all_gather_into_tensor": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
}
FLAGS = 16
"""Bytes of DeepSpeed's messages on overflow and norms."""
KEPT = 0.02
"""Share of its messages that ZeRO 3 saves with checkpointing, where a recomputed layer ends with what comes next."""


def check(case: Case, found: dict[str, Any], processes: int) -> None:
    """Compare the counts of one process with the formulas."""
    model, width = PREDICTED["Model"](*found["numbers"]), 2 if case.is_short else 4
    expected = PREDICTED["messages"](case.mechanism, model, width=width, checkpointing=case.checkpointing)
    counted: Counter[str] = Counter()
    for name, size in found["messages"].items():
        if name != "broadcast_":  # by which DDP sends a buffer of the rotary embedding
            counted[KINDS[name]] += size
    for kind, size in expected.items():
        saved = KEPT * size if case.checkpointing and case.mechanism == "zero3" else 0
        assert size - saved <= counted[kind] <= size + FLAGS, (kind, counted, expected)
    held = PREDICTED["held"](case.mechanism, model, width=width, processes=processes)
    assert held <= found["held"] <= 1.01 * held  # parts are filled up to equal lengths


@pytest.fixture(scope="module")
def counts(zero_folder: Path) -> list[dict[str, Any]]:
    return [torch.load(zero_folder / f"traffic-{rank}.pt") for rank in range(2)]


@pytest.mark.matrix
@pytest.mark.parametrize("case", CASES, ids=str)
def test_two_processes_send_and_hold_what_is_predicted(case: Case, counts: list[dict[str, Any]]) -> None:
    for found in counts:
        check(case, found[str(case)], 2)


@pytest.mark.matrix
def test_four_processes_send_and_hold_what_is_predicted(tmp_path: Path) -> None:
    launched((*TORCHRUN[:-1], "4"), TESTS / "support" / "parallel_traffic.py", tmp_path)
    for rank in range(4):
        found = torch.load(tmp_path / f"traffic-{rank}.pt")
        for case in CASES:
            check(case, found[str(case)], 4)


def test_messages_that_go_round_in_a_ring() -> None:
    found = {"all-reduce": 800, "all-gather": 400, "reduce-scatter": 80}
    assert PREDICTED["sent"](found, 1) == 0
    assert PREDICTED["sent"](found, 4) == 0.75 * (1600 + 400 + 80)


@pytest.mark.matrix
def test_the_page_has_the_table_that_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    PREDICTED["main"]()
    assert capsys.readouterr().out in (DOCS / "scale.md").read_text()


TOLERANCE = 2e-5
"""Largest change of a number: sums of float32 gradients in another order, through six steps of a rate of 0.01."""


@pytest.fixture(scope="module")
def saw(zero_folder: Path) -> list[dict[str, Any]]:
    """What each process saw of its runs."""
    return [torch.load(zero_folder / f"{rank}.pt") for rank in range(2)]


@pytest.fixture(scope="module")
def one_process() -> dict[str, dict[str, Any]]:
    return {config: alone(config) for config in CONFIGS}


@pytest.mark.matrix
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


@pytest.mark.matrix
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


@pytest.mark.matrix
@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.usefixtures("saw")
def test_what_is_saved_is_a_plain_adapter_with_its_cores(stage: int, zero_folder: Path) -> None:
    checkpoint = read_checkpoint(zero_folder / f"trainer-{stage}")
    assert (checkpoint.meta.step, checkpoint.meta.world_size, len(checkpoint.sites)) == (STEPS, 2, 8)
    with open_tensors(checkpoint.tensors_path) as file:
        assert len(file.keys) == 28


@pytest.mark.matrix
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
