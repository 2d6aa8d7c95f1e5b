"""Output that replaces a folder, and what killed and limited processes leave: the old folder or the new one."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from loraover.common.atomic_output import check_writable, publish_directory, publish_file
from loraover.common.errors import OutputError

from support.children import Child, Ended, become_nobody, limit_file_size
from support.machine import without_locks
from support.make_checkpoint import tree
from support.output_drafts import fill, fill_old, publish

pytestmark = pytest.mark.process


@pytest.mark.parametrize("old", [None, "empty", "full"])
def test_a_folder_is_replaced_whole(old: str | None, tmp_path: Path) -> None:
    target = tmp_path / "out"
    if old is not None:
        target.mkdir()
    if old == "full":
        (target / "inner").mkdir()
        (target / "inner" / "stale").write_text("old")
    with publish_directory(target, replace=True) as draft:
        fill(draft)
        assert not (target / "b").exists()
    assert list(tmp_path.iterdir()) == [target]
    assert "inner/stale" not in tree(target)
    assert (target / "b").is_file()


def test_a_rename_that_fails_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill_old(tmp_path / "out")
    before, rename = tree(tmp_path), Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.suffix == ".tmp":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(self))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OutputError, match="Input/output error"):
        publish(tmp_path / "out", replace=True)
    assert tree(tmp_path) == before


def test_what_holds_the_input_is_not_replaced(tmp_path: Path) -> None:
    source = tmp_path / "out" / "deep" / "input"
    source.mkdir(parents=True)
    with (
        pytest.raises(OutputError, match="holds the input"),
        publish_directory(tmp_path / "out", outside=source, replace=True),
    ):
        pytest.fail("the block ran")
    assert source.is_dir()


# What a kill leaves


CHILD = """
import os, signal, shutil, sys
from pathlib import Path
from loraover.common.atomic_output import publish_directory, publish_file

def stop():
    print("stopped", flush=True)
    sys.stdin.readline()

how, target = sys.argv[1], Path(sys.argv[2])
rename, rmtree = Path.rename, shutil.rmtree

def stopping_rename(self, to):
    if how == "between the renames" and self.suffix == ".tmp":
        stop()
    return rename(self, to)

def stopping_rmtree(path, *args, **kwargs):
    if how == "after the renames" and Path(path).suffix == ".old":
        stop()
    return rmtree(path, *args, **kwargs)

Path.rename, shutil.rmtree = stopping_rename, stopping_rmtree
if how == "in a file":
    publish_file(target, lambda draft: [draft.write_text("half"), stop()])
else:
    with publish_directory(target, replace=True) as draft:
        (draft / "new").write_text("new")
        if how == "in a folder":
            stop()
"""


@contextmanager
def stopped(how: str, target: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that is about to publish, stopped in the midst of it; a line on its standard input lets it go on."""
    command = [sys.executable, "-c", CHILD, how, str(target)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "stopped\n"
        try:
            yield child
        finally:
            child.kill()


def hidden(folder: Path) -> list[str]:
    """The endings of what lies hidden in a folder."""
    return sorted(path.suffix for path in folder.iterdir() if path.name.startswith("."))


def killed(how: str, target: Path) -> None:
    with stopped(how, target):
        pass


@pytest.mark.parametrize("how", ["in a folder", "in a file"])
def test_the_next_run_removes_a_killed_ones_draft(how: str, tmp_path: Path) -> None:
    for name in ("out", "out.1", "other"):
        killed(how, tmp_path / name)
    assert hidden(tmp_path) == [".tmp"] * 3
    publish(tmp_path / "out")
    assert len(hidden(tmp_path)) == 2
    publish_file(tmp_path / "other", lambda draft: draft.write_text("new"))
    check_writable(tmp_path / "out.1")
    assert {path.name for path in tmp_path.iterdir()} == {"out", "other"}


@pytest.mark.parametrize("how", ["in a folder", "in a file"])
def test_the_draft_of_a_running_process_stays(how: str, tmp_path: Path) -> None:
    target = tmp_path / "out"
    with stopped(how, target) as child:
        check_writable(target)
        publish_file(target, lambda draft: draft.write_text("first"))
        target.unlink()
        assert hidden(tmp_path) == [".tmp"]
        child.communicate("\n")
        assert child.returncode == 0
    assert list(tmp_path.iterdir()) == [target]
    assert (target.read_text() if how == "in a file" else tree(target).keys()) in ("half", {"new"})


@pytest.mark.parametrize("replace", [False, True])
def test_a_kill_between_the_renames_costs_nothing(replace: bool, tmp_path: Path) -> None:
    fill_old(target := tmp_path / "out")
    killed("between the renames", target)
    assert hidden(tmp_path) == [".old", ".tmp"]
    assert not target.exists()
    if replace:
        with publish_directory(target, replace=True) as draft:
            assert set(tree(target)) == {"stale"}
            fill(draft)
    else:
        with pytest.raises(OutputError, match="exists already"), publish_directory(target):
            pytest.fail("the block ran")
        assert set(tree(target)) == {"stale"}
        assert hidden(tmp_path) == [".tmp"]
        publish(target, replace=True)
    assert list(tmp_path.iterdir()) == [target]
    assert set(tree(target)) == {"inner", "inner/a", "b"}


def test_a_kill_after_the_renames_leaves_the_new_folder(tmp_path: Path) -> None:
    fill_old(target := tmp_path / "out")
    killed("after the renames", target)
    assert hidden(tmp_path) == [".old"]
    assert set(tree(target)) == {"new"}
    with pytest.raises(OutputError, match="exists already"):
        check_writable(target)
    assert list(tmp_path.iterdir()) == [target]
    assert set(tree(target)) == {"new"}


def test_of_several_old_folders_the_last_is_put_back(tmp_path: Path) -> None:
    for name in ("0000000f", "00000001"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
        (tmp_path / name).rename(tmp_path / f".out.{name}.old")
        time.sleep(0.05)  # a file system's clock ticks every few milliseconds
    with pytest.raises(OutputError, match="exists already"):
        check_writable(tmp_path / "out")
    assert set(tree(tmp_path)) == {"out", "out/00000001"}


@pytest.mark.parametrize("how", ["between the renames", "after the renames"])
def test_the_old_folder_of_a_running_replacement_stays(how: str, tmp_path: Path) -> None:
    fill_old(target := tmp_path / "out")
    with stopped(how, target) as child:
        before = hidden(tmp_path)
        if how == "between the renames":
            check_writable(target)
        else:
            with pytest.raises(OutputError, match="exists already"):
                check_writable(target)
        assert hidden(tmp_path) == before
        assert ".old" in before
        child.communicate("\n")
        assert child.returncode == 0
    assert list(tmp_path.iterdir()) == [target]
    assert set(tree(target)) == {"new"}


def test_names_that_begin_alike_are_told_apart(tmp_path: Path) -> None:
    one, other = (tmp_path / ("n" * 249 + end) for end in "ab")
    fill_old(one)
    killed("between the renames", one)
    publish(other)
    assert hidden(tmp_path) == [".old", ".tmp"]
    with pytest.raises(OutputError, match="exists already"):
        check_writable(one)
    assert set(tree(one)) == {"stale"}


def test_without_locks_nothing_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed("in a folder", tmp_path / "out")
    without_locks(monkeypatch)
    publish(tmp_path / "out")
    publish(tmp_path / "out", replace=True)
    assert hidden(tmp_path) == [".tmp"]
    assert set(tree(tmp_path / "out")) == {"inner", "inner/a", "b"}


@pytest.mark.parametrize("is_held", [True, False])
def test_a_draft_that_is_swept_away_before_it_is_locked_is_made_again(
    is_held: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock = fcntl.flock
    swept: list[Path] = []

    def sweeping(descriptor: int, operation: int) -> None:
        if not swept:
            (draft,) = tmp_path.glob(".out.*.tmp")
            shutil.rmtree(draft)
            swept.append(draft)
            if is_held:
                raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", sweeping)
    drafts: list[Path] = []
    publish(tmp_path / "out", drafts.append)
    assert swept == drafts
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_a_block_does_not_remove_the_draft_of_one_around_it(tmp_path: Path) -> None:
    with publish_directory(tmp_path / "out") as outer:
        fill(outer)
        check_writable(tmp_path / "out")
        assert (outer / "b").is_file()


TENSORS = {"a": torch.arange(5000.0), "b": torch.ones(7)}


def write_file(target: Path) -> None:
    publish_file(target, lambda draft: draft.write_bytes(bytes(range(250)) * 80))


def write_folder(target: Path) -> None:
    """Files of several sizes, one of them by a library in Rust."""
    with publish_directory(target) as draft:
        (draft / "inner").mkdir()
        (draft / "inner" / "a").write_bytes(bytes(3000))
        save_file(TENSORS, draft / "b.safetensors")
        (draft / "c").write_text("c" * 6000)


Write = Callable[[Path], object]
every_kind = pytest.mark.parametrize("write", [write_file, write_folder])


def in_child(write: Write, target: Path, prepare: Callable[[], object] = lambda: None) -> Child:
    """The writer in a process; an error of ours is printed, and its exit code is 2."""

    def command() -> int:
        try:
            write(target)
        except OutputError as error:
            print(f"error: {error}")
            return 2
        return 0

    return Child(command, prepare=prepare)


def assert_refused(ended: Ended, target: Path, reason: str) -> None:
    assert ended.code == 2, ended.output
    assert ended.output.startswith(f"error: cannot write {target}: {reason}")


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


@every_kind
def test_a_file_size_limit_leaves_nothing(write: Write, tmp_path: Path) -> None:
    codes = []
    for size in (0, 1, 2999, 5000, 19_999, 20_000, 30_000):
        ended = in_child(write, tmp_path / "out", partial(limit_file_size, size)).end()
        codes.append(ended.code)
        if ended.code:
            assert_refused(ended, tmp_path / "out", "File too large")
            assert tree(tmp_path) == {}
        remove(tmp_path / "out")
    assert codes == sorted(codes, reverse=True)
    assert set(codes) == {0, 2}


@every_kind
@pytest.mark.parametrize("mode", [0o555, 0o000], ids=oct)
@pytest.mark.parametrize("deep", ["", "deep/"])
def test_a_folder_without_permission_is_named(mode: int, deep: str, write: Write, public: Path) -> None:
    (public / "closed").mkdir(mode=mode)
    target = public / "closed" / f"{deep}out"
    if deep and write is write_file:
        write = partial(publish_file, fill=lambda draft: draft.write_text("new"), parents=True)
    assert_refused(in_child(write, target, become_nobody).end(), target, "Permission denied")
    (public / "closed").chmod(0o755)
    assert list((public / "closed").iterdir()) == []
