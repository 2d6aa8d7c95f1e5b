"""The callback in a Trainer that torchrun starts in two processes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from loraover import read_checkpoint
from loraover.callbacks.seal_checkpoints import Seal, last_whole_checkpoint
from loraover.checkpoint.checkpoint import SEAL_FILE
from loraover.checkpoint.tensor_file import open_tensors
from loraover.common.strict_json import read_json

from support.parallel_run import equal
from support.parallel_trainer import STEPS, run
from support.processes import TESTS, TORCHRUN, launched

pytestmark = [pytest.mark.process, pytest.mark.matrix]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trainer")
    launched(TORCHRUN, TESTS / "support" / "parallel_trainer.py", folder)
    return folder


@pytest.fixture(scope="module")
def saw(folder: Path) -> list[dict[str, Any]]:
    """What each process saw of its runs."""
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize(("kind", "chosen"), [("whole", [4, 4]), ("static", [14])])
def test_the_processes_stay_equal_bit_for_bit(kind: str, chosen: list[int], saw: list[dict[str, Any]]) -> None:
    first, second = (found[kind] for found in saw)
    assert first["losses"] != second["losses"]
    assert equal(first["matrices"], second["matrices"])
    assert equal(first["cores"], second["cores"])
    assert first["rounds"] == second["rounds"]
    assert [len(found["chosen"]) for found in first["rounds"]] == chosen


def test_a_resumed_run_equals_an_uninterrupted_one(saw: list[dict[str, Any]]) -> None:
    for whole, resumed in ((found["whole"], found["resumed"]) for found in saw):
        assert resumed["losses"] == whole["losses"][len(whole["losses"]) // 2 :]
        assert equal(resumed["matrices"], whole["matrices"])
        assert equal(resumed["cores"], whole["cores"])
        assert resumed["rounds"] == whole["rounds"]


def test_two_processes_log_what_one_does_at_their_global_batch(saw: list[dict[str, Any]], tmp_path: Path) -> None:
    alone = run(tmp_path, rows=4, dropout=0.0)
    assert saw[0]["apart"]["logged"] == pytest.approx(alone["logged"], rel=1e-5)
    assert [found["chosen"] for found in saw[0]["apart"]["rounds"]] == [found["chosen"] for found in alone["rounds"]]


def test_training_leaves_a_checkpoint_of_both_processes(folder: Path, saw: list[dict[str, Any]]) -> None:
    checkpoint = read_checkpoint(folder / "run")
    assert (checkpoint.meta.step, checkpoint.meta.world_size, len(checkpoint.sites)) == (STEPS, 2, 8)
    with open_tensors(checkpoint.tensors_path) as file:
        stored = {key: file.read(key) for key in file.keys}
    assert equal(stored, {key.replace(".default", ""): matrix for key, matrix in saw[0]["whole"]["matrices"].items()})


def test_only_rank_0_writes_but_for_random_states(folder: Path) -> None:
    written = {path.name for path in (folder / "apart-1").rglob("*") if path.is_file()}
    assert written == {"rng_state_1.pth"}


def test_a_checkpoint_is_whole_and_sealed_with_every_processs_part(folder: Path) -> None:
    newest = last_whole_checkpoint(folder / "run")
    assert newest == folder / "run" / f"checkpoint-{STEPS}"
    checkpoint = read_checkpoint(newest)
    assert (checkpoint.meta.world_size, len(checkpoint.sites)) == (2, 8)
    assert {"rng_state_0.pth", "rng_state_1.pth"} < read_json(newest / SEAL_FILE, Seal).files.keys()


def test_one_process_goes_on_for_two(folder: Path, saw: list[dict[str, Any]], tmp_path: Path) -> None:
    left = Path(shutil.copytree(folder / "apart-0" / "checkpoint-3", tmp_path / "checkpoint-3"))
    found = run(tmp_path, left, rows=4, dropout=0.0)
    assert found["logged"] == pytest.approx(saw[0]["apart"]["logged"], rel=1e-5)
    assert [each["chosen"] for each in found["rounds"]] == [each["chosen"] for each in saw[0]["apart"]["rounds"]]
