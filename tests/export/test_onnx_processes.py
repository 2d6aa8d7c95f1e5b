"""ONNX exports without permission, on full disks, interrupted or killed: an output is complete or absent."""

from __future__ import annotations

import fcntl
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from support.children import Child, Ended, become_nobody, limit_file_size
from support.make_checkpoint import tree
from support.onnx_export import OnnxMade, export, read_report
from support.versions import TOKENIZER_FILES

pytestmark = pytest.mark.engine

WHOLE = {
    "model.onnx",
    "model.onnx.data",
    "genai_config.json",
    *TOKENIZER_FILES,
    "onnx_report.json",
    "README.md",
}
MERGED = ("--mode", "merged")


def in_child(
    source: Path, output: Path, *options: str, mode: str = "merged", prepare: Callable[[], object] = lambda: None
) -> Child:
    return Child(lambda: export(source, output, "--mode", mode, *options), prepare=prepare)


def only_error(ended: Ended) -> str:
    """The one message of a refusal."""
    assert ended.code == 2, ended.output
    assert "Traceback" not in ended.output
    (message,) = (line for line in ended.output.splitlines() if line.startswith("error: "))
    return message


def assert_whole(output: Path) -> None:
    assert {path.name for path in output.iterdir()} == WHOLE
    assert read_report(output).verdict in ("passed", "not checked")


@pytest.fixture(scope="module")
def warm(made: OnnxMade, tmp_path_factory: pytest.TempPathFactory) -> float:
    """Everything is imported; seconds that an export takes then, in a child."""
    folder = tmp_path_factory.mktemp("warm")
    assert export(made.folder / "first", folder / "imported", *MERGED) == 0
    before = time.monotonic()
    assert in_child(made.folder / "first", folder / "out").end().code == 0
    return time.monotonic() - before


@pytest.fixture
def public(made: OnnxMade) -> Iterator[Path]:
    """A folder that every user can enter, with the model and the adapter for every user to read."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    for name in ("base", "first"):
        shutil.copytree(made.folder / name, folder / name)
        for path in (folder / name).iterdir():
            path.chmod(0o644)
    yield folder
    for path in folder.iterdir():
        path.chmod(0o755)
    shutil.rmtree(folder)


@pytest.mark.usefixtures("warm")
@pytest.mark.parametrize("mode", [0o555, 0o000], ids=oct)
def test_a_folder_without_permission_is_named(mode: int, public: Path) -> None:
    (public / "closed").mkdir()
    (public / "closed").chmod(mode)
    options = ("--model", str(public / "base"))
    message = only_error(in_child(public / "first", public / "closed" / "out", *options, prepare=become_nobody).end())
    assert str(public / "closed" / "out") in message
    assert "Permission denied" in message
    (public / "closed").chmod(0o755)
    assert list((public / "closed").iterdir()) == []


@pytest.mark.usefixtures("warm")
def test_inputs_may_be_read_only(public: Path) -> None:
    (public / "writable").mkdir()
    (public / "writable").chmod(0o777)
    (public / "first").chmod(0o555)
    (public / "base").chmod(0o555)
    options = ("--model", str(public / "base"))
    ended = in_child(public / "first", public / "writable" / "out", *options, prepare=become_nobody).end()
    assert ended.code == 0, ended.output
    assert_whole(public / "writable" / "out")


@pytest.mark.usefixtures("warm")
@pytest.mark.parametrize("mode", ["merged", "swappable"])
def test_a_file_size_limit_leaves_nothing(mode: str, made: OnnxMade, tmp_path: Path) -> None:
    """The copy of the model, the graph's weights and its structure: each breaks at another size."""
    codes = []
    for size in (0, 100, 1000, 4096, 250_000, 290_000, 300_000, 400_000):
        options = ("--mode", mode, "--no-check")
        ended = in_child(
            made.folder / "first", tmp_path / "out", *options, prepare=partial(limit_file_size, size)
        ).end()
        codes.append(ended.code)
        if ended.code == 0:
            shutil.rmtree(tmp_path / "out")
        else:
            assert "too large" in only_error(ended), size
        assert list(tmp_path.iterdir()) == []
    assert codes == sorted(codes, reverse=True)
    assert set(codes) == {0, 2}


@pytest.fixture
def small_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path_factory.mktemp("disk")
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True) if shutil.which("mount") else None
    if done is None or done.returncode:
        pytest.skip(f"no permission to mount a small file system: {done.stderr if done else 'no mount command'}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.usefixtures("warm")
def test_a_full_disk_leaves_nothing(made: OnnxMade, small_disk: Path) -> None:
    """From a disk with no page free to one with enough."""
    codes = []
    for free in (0, 4, 200, 300, 400, 600, 660, 1024):
        (small_disk / "filler").write_bytes(bytes((1024 - free) * 1024))
        ended = in_child(made.folder / "first", small_disk / "out", "--no-check").end()
        (small_disk / "filler").unlink()
        codes.append(ended.code)
        if ended.code == 0:
            assert_whole(small_disk / "out")
            shutil.rmtree(small_disk / "out")
        else:
            assert "No space left" in only_error(ended), free
        assert list(small_disk.iterdir()) == []
    assert codes == sorted(codes, reverse=True)
    assert set(codes) == {0, 2}


def test_an_interrupted_export_leaves_nothing(made: OnnxMade, warm: float, tmp_path: Path) -> None:
    draw, codes = random.Random(1), set()
    for _ in range(6):
        child = in_child(made.folder / "first", tmp_path / "out")
        time.sleep(draw.uniform(0.05, 1.1) * warm)
        os.kill(child.pid, signal.SIGINT)
        ended = child.end()
        codes.add(ended.code)
        assert ended.code in (0, 130), ended.output
        assert "Traceback" not in ended.output
        if (tmp_path / "out").exists():
            assert_whole(tmp_path / "out")
            shutil.rmtree(tmp_path / "out")
        else:
            assert "Interrupted" in ended.output
        assert list(tmp_path.iterdir()) == []
    assert 130 in codes


def test_a_killed_export_leaves_nothing_or_all(made: OnnxMade, warm: float, tmp_path: Path) -> None:
    """Files that a kill leaves beside the destination are hidden, and do not hinder the next export."""
    draw, before, killed = random.Random(2), tree(made.folder), 0
    for _ in range(6):
        child = in_child(made.folder / "first", tmp_path / "out")
        time.sleep(draw.uniform(0.05, 1.1) * warm)
        os.kill(child.pid, signal.SIGKILL)
        ended = child.end()
        assert ended.code in (0, -signal.SIGKILL), ended.output
        killed += ended.code != 0
        if (tmp_path / "out").exists():
            assert_whole(tmp_path / "out")
            shutil.rmtree(tmp_path / "out")
        assert tree(made.folder) == before
        assert all(path.name.startswith(".out.") and path.name.endswith(".tmp") for path in tmp_path.iterdir())
    assert killed > 0
    assert all(map(released, tmp_path.iterdir()))
    assert export(made.folder / "first", tmp_path / "out", *MERGED) == 0
    assert_whole(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "drafts of killed exports are removed"


def released(draft: Path) -> bool:
    """Wait until no process holds a draft: a builder dies a moment after the export that started it."""
    descriptor = os.open(draft, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    finally:
        os.close(descriptor)
    return True


def ended_within(pid: int, seconds: float) -> bool:
    """Whether a process is gone by then, or a zombie that nobody has asked about."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if "State:\tZ" in Path(f"/proc/{pid}/status").read_text():
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


def test_ctrl_c_stops_the_builder_too(made: OnnxMade, tmp_path: Path) -> None:
    """The installed command and its builder in a new process group, as in a terminal."""
    command = [str(Path(sys.executable).with_name("loraover-export")), "onnx", str(made.folder / "first")]
    arguments = ["-o", str(tmp_path / "out"), *MERGED]
    with subprocess.Popen(
        [*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        while not children.read_text() and process.poll() is None:
            time.sleep(0.02)
        (builder,) = children.read_text().split()
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate()
    assert process.returncode == 130, err
    assert err.splitlines()[-1].startswith("Interrupted")
    assert "Traceback" not in out + err
    assert ended_within(int(builder), seconds=5)
    assert list(tmp_path.iterdir()) == []
