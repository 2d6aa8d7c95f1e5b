"""Output beyond a limit of file sizes and without permission: complete or absent."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from loraover.common.atomic_output import publish_directory, publish_file
from loraover.common.errors import OutputError

from support.children import Child, Ended, become_nobody, limit_file_size
from support.make_checkpoint import tree

pytestmark = pytest.mark.process

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
