"""The callback in a Trainer that shards with FSDP2 in two processes, whichever form its checkpoints have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from loraover import read_checkpoint

from support.parallel_fsdp_trainer import STATE_DICTS
from support.parallel_run import equal
from support.parallel_trainer import STEPS, run
from support.processes import TESTS, TORCHRUN, launched

pytestmark = [pytest.mark.process, pytest.mark.matrix]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trainer")
    launched(TORCHRUN, TESTS / "support" / "parallel_fsdp_trainer.py", folder)
    return folder


@pytest.mark.parametrize("kind", STATE_DICTS)
def test_a_sharded_run_logs_what_one_process_does_and_resumes_bit_for_bit(
    kind: str, folder: Path, tmp_path: Path
) -> None:
    alone = run(tmp_path, rows=4, dropout=0.0)
    for found in (torch.load(folder / f"{rank}.pt")[kind] for rank in range(2)):
        whole: dict[str, Any] = found["whole"]
        assert whole["logged"] == pytest.approx(alone["logged"], rel=1e-6)
        assert [each["chosen"] for each in whole["rounds"]] == [each["chosen"] for each in alone["rounds"]]
        resumed = found["resumed"]
        assert resumed["losses"] == whole["losses"][len(whole["losses"]) // 2 :]
        assert equal(resumed["cores"], whole["cores"])
        assert resumed["rounds"] == whole["rounds"]


@pytest.mark.parametrize("kind", STATE_DICTS)
def test_every_checkpoint_holds_the_adapter_and_its_cores(kind: str, folder: Path) -> None:
    for name in ("", "checkpoint-3", f"checkpoint-{STEPS}"):
        checkpoint = read_checkpoint(folder / kind / name)
        assert (checkpoint.meta.world_size, len(checkpoint.sites)) == (2, 4 if name == "checkpoint-3" else 8)
