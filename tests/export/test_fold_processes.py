"""Folds in separate processes: permissions, full disks and signals leave a complete output or none."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

from loraover.common.command_line import INTERRUPTED

from support.checkpoint_damage import CONFIG, FILES, TENSORS
from support.children import Child, become_nobody, limit_file_size
from support.make_checkpoint import Made, make_checkpoint, tree
from support.refusals import fold, one_message, only_error

pytestmark = pytest.mark.process

WHOLE = {CONFIG, TENSORS, "fold_certificate.json", "fold.html", "figures", "README.md"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Tests copy it before they damage it."""
    return make_checkpoint(tmp_path_factory.mktemp("made"), tokenizer=True)


@pytest.fixture
def source(made: Made, tmp_path: Path) -> Path:
    return shutil.copytree(made.path, tmp_path / "input")


def fold_in_child(source: Path, output: Path, *options: str, prepare: Callable[[], object] = lambda: None) -> Child:
    return Child(lambda: fold(source, output, *options), prepare=prepare)


def assert_nothing_left(folder: Path, before: dict[str, str]) -> None:
    assert tree(folder) == before


@pytest.fixture
def public(made: Made) -> Iterator[Path]:
    """A folder that every user can enter, with a checkpoint in it that every user can read."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    shutil.copytree(made.path, folder / "input")
    for path in (folder / "input").rglob("*"):
        path.chmod(0o644)
    yield folder
    for path in folder.iterdir():
        path.chmod(0o755)
    shutil.rmtree(folder)


@pytest.mark.parametrize("mode", [0o555, 0o000], ids=oct)
@pytest.mark.parametrize("deep", ["", "deep/"])
def test_a_folder_without_permission_is_named(mode: int, deep: str, public: Path, tmp_path: Path) -> None:
    assert fold(public / "input", tmp_path / "warm") == 0
    target = public / "closed" / f"{deep}out"
    (public / "closed").mkdir()
    (public / "closed").chmod(mode)
    ended = fold_in_child(public / "input", target, prepare=become_nobody).end()
    assert ended.code == 2, ended.output
    message = one_message(ended.output)
    assert str(target) in message
    assert "Permission denied" in message
    (public / "closed").chmod(0o755)
    assert list((public / "closed").iterdir()) == []


@pytest.mark.parametrize("file", FILES)
def test_a_file_without_permission_is_named(file: str, public: Path, tmp_path: Path) -> None:
    assert fold(public / "input", tmp_path / "warm") == 0
    (public / "writable").mkdir()
    (public / "writable").chmod(0o777)
    (public / "input" / file).chmod(0o000)
    ended = fold_in_child(public / "input", public / "writable" / "out", prepare=become_nobody).end()
    assert ended.code == 2, ended.output
    message = one_message(ended.output)
    assert str(public / "input" / file) in message
    assert "ermission denied" in message
    assert list((public / "writable").iterdir()) == []


def test_a_file_size_limit_leaves_nothing(source: Path, tmp_path: Path) -> None:
    """Every size at which a file of the output may break, from none to more than enough."""
    before = tree(tmp_path)
    codes = []
    for size in (0, 1, 100, 1000, 1500, 2000, 3000, 4096, 6000, 8000, 12_000, 100_000):
        ended = fold_in_child(source, tmp_path / "out", prepare=lambda size=size: limit_file_size(size)).end()  # type: ignore[misc]
        codes.append(ended.code)
        if ended.code == 0:
            assert {path.name for path in (tmp_path / "out").iterdir()} == WHOLE
            shutil.rmtree(tmp_path / "out")
        else:
            message = only_error(ended.output)
            assert "File too large" in message
            assert str(tmp_path / "out") in message
        assert_nothing_left(tmp_path, before)
    assert codes == sorted(codes, reverse=True)
    assert set(codes) == {0, 2}


@pytest.fixture
def small_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file system of 64 KiB."""
    folder = tmp_path_factory.mktemp("disk")
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True) if shutil.which("mount") else None
    if done is None or done.returncode:
        pytest.skip(f"no permission to mount a small file system: {done.stderr if done else 'no mount command'}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_leaves_nothing(source: Path, tmp_path: Path, small_disk: Path) -> None:
    """From a disk with no page free to one with enough."""
    codes = []
    for free in range(0, 64, 4):
        filler = small_disk / "filler"
        filler.write_bytes(bytes((64 - free) * 1024))
        ended = fold_in_child(source, small_disk / "out").end()
        codes.append(ended.code)
        filler.unlink()
        if ended.code == 0:
            assert {path.name for path in (small_disk / "out").iterdir()} == WHOLE
            shutil.rmtree(small_disk / "out")
        else:
            message = only_error(ended.output)
            assert "No space left" in message
            assert str(small_disk / "out") in message
        assert list(small_disk.iterdir()) == []
    assert codes == sorted(codes, reverse=True)
    assert set(codes) == {0, 2}


def duration_s(source: Path, output: Path, *options: str) -> float:
    before = time.monotonic()
    assert fold_in_child(source, output, *options).end().code == 0
    return time.monotonic() - before


def assert_whole(output: Path, expected: Path) -> None:
    """All files are there, and the adapter is bit for bit what an undisturbed fold writes."""
    assert {path.name for path in output.iterdir()} == WHOLE
    json.loads((output / "fold_certificate.json").read_text())
    for name in (CONFIG, TENSORS):
        assert (output / name).read_bytes() == (expected / name).read_bytes()


DISTURBANCES = [pytest.param((), 30, id="fold"), pytest.param(("--check-error",), 8, id="check")]


@pytest.mark.parametrize(("options", "times"), DISTURBANCES)
def test_an_interrupted_fold_leaves_nothing(options: tuple[str, ...], times: int, source: Path, tmp_path: Path) -> None:
    expected, target = tmp_path / "expected", tmp_path / "out"
    longest = duration_s(source, expected, *options)
    before = tree(tmp_path)
    draw = random.Random(1)
    codes = set()
    for _ in range(times):
        child = fold_in_child(source, target, *options)
        time.sleep(draw.uniform(0.1, 1.1) * longest)
        os.kill(child.pid, signal.SIGINT)
        ended = child.end()
        codes.add(ended.code)
        assert ended.code in (0, 130), ended.output
        assert "Traceback" not in ended.output
        if target.exists():
            assert_whole(target, expected)
            shutil.rmtree(target)
        else:
            assert ended.code == 130
            assert "Interrupted" in ended.output
        assert_nothing_left(tmp_path, before)
    assert 130 in codes


@pytest.mark.parametrize(("options", "times"), DISTURBANCES)
def test_a_killed_fold_leaves_nothing_or_all(
    options: tuple[str, ...], times: int, source: Path, tmp_path: Path
) -> None:
    """Files that a kill leaves beside the destination are hidden, and do not hinder the next fold."""
    expected, target = tmp_path / "expected", tmp_path / "out"
    longest = duration_s(source, expected, *options)
    before = tree(source)
    draw = random.Random(2)
    killed = 0
    for _ in range(times):
        child = fold_in_child(source, target, *options)
        time.sleep(draw.uniform(0.1, 1.1) * longest)
        os.kill(child.pid, signal.SIGKILL)
        ended = child.end()
        assert ended.code in (0, -signal.SIGKILL), ended.output
        killed += ended.code != 0
        if target.exists():
            assert_whole(target, expected)
            shutil.rmtree(target)
        assert tree(source) == before
        left = {path.name for path in tmp_path.iterdir()} - {"input", "expected"}
        assert all(name.startswith(".out.") and name.endswith(".tmp") for name in left)
        assert len(left) <= 1, "the next run removes what a kill left"
    assert killed > 0
    assert fold(source, target) == 0
    assert_whole(target, expected)
    assert {path.name for path in tmp_path.iterdir()} == {"input", "expected", "out"}


def test_an_interrupt_at_any_line_leaves_nothing(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C between any two lines of ours, where a signal would have to hit by luck."""
    ours = tuple(
        str(Path(module.__file__ or "").parent) for module in (sys.modules["loraover"], sys.modules["loraover_export"])
    )
    count, stop, place = 0, -1, [""]

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal count
        if not frame.f_code.co_filename.startswith(ours) or frame.f_code.co_filename.endswith("command.py"):
            return None
        if event == "line":
            count += 1
            if count == stop:
                place[0] = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    def interrupted(at: int) -> int:
        nonlocal count, stop
        count, stop = 0, at
        sys.settrace(trace)
        try:
            return fold(source, tmp_path / "out")
        finally:
            sys.settrace(None)

    assert fold(source, tmp_path / "warm") == 0  # imports have lines too, once
    assert interrupted(-1) == 0
    (tmp_path / "out").rename(tmp_path / "expected")
    before, lines = tree(tmp_path), count
    assert lines > 500
    draw = random.Random(3)
    faults = []
    for at in [*draw.sample(range(1, lines - 200), 60), *range(lines - 200, lines, 4)]:
        code = interrupted(at)
        said = capsys.readouterr().err.splitlines()[-1:]
        published = (tmp_path / "out").exists()
        if published:
            assert_whole(tmp_path / "out", tmp_path / "expected")
            shutil.rmtree(tmp_path / "out")
        left = sorted(tree(tmp_path).keys() - before.keys())
        for path in tmp_path.glob(".out.*"):
            shutil.rmtree(path)
        if code not in (0, 130) or (code == 130 and said != [INTERRUPTED]) or left:
            faults.append(f"{place[0]}: exit code {code}, published: {published}, {said=}, {left=}")
    assert faults == []
    assert tree(tmp_path) == before


PATIENCE = 60
"""Seconds that a test waits for another process on a busy machine."""


def wait_for(file: Path) -> None:
    started = time.monotonic()
    while not file.exists() and time.monotonic() - started < PATIENCE:
        time.sleep(0.005)


SLOW = {
    "a matrix": "loraover_export.numerics.rounded_adapter.round_tensor",
    "a checksum": "loraover.checkpoint.checkpoint.sha256_of",
    "the file": "loraover_export.numerics.rounded_adapter.first_difference",
}


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGKILL], ids=["interrupt", "kill"])
@pytest.mark.parametrize("work", SLOW)
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
    assert_nothing_left(tmp_path, before)


def test_an_interrupt_while_libraries_load_is_one_line(source: Path, tmp_path: Path) -> None:
    command = [str(Path(sys.executable).with_name("loraover-export")), "fold", str(source), "-o", str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        mapped = Path(f"/proc/{process.pid}/maps")
        while "libtorch" not in mapped.read_text() and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate()
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert out == ""
    assert err.splitlines()[-1] == INTERRUPTED
    assert not (tmp_path / "out").exists()


def test_the_input_may_be_read_only(public: Path, tmp_path: Path) -> None:
    assert fold(public / "input", tmp_path / "warm") == 0
    (public / "writable").mkdir()
    (public / "writable").chmod(0o777)
    (public / "input").chmod(0o555)
    ended = fold_in_child(public / "input", public / "writable" / "out", prepare=become_nobody).end()
    assert ended.code == 0, ended.output
    assert_whole(public / "writable" / "out", tmp_path / "warm")
    assert stat.S_IMODE((public / "input").stat().st_mode) == 0o555
