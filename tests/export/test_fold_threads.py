"""Folds on several threads: the same bytes as on one, the errors of the threads, and what a fold does not load."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from loraover.adapters.numerics import rounding
from loraover.adapters.numerics.matrix_certificate import certify
from loraover.checkpoint.checkpoint import Checkpoint
from loraover.common.errors import CheckpointError
from loraover_export import fold_checkpoint

from support.checkpoint_damage import CONFIG, CORES, TENSORS
from support.make_checkpoint import LINEAR, Made, edit_tensors, make_checkpoint, reseal, tree

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Tests copy it before they damage it."""
    return make_checkpoint(tmp_path_factory.mktemp("made"), target_modules=LINEAR)


@pytest.fixture
def source(made: Made, tmp_path: Path) -> Path:
    return shutil.copytree(made.path, tmp_path / "input")


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before, alive = torch.get_num_threads(), threading.active_count()
    torch.set_num_threads(2)
    yield
    assert torch.get_num_threads() == 2
    assert threading.active_count() == alive
    torch.set_num_threads(before)


def test_the_number_of_threads_changes_no_bit(made: Made, tmp_path: Path) -> None:
    certificates = {}
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        certificates[threads] = fold_checkpoint(made.path, tmp_path / str(threads)).matrices
    torch.set_num_threads(2)
    assert certificates[1] == certificates[2] == certificates[3]
    assert len({(tmp_path / str(threads) / TENSORS).read_bytes() for threads in certificates}) == 1
    assert len({(tmp_path / str(threads) / CONFIG).read_bytes() for threads in certificates}) == 1


@pytest.mark.parametrize("place", ["round_tensor", "certify"])
def test_an_exception_in_a_thread_is_the_callers(
    place: str, made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> None:
        assert threading.current_thread() is not threading.main_thread()
        raise LookupError(f"a fault in {place}")

    monkeypatch.setattr(rounding, place, fail)
    with pytest.raises(LookupError, match=f"^a fault in {place}$"):
        fold_checkpoint(made.path, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("file", [CORES, TENSORS])
def test_a_damaged_file_is_named_before_what_its_damage_does(file: str, source: Path, tmp_path: Path) -> None:
    """The matrices are refused while the checksums are still compared."""
    before = tree(source)
    edit_tensors(source / file, lambda found: next(iter(found.values())).fill_(float("nan")))
    with pytest.raises(CheckpointError, match=f"{file}: its SHA-256 differs"):
        fold_checkpoint(source, tmp_path / "out")
    reseal(source)
    with pytest.raises(CheckpointError, match=f"{file}: .* holds NaN"):
        fold_checkpoint(source, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"input"}
    assert tree(source).keys() == before.keys()


def test_the_checksum_of_a_slow_disk_is_waited_for(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every matrix is ready before the checksums are; nothing is published until they are right."""
    folded = threading.Event()
    check_sum = Checkpoint.check_sum

    def late(self: Checkpoint, name: str, ending: threading.Event | None = None) -> None:
        if name == CORES:
            assert folded.wait(20)
        check_sum(self, name, ending)

    def certified(*arguments: Any) -> Any:
        found = certify(*arguments)
        if found.name == last:
            folded.set()
        return found

    last = "model.layers.1.self_attn.v_proj.lora_B"
    monkeypatch.setattr(Checkpoint, "check_sum", late)
    monkeypatch.setattr(rounding, "certify", certified)
    assert fold_checkpoint(source, tmp_path / "out").passed
    assert (tmp_path / "out" / TENSORS).is_file()


def test_a_fold_loads_neither_transformers_nor_peft(made: Made, tmp_path: Path) -> None:
    program = (
        "import sys; from loraover_export import fold_checkpoint; fold_checkpoint(sys.argv[1], sys.argv[2]); "
        "print(sorted({'transformers', 'peft', 'accelerate', 'datasets'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", program, str(made.path), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[]"]
