"""Folds in separate processes: what may not be read, and signals, leave a complete output or none."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from loraover.common.command_line import INTERRUPTED

from support.checkpoint_damage import CONFIG, FILES, TENSORS
from support.children import Child, Ended, become_nobody, limit_file_size
from support.make_checkpoint import Made, tree
from support.refusals import fold, only_error

pytestmark = pytest.mark.process

WHOLE = {CONFIG, TENSORS, "fold_certificate.json", "fold.html", "README.md"}


@pytest.fixture
def source(made: Made, tmp_path: Path) -> Path:
    return shutil.copytree(made.path, tmp_path / "input")


@pytest.fixture
def public(made: Made) -> Iterator[Path]:
    """A folder that every user can enter, with a checkpoint in it that every user can read."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    shutil.copytree(made.path, folder / "input")
    for path in (folder / "input").rglob("*"):
        path.chmod(0o644)
    (folder / "writable").mkdir()
    (folder / "writable").chmod(0o777)
    yield folder
    for path in folder.iterdir():
        path.chmod(0o755)
    shutil.rmtree(folder)


def fold_as_nobody(public: Path) -> Ended:
    """Fold in a child without privileges, to a folder that it may write to."""
    output = public / "writable" / "out"
    return Child(lambda: fold(public / "input", output), prepare=become_nobody).end()


def test_a_file_without_permission_is_named(public: Path) -> None:
    for file in FILES:
        (public / "input" / file).chmod(0o000)
        ended = fold_as_nobody(public)
        assert ended.code == 2, ended.output
        message = only_error(ended.output)
        assert str(public / "input" / file) in message
        assert "ermission denied" in message
        assert list((public / "writable").iterdir()) == []
        (public / "input" / file).chmod(0o644)


def test_the_input_may_be_read_only(made: Made, public: Path, tmp_path: Path) -> None:
    assert fold(made.path, tmp_path / "expected") == 0
    (public / "input").chmod(0o555)
    ended = fold_as_nobody(public)
    assert ended.code == 0, ended.output
    assert_whole(public / "writable" / "out", tmp_path / "expected")
    assert stat.S_IMODE((public / "input").stat().st_mode) == 0o555


def test_a_file_size_limit_leaves_nothing(source: Path, tmp_path: Path) -> None:
    before = tree(tmp_path)
    ended = Child(lambda: fold(source, tmp_path / "out"), prepare=lambda: limit_file_size(1500)).end()
    assert ended.code == 2
    message = only_error(ended.output)
    assert str(tmp_path / "out") in message
    assert "File too large" in message
    assert tree(tmp_path) == before


def assert_whole(output: Path, expected: Path) -> None:
    """All files are there, and the adapter is bit for bit what an undisturbed fold writes."""
    assert {path.name for path in output.iterdir()} == WHOLE
    json.loads((output / "fold_certificate.json").read_text())
    for name in (CONFIG, TENSORS):
        assert (output / name).read_bytes() == (expected / name).read_bytes()


PATIENCE = 60
"""Seconds that a test waits for another process on a busy machine."""


def wait_for(file: Path) -> None:
    started = time.monotonic()
    while not file.exists() and time.monotonic() - started < PATIENCE:
        time.sleep(0.005)


SLOW = {
    "a matrix": "loraover.adapters.numerics.rounding.round_tensor",
    "a checksum": "loraover.checkpoint.checkpoint.sha256_of",
    "the file": "loraover.adapters.numerics.rounding.first_other",
}


@pytest.mark.parametrize(
    ("work", "signal_number"), [*((work, signal.SIGINT) for work in SLOW), ("a matrix", signal.SIGKILL)]
)
def test_a_fold_whose_threads_are_at_work_leaves_nothing(
    work: str, signal_number: signal.Signals, source: Path, tmp_path: Path
) -> None:
    """The signal comes while two threads work on what a large adapter keeps them busy with."""
    before = tree(tmp_path)
    at_work, signalled = (tmp_path.with_name(f"{tmp_path.name}-{word}") for word in ("at-work", "signalled"))
    module_name, _, name = SLOW[work].rpartition(".")
    module = import_module(module_name)

    def slowed() -> int:
        function = getattr(module, name)

        def slow(*arguments: Any) -> Any:
            at_work.touch()
            wait_for(signalled)
            return function(*arguments)

        setattr(module, name, slow)
        torch.set_num_threads(2)
        code = fold(source, tmp_path / "out")
        return code if threading.active_count() == 1 else 98

    child = Child(slowed)
    started = time.monotonic()
    wait_for(at_work)
    os.kill(child.pid, signal_number)
    signalled.touch()
    ended = child.end()
    assert time.monotonic() - started < PATIENCE
    if signal_number == signal.SIGKILL:
        assert ended.code == -signal.SIGKILL
        assert all(path.name.startswith(".out.") for path in tmp_path.iterdir() if path.name != "input")
        assert fold(source, tmp_path / "warm") == 0
        assert fold(source, tmp_path / "out") == 0, "it removes what the kill left"
        assert_whole(tmp_path / "out", tmp_path / "warm")
        assert {path.name for path in tmp_path.iterdir()} == {"input", "out", "warm"}
        return
    assert ended.code == 130, ended.output
    assert ended.output.splitlines()[-1] == INTERRUPTED
    assert "Traceback" not in ended.output
    assert tree(tmp_path) == before


def test_an_interrupt_while_libraries_load_is_one_line(source: Path, tmp_path: Path) -> None:
    command = [str(Path(sys.executable).with_name("loraover-export")), "fold", str(source), "-o", str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        mapped = Path(f"/proc/{process.pid}/maps")
        while "_multiarray_umath" not in mapped.read_text() and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate()
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert out == ""
    assert err.splitlines()[-1] == INTERRUPTED
    assert not (tmp_path / "out").exists()
