"""Exports to GGUF in separate processes: full disks and signals leave a complete file or none."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.children import Child, limit_file_size
from support.gguf_export import GgufMade, export, make_gguf
from support.make_checkpoint import tree
from support.refusals import only_error

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> GgufMade:
    made = make_gguf(tmp_path_factory.mktemp("llama"), "Llama")
    assert export(made.adapter, made.folder / "expected" / "..") == 2  # imports everything that the forks need
    (made.folder / "expected").mkdir()
    assert export(made.adapter, made.folder / "expected" / "out.gguf") == 0
    return made


def in_child(made: GgufMade, output: Path, prepare: Callable[[], object] = lambda: None) -> Child:
    return Child(lambda: export(made.adapter, output), prepare=prepare)


def expected(made: GgufMade) -> bytes:
    return (made.folder / "expected" / "out.gguf").read_bytes()


def test_a_file_size_limit_leaves_nothing(made: GgufMade, tmp_path: Path) -> None:
    codes = []
    whole = len(expected(made))
    for size in (0, 1, 24, 500, 3000, whole // 2, whole - 1, whole):
        ended = in_child(made, tmp_path / "out.gguf", lambda size=size: limit_file_size(size)).end()  # type: ignore[misc]
        codes.append(ended.code)
        if ended.code == 0:
            assert (tmp_path / "out.gguf").read_bytes() == expected(made)
        else:
            message = only_error(ended.output)
            assert "File too large" in message
            assert str(tmp_path / "out.gguf") in message
            assert tree(tmp_path) == {}
    assert codes == [2] * 7 + [0]


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


def test_a_full_disk_leaves_nothing(made: GgufMade, small_disk: Path) -> None:
    codes = []
    for free in (0, 4, 16, 32, 48, 64):
        (small_disk / "filler").write_bytes(bytes((64 - free) * 1024))
        ended = in_child(made, small_disk / "out.gguf").end()
        codes.append(ended.code)
        (small_disk / "filler").unlink()
        if ended.code == 0:
            assert (small_disk / "out.gguf").read_bytes() == expected(made)
            (small_disk / "out.gguf").unlink()
        else:
            assert "No space left" in only_error(ended.output)
        assert list(small_disk.iterdir()) == []
    assert codes == sorted(codes, reverse=True)
    assert set(codes) == {0, 2}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_signal_leaves_all_or_nothing(number: signal.Signals, made: GgufMade, tmp_path: Path) -> None:
    before = time.monotonic()
    assert in_child(made, tmp_path / "out.gguf").end().code == 0
    longest = time.monotonic() - before
    (tmp_path / "out.gguf").unlink()
    draw = random.Random(1)
    codes = set()
    for _ in range(20):
        child = in_child(made, tmp_path / "out.gguf")
        time.sleep(draw.uniform(0.1, 1.1) * longest)
        os.kill(child.pid, number)
        ended = child.end()
        codes.add(ended.code)
        assert ended.code in (0, 130, -signal.SIGKILL), ended.output
        assert "Traceback" not in ended.output
        if (tmp_path / "out.gguf").exists():
            assert (tmp_path / "out.gguf").read_bytes() == expected(made)
            (tmp_path / "out.gguf").unlink()
        left = [path.name for path in tmp_path.iterdir()]
        assert all(name.startswith(".out.gguf.") for name in left)
        assert len(left) <= (number == signal.SIGKILL), "an interrupt removes its draft, the next run a killed one's"
    assert codes - {0}
    assert in_child(made, tmp_path / "out.gguf").end().code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out.gguf"]
