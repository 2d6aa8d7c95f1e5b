"""Folds on several threads: the same bytes as on one, the errors of the threads, and what a fold does not load."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor

from loraover.adapters.numerics import rounding
from loraover.adapters.numerics.rounding import write_rounded
from loraover.checkpoint.checkpoint import open_checkpoint
from loraover.common.errors import CheckpointError
from loraover.common.threads import workers
from loraover_export import fold_checkpoint

from support.checkpoint_damage import CONFIG, CORES, TENSORS
from support.faults import Rounding
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
def two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(rounding, "SMALL", 0)
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


def test_an_exception_in_a_thread_is_the_callers(made: Made, tmp_path: Path, wrong_rounding: Rounding) -> None:
    def fail(matrix: Tensor) -> Tensor:
        assert threading.current_thread() is not threading.main_thread()
        raise LookupError("a fault in a thread")

    wrong_rounding(fail)
    with pytest.raises(LookupError, match="a fault in a thread"):
        fold_checkpoint(made.path, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("times", "most"), [(0.99, 2), (1.01, 1)])
def test_one_thread_rounds_small_matrices(
    times: float, most: int, made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = [math.prod(shape) for shape in open_checkpoint(made.path).shapes.values()]
    monkeypatch.setattr(rounding, "SMALL", times * sum(sizes) / len(sizes))
    monkeypatch.setattr(rounding, "MAX_WORKERS", 2)
    with mock.patch.object(rounding, "workers", wraps=workers) as started:
        fold_checkpoint(made.path, tmp_path / "out")
    assert started.call_args_list[0] == mock.call(most)


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


def test_a_checksum_on_a_slow_disk_is_waited_for(made: Made, tmp_path: Path) -> None:
    """Every matrix is ready before it is; nothing is written until it is right."""
    checkpoint, folded = open_checkpoint(made.path), threading.Event()
    count = len(checkpoint.shapes)

    def write(fails: bool) -> None:
        def late(ending: threading.Event) -> None:
            assert folded.wait(20)
            assert not (tmp_path / TENSORS).exists()
            if fails:
                raise CheckpointError("its SHA-256 differs")

        folded.clear()
        on_tensor = lambda done: folded.set() if done == count else None  # noqa: E731
        write_rounded(checkpoint, checkpoint.shapes, tmp_path, "fp32", on_tensor=on_tensor, beside=[late])

    with pytest.raises(CheckpointError, match="its SHA-256 differs"):
        write(fails=True)
    assert list(tmp_path.iterdir()) == []
    write(fails=False)
    assert (tmp_path / TENSORS).is_file()


def test_a_fold_loads_neither_transformers_nor_peft(made: Made, tmp_path: Path) -> None:
    program = (
        "import sys; from loraover_export import fold_checkpoint; fold_checkpoint(sys.argv[1], sys.argv[2]); "
        "print(sorted({'transformers', 'peft', 'accelerate', 'datasets'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", program, str(made.path), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[]"]


@pytest.mark.parametrize("given", [{}, {"OPENBLAS_THREAD_TIMEOUT": "20"}])
def test_a_command_lets_numpys_threads_sleep_and_keeps_their_number(given: dict[str, str]) -> None:
    """PyTorch for ARM multiplies by OpenBLAS too, and so do servers that a command starts."""
    program = (
        "import os; from loraover.cli import main; import numpy; from threadpoolctl import threadpool_info; "
        "found = [each['num_threads'] for each in threadpool_info() if each['internal_api'] == 'openblas']; "
        "print(os.environ['OPENBLAS_THREAD_TIMEOUT'], found)"
    )
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "2"}
    environment.pop("OPENBLAS_THREAD_TIMEOUT", None)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment | given
    )
    assert done.stdout.splitlines() == [f"{given.get('OPENBLAS_THREAD_TIMEOUT', '4')} [2]"]
